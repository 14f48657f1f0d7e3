"""Scope LOCAL: tokens are merged within one block only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ltm_retrofit.finding.example import home
from ltm_retrofit.finding.layouts import principal_keys
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import Keys, Scope
from ltm_retrofit.scopes import base
from ltm_retrofit.scopes.local.budget import LocalBudget, place_of
from ltm_retrofit.scopes.local.find import find as find_local
from ltm_retrofit.scopes.local.forward import LocalForward


def build(model: nn.Module, sites: Sites, plan: base.Planned) -> base.Parts:
    """Intercept the chain of each row: its first module merges, its last one unmerges."""
    rows, forwards, masks = base.rows_in(plan, Scope.LOCAL), list[base.Interceptor](), dict[nn.Module, nn.Module]()
    for site in sites.of(Scope.LOCAL):
        if (row := rows.get(site.block)) is None:
            continue
        host, attention = model.get_submodule(site.host), model.get_submodule(site.attention)
        modules = [model.get_submodule(name) for name in site.chain]
        for module in modules:
            first, last = module is modules[0], module is modules[-1]
            forwards.append(LocalForward(module, site, host, first=first, last=last, attention=attention))
        place = place_of(site, row, plan, home(modules[0])[1])
        # tokens that are alike to the first weights of an MLP get nearly the same update from it
        keys = Keys(principal_keys(modules[0].get_parameter(site.weight), site.key_dim))
        masks[host] = base.make_mask(plan.config.method, place, keys, modules[0])
    return forwards, masks


def panels(rows: Sequence[base.Row], seen: base.Shown) -> dict[str, base.Panel]:
    """Show the groups of each site alone."""
    return {row.site: _panel(row, seen) for row in rows}


def legend(rows: Sequence[base.Row], dropping: bool) -> str:
    """Say how far a group reaches."""
    if not rows:
        return ""
    return "Scope LOCAL: patches merge for one module and part again; no group reaches beyond its cell."


def _panel(row: base.Row, seen: base.Shown) -> base.Panel:
    forward, merge = seen.forwards[row.site], seen.merges[row.site]
    assert isinstance(forward, LocalForward) and forward.layout.grid is not None
    layout, grid = forward.layout, forward.layout.grid
    cells = forward.cells(layout.tokens, grid)
    lead, inside, rest = cells.apart(torch.arange(layout.tokens).view(1, -1, 1))
    own = inside.squeeze(-1)  # (cells, tokens of a cell): where they lie in the sequence
    shape = grid if grid[0] > 1 or cells.patches == 1 else base.patch_grid(grid[1], *seen.size)

    def spread(values: Tensor, outside: Tensor) -> np.ndarray:
        """Lay values of cells, and those of tokens in no cell, out on the grid."""
        ends = (outside[:, : lead.shape[1]], outside[:, layout.tokens - rest.shape[1] :])
        whole = cells.together(ends[0], values.unsqueeze(-1), ends[1])[0, layout.prefix :, 0]
        return np.asarray(whole[: layout.tokens - layout.prefix - layout.trail].numpy().reshape(shape))

    kept = merge.assignment.kept[: len(own)].cpu()
    share, strongest = (each.cpu() for each in merge.assignment.dense()[: len(own)].float().max(dim=-1))
    groups = spread(own.gather(1, kept.gather(1, strongest)), torch.arange(layout.tokens).view(1, -1, 1))
    everyone = torch.ones(1, layout.tokens, 1)
    alive = spread(torch.zeros(own.shape).scatter(1, kept, 1.0), everyone) > 0
    left = row.tokens_out, row.tokens_in
    return base.Panel(groups, alive, spread(share, everyone), left, layout.sequences)


LOCAL = base.ScopeRules(Scope.LOCAL, find_local, LocalBudget, build, panels, legend, where="inside")
