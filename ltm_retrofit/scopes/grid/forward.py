"""Scope GRID: a token map goes on smaller, both branches of every residual behind it with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ltm_retrofit.finding.layouts import as_tokens, from_tokens, spatial_of
from ltm_retrofit.merging.tokens import fixed
from ltm_retrofit.scopes.base import Interceptor
from ltm_retrofit.scopes.grid.site import GridSite


class GridForward(Interceptor):
    """Stands in for one module: its input or its output is merged into a smaller map.

    Args:
        block: the module it belongs to.
        site: what was found of it.
        grid: height and width of the map that arrives, at the planned size.
    """

    def __init__(self, block: nn.Module, site: GridSite, grid: tuple[int, int]) -> None:
        super().__init__(block, site.block)
        self.order, self.where, self.grid = site.layout.order, site.where, grid

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        if self.mode != "merge":
            return self.original(x, *args, **kwargs)
        if self.where == "input":
            return self.original(self.merge(x), *args, **kwargs)
        return self.merge(self.original(x, *args, **kwargs))

    def merge(self, x: Tensor) -> Tensor:
        """Merge a map into a smaller one."""
        height, width = (fixed(size) for size in spatial_of(tuple(x.shape), self.order))
        mask = self.mask
        assert mask is not None
        merged, grid, merge = mask(as_tokens(x, self.order), (height, width))
        self.tell(merge)
        return from_tokens(merged, self.order, grid)
