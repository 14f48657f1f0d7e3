"""Scope FLOW: tokens stay merged from a block on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ltm_retrofit.finding.example import home
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import Keys, Scope
from ltm_retrofit.merging.tokens import Merge, accumulated
from ltm_retrofit.scopes import base
from ltm_retrofit.scopes.flow.budget import FlowBudget, place_of
from ltm_retrofit.scopes.flow.find import find as find_flow
from ltm_retrofit.scopes.flow.forward import FlowForward


def build(model: nn.Module, sites: Sites, plan: base.Planned) -> base.Parts:
    """Intercept every block from the first row's on: those without one hand on what the tokens carry."""
    rows, forwards, masks = base.rows_in(plan, Scope.FLOW), list[base.Interceptor](), dict[nn.Module, nn.Module]()
    for site in sites.of(Scope.FLOW):
        row = rows.get(site.block)
        if row is None and not forwards:
            continue
        block, last = model.get_submodule(site.block), site is sites.of(Scope.FLOW)[-1]
        keep = row.tokens_out if row is not None and row.slices else None
        unmerge = last and plan.unmerge
        before = forwards[-1].block if forwards else None
        forwards.append(FlowForward(block, site, before, expects=bool(masks), keep=keep, last=last, unmerge=unmerge))
        if row is not None and keep is None:
            place = place_of(site, row, plan, home(block)[1])
            # tokens are alike where the block's own attention finds their keys alike, on average over its heads
            masks[block] = base.make_mask(plan.config.method, place, Keys(*site.key.mean_map(block)), block)
    return forwards, masks


def panels(rows: Sequence[base.Row], seen: base.Shown) -> dict[str, base.Panel]:
    """Show in each panel all that happened so far."""
    prefix = seen.forwards[rows[0].site].prefix
    grid = base.patch_grid(rows[0].tokens_in - prefix, *seen.size)
    so_far = [tuple(seen.merges[row.site] for row in rows[: place + 1]) for place in range(len(rows))]
    groups = [groups_of(before, prefix) for before in so_far]
    drawn = {}
    for row, before, labels in zip(rows, so_far, groups, strict=True):
        share = accumulated(before)[0, prefix:].amax(dim=-1).float().cpu().numpy()
        alive = survivors(before, prefix).reshape(grid)
        left = row.tokens_out, rows[0].tokens_in
        drawn[row.site] = base.Panel(labels.reshape(grid), alive, share.reshape(grid), left)
    return drawn


def legend(rows: Sequence[base.Row], dropping: bool) -> str:
    """Say nothing: what panels in this scope show needs no explanation."""
    return ""


def survivors(merges: Sequence[Merge], prefix: int) -> np.ndarray:
    """Return which patches still are where their own token is, not moved into another one: ``(patches,)`` bool."""
    alive = np.zeros(merges[0].assignment.whole, dtype=bool)
    alive[_origins(merges)] = True
    return alive[prefix:]


def groups_of(merges: Sequence[Merge], prefix: int) -> np.ndarray:
    """Return the group of each patch after these sites, for the first image: ``(patches,)`` integers.

    A patch belongs to the token that gets most of it. A group is named after the one of its patches that the token
    stands for, so the name is the same after every site.
    """
    strongest = accumulated(tuple(merges))[0, prefix:].argmax(dim=-1).cpu().numpy()
    return np.asarray(_origins(merges)[strongest] - prefix)


def _origins(merges: Sequence[Merge]) -> np.ndarray:
    """Return for each present token of the first image the original position that it never left, ``(P,)``."""
    first = merges[0].assignment
    origins = torch.arange(first.whole, device=first.kept.device)
    for merge in merges:
        origins = origins[merge.assignment.kept[0]]
    return np.asarray(origins.cpu().numpy())


FLOW = base.ScopeRules(Scope.FLOW, find_flow, FlowBudget, build, panels, legend, stays=True)
