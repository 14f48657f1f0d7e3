"""Which patches became one token at each site: what `show_merges` draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ltm_retrofit.convert import get_plan
from ltm_retrofit.converted.record import BlockForward, forwards_of, masks_of
from ltm_retrofit.errors import CountError
from ltm_retrofit.merging.grid import CropGrid, PoolGrid
from ltm_retrofit.merging.tokens import Step, accumulated
from ltm_retrofit.scopes.local.forward import LocalForward
from ltm_retrofit.scopes.rows import Row
from ltm_retrofit.tracing import MergeTrace

#: LOCAL sites that are drawn where there are more
FEW = 6


@dataclass(frozen=True)
class Panel:
    """What one site made of the first image's patches, which lie in a grid of ``groups.shape``.

    ``groups`` are equal where patches are one token; ``names`` are the groups of more than one patch that get a
    number, in its order; ``share`` is how much of each patch the token that it is drawn with got. ``placed`` says
    whether it is known where in the image the patches lie.
    """

    title: str
    scope: str
    groups: np.ndarray
    alive: np.ndarray
    share: np.ndarray
    names: list[int]
    placed: bool = True


def panels_of(model: nn.Module, traced: MergeTrace, height: int, width: int) -> list[Panel]:
    """Return a panel for each site that merged, but for LOCAL sites beyond `FEW`: the first, the last, and between.

    Args:
        model: a converted model.
        traced: its pass over one image, of the size that it was converted for.
        height: of the image.
        width: likewise.

    Raises:
        CountError: where patches make no grid, or merging is disabled at the moment.
    """
    rows = [row for row in get_plan(model).rows if row.action == "merge"]
    if len(traced.steps) != len(rows):
        raise CountError(
            f"the plan merges at {len(rows)} sites and {len(traced.steps)} did: merging is disabled at the moment. "
            "Call show_merges outside `with ltm_retrofit.disabled(model):`"
        )
    flow = [row for row in rows if row.scope == "FLOW"]
    drawn = iter(_flow_panels(model, traced, flow, height, width)) if flow else iter(())
    local = [row.site for row in rows if row.scope == "LOCAL"]
    local = [local[place] for place in np.linspace(0, len(local) - 1, min(len(local), FEW)).round().astype(int)]
    panels = []
    for row in rows:
        if row.scope == "FLOW":
            panels.append(next(drawn))
        elif row.scope == "GRID":
            panels.append(_grid_panel(model, traced.by_site[row.site], row))
        elif row.site in local:
            panels.append(_local_panel(model, traced.by_site[row.site], row, height, width))
    return panels


def patches_before(model: nn.Module) -> tuple[int, int]:
    """Return how many patches and prefix tokens enter the first block of scope FLOW; zeros without one."""
    row = next((row for row in get_plan(model).rows if row.scope == "FLOW"), None)
    if row is None:
        return 0, 0
    prefix = next(forward.prefix for forward in forwards_of(model) if isinstance(forward, BlockForward))
    return row.tokens_in - prefix, prefix


def _flow_panels(model: nn.Module, traced: MergeTrace, rows: Sequence[Row], height: int, width: int) -> list[Panel]:
    """Tokens stay merged, so each panel shows all that happened so far, and a group keeps its number."""
    patches, prefix = patches_before(model)
    grid = patch_grid(patches, height, width)
    steps = tuple(traced.by_site[row.site] for row in rows)
    groups = [groups_of(steps[: site + 1], prefix) for site in range(len(rows))]
    names = names_of(groups)
    panels = []
    for site, (row, labels) in enumerate(zip(rows, groups, strict=True)):
        before = steps[: site + 1]
        share = accumulated(before)[0, prefix:].amax(dim=-1).float().cpu().numpy()
        alive = survivors(before, prefix)
        panel = Panel(_title(row), row.scope, labels.reshape(grid), alive.reshape(grid), share.reshape(grid), names)
        panels.append(panel)
    return panels


def _grid_panel(model: nn.Module, step: Step, row: Row) -> Panel:
    """A map goes on smaller: each of its places belongs to the output token that takes most of it."""
    mask = masks_of(model)[row.site]
    assert isinstance(mask, PoolGrid)
    height, width = mask.grid
    share, strongest = step.assignment.dense()[0].max(dim=-1)
    _, first, inverse = np.unique(strongest.cpu().numpy(), return_index=True, return_inverse=True)
    groups = first[inverse].reshape(height, width)  # named after its first place
    alive = np.ones((height, width), dtype=bool)
    if isinstance(mask, CropGrid):
        alive[mask.kept[0] :], alive[:, mask.kept[1] :] = False, False
    title = f"{row.site} · {height}×{width} → {mask.kept[0]}×{mask.kept[1]} tokens"
    taken = share.float().cpu().numpy().reshape(height, width)
    return Panel(title, row.scope, groups, alive, taken, names_of([groups]))


def _local_panel(model: nn.Module, step: Step, row: Row, height: int, width: int) -> Panel:
    """An MLP sees merged tokens: the groups of this site alone, each within its cell."""
    forward = next(f for f in forwards_of(model) if isinstance(f, LocalForward) and f.first and f.name == row.site)
    layout = forward.layout
    assert layout.grid is not None
    cells = forward.cells(layout.tokens, layout.grid)
    lead, inside, rest = cells.apart(torch.arange(layout.tokens).view(1, -1, 1))
    own = inside.squeeze(-1)  # (cells, tokens of a cell): where they lie in the sequence

    def spread(values: torch.Tensor, outside: torch.Tensor) -> np.ndarray:
        """Lay values of cells, and those of tokens in no cell, out on the grid."""
        ends = (outside[:, : lead.shape[1]], outside[:, layout.tokens - rest.shape[1] :])
        whole = cells.together(ends[0], values.unsqueeze(-1), ends[1])[0, layout.prefix :, 0]
        return np.asarray(whole[: layout.tokens - layout.prefix - layout.trail].numpy().reshape(grid))

    grid = layout.grid if layout.grid[0] > 1 or cells.patches == 1 else patch_grid(layout.grid[1], height, width)
    kept = step.assignment.kept[: len(own)].cpu()
    share, strongest = (each.cpu() for each in step.assignment.dense()[: len(own)].float().max(dim=-1))
    groups = spread(own.gather(1, kept.gather(1, strongest)), torch.arange(layout.tokens).view(1, -1, 1))
    everyone = torch.ones(1, layout.tokens, 1)
    alive = spread(torch.zeros(own.shape).scatter(1, kept, 1.0), everyone) > 0
    title = _title(row) + (f"\nthe first of {layout.sequences} sequences" if layout.sequences > 1 else "")
    taken = spread(share, everyone)
    return Panel(title, row.scope, groups, alive, taken, names_of([groups]), placed=layout.sequences == 1)


def _title(row: Row) -> str:
    return f"{row.site} · {row.tokens_in} → {row.tokens_out} tokens"


def survivors(steps: Sequence[Step], prefix: int) -> np.ndarray:
    """Return which patches still are where their own token is, not moved into another one: ``(patches,)`` bool."""
    alive = np.zeros(steps[0].assignment.whole, dtype=bool)
    alive[_origins(steps)] = True
    return alive[prefix:]


def groups_of(steps: Sequence[Step], prefix: int) -> np.ndarray:
    """Return the group of each patch after these FLOW sites, for the first image: ``(patches,)`` integers.

    A patch belongs to the token that gets most of it. A group is named after the one of its patches that the token
    stands for, so the name is the same after every site.
    """
    strongest = accumulated(tuple(steps))[0, prefix:].argmax(dim=-1).cpu().numpy()
    return np.asarray(_origins(steps)[strongest] - prefix)


def names_of(groups: Sequence[np.ndarray]) -> list[int]:
    """Return every group that holds more than one patch after some site, in raster order."""
    merged: set[int] = set()
    for labels in groups:
        values, counts = np.unique(labels, return_counts=True)
        merged |= set(values[counts > 1].tolist())
    return sorted(merged)


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the patches of an image.

    Raises:
        CountError: where square patches do not divide the image into so many, and the number is no square.
    """
    for size in range(1, min(height, width) + 1):
        if height % size == width % size == 0 and (height // size) * (width // size) == patches:
            return height // size, width // size
    side = round(patches**0.5)
    if patches < 1 or side * side != patches:
        raise CountError(
            f"{patches} patches of a {height}×{width} image make no grid: expected (height / p) × (width / p) for a "
            "whole p, or a square number. Merging can only be drawn where patches lie in a grid"
        )
    return side, side


def _origins(steps: Sequence[Step]) -> np.ndarray:
    """Return for each present token of the first image the original position that it never left, ``(P,)``."""
    first = steps[0].assignment
    origins = torch.arange(first.whole, device=first.kept.device)
    for step in steps:
        origins = origins[step.assignment.kept[0]]
    return np.asarray(origins.cpu().numpy())
