"""Where does a block allow merging? Three scopes, each with its own answer to the same four questions.

A module is changed by intercepting its ``forward`` on the instance: its class and its keys stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ltm_retrofit.finding.example import Example, run
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.scopes.base import Interceptor, Parts, Planned, Record, ScopeRules, install, uninstall
from ltm_retrofit.scopes.flow import FLOW
from ltm_retrofit.scopes.grid import GRID
from ltm_retrofit.scopes.local import LOCAL

#: the best first: that in which merging saves most
SCOPES: tuple[ScopeRules, ...] = (FLOW, GRID, LOCAL)


def rules_of(scope: str) -> ScopeRules:
    """Return a scope's answers by its name."""
    return next(rules for rules in SCOPES if rules.name == scope)


def build_all(model: nn.Module, sites: Sites, plan: Planned) -> Parts:
    """Make every interceptor and mask of a plan; touch nothing."""
    forwards: list[Interceptor] = []
    masks: dict[nn.Module, nn.Module] = {}
    # masks draw random weights before they get the pretrained ones: the user's random numbers stay the same
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for scope in SCOPES:
            more, made = scope.build(model, sites, plan)
            forwards += more
            masks |= made
    return forwards, masks


@contextmanager
def tried(model: nn.Module, parts: Parts) -> Iterator[None]:
    """Run a model meanwhile as its conversion would; nothing is proven or guarded."""
    install(model, Record(), parts)
    try:
        yield
    finally:
        uninstall(model, parts[0])


@contextmanager
def both_ways(
    model: nn.Module, forwards: Sequence[Interceptor], example: Example
) -> Iterator[list[Callable[[], object]]]:
    """Give two calls of a model on an example, by its original path and as it is now; for timing.

    Switching takes the same time in both, and next to none.
    """
    present = [forward.mode for forward in forwards]

    def switch(modes: Sequence[str]) -> None:
        for forward, mode in zip(forwards, modes, strict=True):
            forward.mode = mode

    def way(modes: Sequence[str]) -> Callable[[], object]:
        def go() -> object:
            switch(modes)
            return run(model, example)

        return go

    try:
        yield [way(["original"] * len(forwards)), way(present)]
    finally:
        switch(present)
