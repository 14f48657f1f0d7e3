"""Scope GRID: a token map goes on smaller."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from ltm_retrofit.finding.example import home
from ltm_retrofit.finding.layouts import principal_keys
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import Keys, Scope
from ltm_retrofit.merging.slice import CropGrid
from ltm_retrofit.scopes import base
from ltm_retrofit.scopes.grid.budget import GridBudget, place_of
from ltm_retrofit.scopes.grid.find import find as find_grid
from ltm_retrofit.scopes.grid.forward import GridForward


def build(model: nn.Module, sites: Sites, plan: base.Planned) -> base.Parts:
    """Intercept the modules of the rows."""
    rows, forwards, masks = base.rows_in(plan, Scope.GRID), list[base.Interceptor](), dict[nn.Module, nn.Module]()
    for site in sites.of(Scope.GRID):
        if (row := rows.get(site.block)) is None:
            continue
        block = model.get_submodule(site.block)
        place = place_of(site, row, plan, home(model)[1])
        assert place.grid is not None
        # tokens are alike where the first weights that read them make nearly the same of them
        keys = Keys(principal_keys(model.get_parameter(site.weight), site.key_dim))
        forwards.append(GridForward(block, site, place.grid))
        masks[block] = base.make_mask(plan.config.method, place, keys, block)
    return forwards, masks


def panels(rows: Sequence[base.Row], seen: base.Shown) -> dict[str, base.Panel]:
    """Show for each place of the map the output token that takes most of it."""
    drawn = {}
    for row in rows:
        forward = seen.forwards[row.site]
        assert isinstance(forward, GridForward) and row.grid is not None
        (height, width), grid_out = forward.grid, row.grid
        share, strongest = seen.merges[row.site].assignment.dense()[0].max(dim=-1)
        _, first, inverse = np.unique(strongest.cpu().numpy(), return_index=True, return_inverse=True)
        groups = first[inverse].reshape(height, width)  # named after its first place
        alive = np.ones((height, width), dtype=bool)
        if isinstance(forward.mask, CropGrid):
            alive[grid_out[0] :], alive[:, grid_out[1] :] = False, False
        taken = share.float().cpu().numpy().reshape(height, width)
        drawn[row.site] = base.Panel(groups, alive, taken, (row.tokens_out, row.tokens_in))
    return drawn


def legend(rows: Sequence[base.Row], dropping: bool) -> str:
    """Say what the colours are of."""
    if dropping or not rows:
        return ""
    return "Scope GRID: the map goes on smaller; a place is drawn with the new token that takes most of it."


GRID = base.ScopeRules(Scope.GRID, find_grid, GridBudget, build, panels, legend)
