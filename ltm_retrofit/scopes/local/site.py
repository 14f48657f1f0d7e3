"""An MLP behind an attention, the cells in which its tokens merge, and what the attention is called with. No search."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ltm_retrofit.finding.example import named_tensors
from ltm_retrofit.finding.sites import AttentionSite, TokenLayout

Number = bool | int | float
Grid = tuple[int, int]
#: tokens that are worth merging
FEWEST = 4


@dataclass(frozen=True)
class SideInputs:
    """The tensors that an attention got in the example besides its tokens, by path: ``mask``, ``positions.0``.

    Args:
        free: those that follow from the image and the weights alone.
        fixed: those that came from an input which is no image; each had one value throughout, which hid nothing.
    """

    free: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Number], ...] = ()


@dataclass(frozen=True, kw_only=True)
class LocalSite(AttentionSite):
    """An MLP behind an attention: modules that treat each token alone, one handing its result to the next.

    Or, where it ``mixes``, the attention itself, which takes its tokens as a set.

    ``cell`` is the group of tokens, height × width in the grid, in which merging happens; ``weight`` names the first
    weight matrix that reads the tokens, below the first module.
    """

    paths: ClassVar[tuple[str, ...]] = (*AttentionSite.paths, "chain", "host")

    chain: tuple[str, ...]
    host: str  # the module on which the mask is registered
    cell: Grid
    cost: tuple[int, int, int]  # multiply-adds of the chain for N tokens: fixed + linear·N + square·N²
    width: int  # of the chain's output
    weight: str
    mixes: bool = False
    side_inputs: SideInputs = field(default_factory=SideInputs)
    bound: bool = False  # whether its cells were chosen by which tokens may know of each other, at this size

    @property
    def parts(self) -> tuple[str, ...]:
        """The modules that belong to one block of the model."""
        return (self.attention, *self.chain)

    @property
    def spare(self) -> bool:
        """Whether it is chosen only where its attention has no other site: merging before an attention costs most."""
        return self.mixes


def side_tensors(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the tensors of a call besides its tokens, which are the first of three dimensions and more, with paths.

    Args:
        names: of the positional arguments.
        args: of the call.
        kwargs: likewise.
    """
    tensors = list(named_tensors({**dict(zip(names, args, strict=False)), **kwargs}))
    tokens = next((value for _, value in tensors if value.ndim >= 3 and value.is_floating_point()), None)
    return [(path, value) for path, value in tensors if tokens is None or value.shape != tokens.shape]


def names_of(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's own forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


class Cells:
    """How the tokens of one tensor lie in cells: ``(R, N, C)`` to ``(R · cells, tokens of a cell, C)`` and back.

    Args:
        count: N.
        lead: tokens before the patches, in no cell.
        trail: tokens behind them, likewise.
        grid: height and width of the patches.
        cell: of a cell. Where the grid is no multiple of it, the last patches are in no cell.
    """

    def __init__(self, count: int, lead: int, trail: int, grid: Grid, cell: Grid) -> None:
        self.lead, self.grid, self.cell = lead, grid, cell
        self.patches, self.size = count - lead - trail, cell[0] * cell[1]
        self.rest = self.patches % self.size + trail
        #: whether cells are stretches of the sequence, for a grid that nothing divides
        self.stretched = cell[0] == 1 and (grid[1] % cell[1] > 0 or grid[0] * grid[1] != self.per_sequence * self.size)

    @property
    def per_sequence(self) -> int:
        """The number of cells of one sequence."""
        return self.patches // self.size

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take leading tokens, those that are in cells, and the rest apart."""
        stop = x.shape[1] - self.rest
        return x[:, : self.lead], x[:, self.lead : stop], x[:, stop:]

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take leading tokens, cells and the rest apart."""
        lead, middle, rest = self.ends(x)
        if self.stretched:
            return lead, middle.reshape(-1, self.size, x.shape[-1]), rest
        (height, width), (h, w) = self.grid, self.cell
        tiles = middle.reshape(x.shape[0], height // h, h, width // w, w, x.shape[-1])
        return lead, tiles.transpose(2, 3).reshape(-1, self.size, x.shape[-1]), rest

    def together(self, lead: Tensor, cells: Tensor, rest: Tensor) -> Tensor:
        """Put back together what `apart` took apart."""
        if self.stretched:
            middle = cells.reshape(lead.shape[0], -1, cells.shape[-1])
        else:
            (height, width), (h, w) = self.grid, self.cell
            tiles = cells.reshape(lead.shape[0], height // h, width // w, h, w, cells.shape[-1])
            middle = tiles.transpose(2, 3).reshape(lead.shape[0], height * width, cells.shape[-1])
        return torch.cat([lead, middle, rest], dim=1)


def cells_of(site: LocalSite) -> tuple[int, int, int]:
    """Return the number of cells of one sequence, the tokens in each, and those that no cell holds."""
    size = site.cell[0] * site.cell[1]
    patches = site.layout.tokens - site.layout.prefix - site.layout.trail
    return patches // size, size, site.layout.tokens - patches // size * size


def choose_cell(grid: Grid, dim: int) -> Grid:
    """Choose the cell that merging happens in: the largest that tiles the grid and is cheap to compare within.

    Comparing and merging g tokens costs about g/(8·dim) of an MLP, so narrow networks get small cells.
    """
    limit = max(36, dim * 11 // 20)
    tiles = [(a, b) for a in _divisors(grid[0]) for b in _divisors(grid[1]) if a * b <= limit]
    # near-square cells hold neighbours in both directions, unless that makes them much smaller than they could be
    best = max(tiles, key=lambda cell: (cell[0] * cell[1] / limit > 0.5, -abs(cell[0] - cell[1]), cell[0] * cell[1]))
    largest = max(tiles, key=lambda cell: cell[0] * cell[1])
    cell = best if best[0] * best[1] * 2 > limit or best[0] * best[1] == largest[0] * largest[1] else largest
    if cell[0] * cell[1] >= min(FEWEST, grid[0] * grid[1]):
        return cell
    length = min(limit, grid[0] * grid[1])  # sizes that nothing divides: stretches of the sequence, as equal as can be
    return 1, -(-grid[0] * grid[1] // -(-grid[0] * grid[1] // length))


def cell_within(groups: Tensor, layout: TokenLayout, dim: int) -> tuple[TokenLayout, Grid] | None:
    """Choose a cell, and how its tokens are taken to lie, such that no cell holds tokens of two groups ``(N,)``.

    None where there is none worth merging in.
    """
    patches = layout.tokens - layout.prefix - layout.trail
    if len(groups) != layout.tokens or layout.grid is None:
        return None
    row = 1, patches
    longest = max(FEWEST, choose_cell(row, dim)[1])
    tried = [(layout.grid, choose_cell(layout.grid, dim))]
    tried += [(row, (1, size)) for size in range(longest, FEWEST - 1, -1) if patches % size == 0]
    for grid, cell in tried:
        cells = Cells(layout.tokens, layout.prefix, layout.trail, grid, cell)
        inside = cells.apart(groups.view(1, -1, 1))[1].squeeze(-1)
        if bool((inside == inside[:, :1]).all()):
            return replace(layout, grid=grid), cell
    return None


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
