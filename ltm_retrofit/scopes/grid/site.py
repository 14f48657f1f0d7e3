"""A module whose input or output is the token map, after which all runs on a smaller one. Data and no search."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ltm_retrofit.finding.sites import AttentionSite

Grid = tuple[int, int]  # height and width of a map


@dataclass(frozen=True, kw_only=True)
class GridSite(AttentionSite):
    """A module whose 4-d input or output is the token map, after which the network runs on a smaller grid.

    ``segment`` holds the MACs from here to the next grid site, or to the end, by the grid that enters it.
    """

    where: str  # merge its "input" or its "output"
    weight: str  # the parameter that reads the map, below the model
    segment: dict[Grid, int]

    @property
    def grid(self) -> Grid:
        """Height and width of the map as it is in the original."""
        assert self.layout.grid is not None
        return self.layout.grid


def smaller(grid: Grid, share: Fraction) -> Grid:
    """Return the grid that keeps this share of height and width, rounded up."""
    return -int(-grid[0] * share // 1), -int(-grid[1] * share // 1)
