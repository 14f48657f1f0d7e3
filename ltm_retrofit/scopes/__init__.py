"""Where does a block allow merging? Three scopes, each with its own answer to the same four questions.

A module is changed by intercepting its ``forward`` on the instance: its class and its keys stay.
"""

from __future__ import annotations

from ltm_retrofit.scopes.base import ScopeRules
from ltm_retrofit.scopes.flow import FLOW
from ltm_retrofit.scopes.grid import GRID
from ltm_retrofit.scopes.local import LOCAL

#: the best first: that in which merging saves most
SCOPES: tuple[ScopeRules, ...] = (FLOW, GRID, LOCAL)


def rules_of(scope: str) -> ScopeRules:
    """Return a scope's answers by its name."""
    return next(rules for rules in SCOPES if rules.name == scope)
