"""Scope GRID: the network runs on a smaller map from a site on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations_with_replacement
from math import prod
from typing import Any

import torch

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import Grid, Place, Scope
from ltm_retrofit.scopes.base import Budget, Made, Option, Row, made
from ltm_retrofit.scopes.grid.site import GridSite, smaller

#: sites that merge together in a plan that adds some to the schedule's: more would take too long to go through
MOST = 4


def place_of(site: GridSite, row: Row, of: Made, dtype: torch.dtype | None = None) -> Place:
    """Say to a method where a row's mask works."""
    # earlier sites have made the map smaller: it is the one of the proven ones that has as many tokens
    grid = next(grid for grid in sorted(site.segment) if prod(grid) == row.tokens_in)
    counts = (row.tokens_in, row.tokens_out)
    return Place(site.scope, site.dim, site.key_dim, *counts, grid=grid, grid_out=row.grid, dtype=dtype, **made(of))


def grid_of(site: GridSite) -> Grid:
    """Return the site's map before anything is merged."""
    assert site.layout.grid is not None
    return site.layout.grid


class GridBudget(Budget[GridSite]):
    """Costs of grids, and the search for those that meet a budget."""

    def __init__(self, sites: Sites, config: LTMConfig) -> None:
        super().__init__(sites, config, sites.of(Scope.GRID), sites.of(Scope.GRID))
        first = self.blocks[0]
        self.shares = sorted((Fraction(grid[0], grid_of(first)[0]) for grid in first.segment), reverse=True)[1:]

    def rank(self, option: Option) -> Any:
        """Prefer a mild step early to a harsh one late: a map of 4×4 that becomes 2×2 has lost what it had to say."""
        return min(row.tokens_out / row.tokens_in for row in option[0]), option[1]

    def rows(self, shares: Mapping[str, Fraction]) -> tuple[Row, ...]:
        """Turn the share of height and width after sites into rows; a site that merges nothing has none."""
        rows, present = [], Fraction(1)
        for site in self.blocks:
            after = min(shares.get(site.block, present), present)
            grid, grid_out = (smaller(grid_of(site), share) for share in (present, after))
            if prod(grid_out) < prod(grid):
                rows.append(Row(site.block, site.scope.value, prod(grid), prod(grid_out), grid=grid_out))
            present = after
        return tuple(rows)

    def change(self, rows: Sequence[Row]) -> int:
        """Return by how many MACs rows change the model, masks included."""
        todo, total, share = {row.site: row for row in rows}, 0, Fraction(1)
        for site in self.blocks:
            present = smaller(grid_of(site), share)
            row = todo.get(site.block)
            if row is not None:
                assert row.grid is not None
                if row.tokens_in != prod(present):
                    raise CountError(f"{site.block}: {present[0]}×{present[1]} tokens arrive, not {row.tokens_in}")
                self._check_proven(site, present)
                total += self.method.macs(place_of(site, row, self))
                share, present = Fraction(row.grid[0], grid_of(site)[0]), row.grid
            self._check_proven(site, present)
            total += site.segment[present] - site.segment[grid_of(site)]
        return total

    def _check_proven(self, site: GridSite, grid: Grid) -> None:
        if grid not in site.segment:
            raise CountError(f"{site.block}: a grid of {grid[0]}×{grid[1]} was not proven; proven are {_proven(site)}")

    def from_tokens(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """Take the user's counts, one for each scheduled or named site (or for every one)."""
        shares: dict[str, Fraction] = {}
        for site, count in self.counted(tokens, self.scheduled()):
            sizes = {h * w: Fraction(h, grid_of(site)[0]) for h, w in site.segment}
            if count not in sizes:
                raise CountError(
                    f"{site.block}: {count} tokens are no grid that was proven; choose from {_proven(site)}"
                )
            shares[site.block] = sizes[count]
        return self.rows(shares)

    def search(self, change: int) -> Iterator[list[Option]]:
        """Yield all sizes for the schedule's sites, then for more and more of them, the first ones first."""
        for place, chosen in enumerate(self.widening()):
            yield list(self._all(chosen[:MOST] if place else chosen))

    def _all(self, chosen: Sequence[GridSite]) -> Iterator[Option]:
        seen: set[tuple[Row, ...]] = set()
        for shares in combinations_with_replacement([Fraction(1), *self.shares], len(chosen)):
            rows = self.rows(dict(zip((site.block for site in chosen), shares, strict=True)))
            if rows and rows not in seen:
                seen.add(rows)
                try:
                    change = self.change(rows)
                except CountError:  # a size that rounding made, and nothing has proven
                    continue
                if change < 0:
                    yield rows, change


def _proven(site: GridSite) -> str:
    return ", ".join(f"{h * w} ({h}×{w})" for h, w in sorted(site.segment, reverse=True))
