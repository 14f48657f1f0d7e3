"""Cells: the groups of neighbouring tokens within which scope LOCAL merges. Pure arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ltm_retrofit.scopes.local.site import LocalSite

Grid = tuple[int, int]
#: tokens that are worth merging
FEWEST = 4


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


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
