"""Scope LOCAL: an MLP sees merged tokens, and every token gets its group's update."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.finding.layouts import as_tokens, from_tokens, spatial_of
from ltm_retrofit.merging.tokens import Assignment, DenseAssignment, GridAssignment
from ltm_retrofit.scopes.base import Interceptor
from ltm_retrofit.scopes.local.find import choose_cell
from ltm_retrofit.scopes.local.site import LocalSite
from ltm_retrofit.scopes.watch import MaskWatch, unwatch, watch

Grid = tuple[int, int]


class Cells:
    """How the tokens of one tensor lie in cells: ``(R, N, C)`` to ``(R · cells, tokens of a cell, C)`` and back."""

    def __init__(self, count: int, lead: int, trail: int, grid: Grid, cell: Grid) -> None:
        self.lead, self.grid, self.cell = lead, grid, cell
        self.patches = count - lead - trail
        self.rest = self.patches % (cell[0] * cell[1]) + trail

    @property
    def per_row(self) -> int:
        """Return the number of cells of one sequence."""
        return self.patches // (self.cell[0] * self.cell[1])

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take leading tokens, those that are in cells, and the rest apart."""
        stop = x.shape[1] - self.rest
        return x[:, : self.lead], x[:, self.lead : stop], x[:, stop:]

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take leading tokens, cells and the rest apart."""
        lead, middle, rest = self.ends(x)
        (rows, columns), (h, w) = self.grid, self.cell
        if h == 1 and (columns % w or rows * columns != middle.shape[1]):
            cells = middle.reshape(-1, w, x.shape[-1])
        else:
            tiles = middle.reshape(x.shape[0], rows // h, h, columns // w, w, x.shape[-1])
            cells = tiles.transpose(2, 3).reshape(-1, h * w, x.shape[-1])
        return lead, cells, rest

    def together(self, lead: Tensor, cells: Tensor, rest: Tensor) -> Tensor:
        """Put back together what `apart` took apart."""
        (rows, columns), (h, w) = self.grid, self.cell
        batch = lead.shape[0]
        if h == 1 and (columns % w or rows * columns != self.per_row * w):
            middle = cells.reshape(batch, -1, cells.shape[-1])
        else:
            cells = cells.reshape(batch, rows // h, columns // w, h, w, cells.shape[-1])
            middle = cells.transpose(2, 3).reshape(batch, rows * columns, cells.shape[-1])
        return torch.cat([lead, middle, rest], dim=1)


class Open:
    """What the first module of a chain leaves for the last one: an attribute of the tensor that goes through."""

    NAME = "ltm_open"

    def __init__(self, cells: Cells, assignment: Assignment | DenseAssignment | GridAssignment, shape: tuple[int, ...]):
        self.cells, self.assignment, self.shape = cells, assignment, shape


class LocalForward(Interceptor):
    """Stands in for one module of a chain: the first merges, the last brings every token back.

    Args:
        block: the module it belongs to.
        site: the chain.
        host: the module on which the mask is registered.
        first: whether it is the first of the chain.
        last: whether it is the last one; both where the chain is one module.
        attention: the module before it, whose masks are watched.
    """

    def __init__(
        self, block: nn.Module, site: LocalSite, host: nn.Module, *, first: bool, last: bool, attention: nn.Module
    ) -> None:
        super().__init__(block, site.block)
        self.attention, self.watching = attention, MaskWatch(attention, site, self)
        self.keeper, self.first, self.last = host, first, last
        self.order, self.layout, self.cell, self.dim = site.layout.order, site.layout, site.cell, site.dim

    def put_in_place(self) -> None:
        """Intercept from now on."""
        super().put_in_place()
        watch(self.attention, self.watching)

    def take_away(self) -> None:
        """Leave the module and the attention as they were."""
        super().take_away()
        unwatch(self.attention)

    @property
    def host(self) -> nn.Module:
        """The first module of the chain, or one in it where that is a container."""
        return self.keeper

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module on merged tokens."""
        if self.mode != "merge":
            return self.original(x, *args, **kwargs)
        if self.first:
            x, opened = self.merge(x)
        else:
            opened = getattr(x, Open.NAME, None)
        out = self.original(x, *args, **kwargs)
        if opened is None:
            return out
        if not self.last:
            setattr(out, Open.NAME, opened)
            return out
        return self.unmerge(out, opened)

    def cells(self, count: int, spatial: tuple[int, ...]) -> Cells:
        """Lay tokens out in cells: those of the plan at the planned size, else those that fit the size in hand."""
        layout = self.layout
        planned = layout.grid
        assert planned is not None
        if count == layout.tokens and (len(spatial) != 2 or spatial == planned):
            return Cells(count, layout.prefix, layout.trail, planned, self.cell)
        patches = max(0, count - layout.prefix - layout.trail)
        side = round(patches**0.5)
        grid = (side, side) if side * side == patches else (1, patches)
        if len(spatial) == 2:
            grid = (spatial[0], spatial[1])
        return Cells(count, layout.prefix, layout.trail, grid, choose_cell(grid, self.dim))

    def merge(self, x: Tensor) -> tuple[Tensor, Open | None]:
        """Merge within cells; fewer tokens than can be merged go through as they are."""
        spatial = tuple(int(size) for size in spatial_of(tuple(x.shape), self.order))  # a trace has tensors there
        tokens = as_tokens(x, self.order)
        cells = self.cells(prod(spatial), spatial)
        if cells.per_row < 1 or cells.cell[0] * cells.cell[1] < 2:
            return x, None
        lead, middle, rest = cells.apart(tokens)
        mask = self.mask
        assert mask is not None
        # one descriptor for each sequence: how many of them (windows) an image has, another input size would change
        merged, _, step = mask(middle, middle, None, None, cells.per_row)
        if self.listener is not None:
            self.listener(self.name, step)
        merged = merged.reshape(tokens.shape[0], -1, merged.shape[-1])
        short = torch.cat([lead, merged, rest], dim=1)
        opened = Open(cells, step.assignment, spatial)
        return from_tokens(short, self.order, (*[1] * (len(spatial) - 1), short.shape[1])), opened

    def unmerge(self, out: Tensor, opened: Open) -> Tensor:
        """Give every token its group's result."""
        tokens = as_tokens(out, self.order)
        cells = opened.cells
        lead, middle, rest = cells.ends(tokens)
        middle = opened.assignment.unmerge(middle.reshape(-1, middle.shape[1] // cells.per_row, middle.shape[2]))
        return from_tokens(cells.together(lead, middle, rest), self.order, opened.shape)
