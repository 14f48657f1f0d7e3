"""Scope GRID: the network runs on a smaller map from a site on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations_with_replacement

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import CountError, RecipeError
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.grid import grid_macs
from ltm_retrofit.scopes.grid.site import GridSite, smaller
from ltm_retrofit.scopes.rows import CLUSTERS, Option, Row

Grid = tuple[int, int]


class GridBudget:
    """Costs of grids, and the search for those that meet a budget."""

    def __init__(self, sites: Sites, config: LTMConfig) -> None:
        self.config, self.classes, self.points = config, max(1, sites.ending.classes), sites.grid
        named = config.sites
        self.blocks = [site for site in self.points if named is None or site.block in named]
        if config.method == "tome" and self.blocks:
            raise RecipeError(
                "method='tome' matches tokens one by one and leaves no grid: use method='pool' or 'slice' to compare "
                "with in scope GRID, or scope='LOCAL'"
            )
        first = self.points[0]
        assert first.layout.grid is not None
        self.shares = sorted((Fraction(grid[0], first.layout.grid[0]) for grid in first.segment), reverse=True)[1:]

    def scheduled(self) -> list[GridSite]:
        """Return the sites of the schedule, or all that the user named."""
        if self.config.sites is not None:
            return self.blocks
        depth = len(self.blocks)
        return [self.blocks[place] for place in sorted({depth * quarter // 4 for quarter in (1, 2, 3)})]

    def rows(self, shares: Mapping[str, Fraction]) -> tuple[Row, ...]:
        """Turn the share of rows and columns after sites into rows; a site that merges nothing has none."""
        rows, present = [], Fraction(1)
        for site in self.points:
            grid = site.layout.grid
            assert grid is not None
            after = min(shares.get(site.block, present), present)
            (h, w), (kept_h, kept_w) = smaller(grid, present), smaller(grid, after)
            if kept_h * kept_w < h * w:
                rows.append(Row(site.block, site.scope.value, h * w, kept_h * kept_w, grid=(kept_h, kept_w)))
            present = after
        return tuple(rows)

    def change(self, rows: Sequence[Row]) -> int:
        """Return by how many MACs rows change the model, masks included."""
        todo, total, share = {row.site: row for row in rows}, 0, Fraction(1)
        for site in self.points:
            grid = site.layout.grid
            assert grid is not None
            present = smaller(grid, share)
            row = todo.get(site.block)
            if row is not None:
                assert row.grid is not None
                if row.tokens_in != present[0] * present[1]:
                    raise CountError(f"{site.block}: {present[0]}×{present[1]} tokens arrive, not {row.tokens_in}")
                share = Fraction(row.grid[0], grid[0])
                total += grid_macs(
                    self.config.method, site.dim, site.key_dim, present, row.grid, self.classes, CLUSTERS
                )
                present = row.grid
            if present not in site.segment:
                raise CountError(
                    f"{site.block}: a grid of {present[0]}×{present[1]} was not proven; proven are "
                    + ", ".join(f"{h}×{w}" for h, w in sorted(site.segment, reverse=True))
                )
            total += site.segment[present] - site.segment[grid]
        return total

    def from_tokens(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """Take the user's counts, one for each scheduled or named site (or for every one)."""
        chosen = self.scheduled()
        if len(tokens) == len(self.blocks):
            chosen = self.blocks
        if len(tokens) != len(chosen):
            raise CountError(
                f"tokens has {len(tokens)} counts; expected {len(chosen)}, one after each of "
                f"{', '.join(site.block for site in chosen)}, or {len(self.blocks)}, one for each grid"
            )
        shares: dict[str, Fraction] = {}
        for site, count in zip(chosen, tokens, strict=True):
            grid = site.layout.grid
            assert grid is not None
            sizes = {h * w: Fraction(h, grid[0]) for h, w in site.segment}
            if count not in sizes:
                raise CountError(
                    f"{site.block}: {count} tokens are no grid that was proven; choose from "
                    + ", ".join(f"{h * w} ({h}×{w})" for h, w in sorted(site.segment, reverse=True))
                )
            shares[site.block] = sizes[count]
        rows = self.rows(shares)
        if not rows:
            raise CountError(f"tokens={tuple(tokens)} merges nothing")
        return rows

    def search(self, change: int) -> Iterator[list[Option]]:
        """Yield all sizes for the schedule's sites, then for more and more of them, the first ones first."""
        chosen = self.scheduled()
        yield list(self._all(chosen))
        for site in [] if self.config.sites is not None else self.blocks:
            if site not in chosen:
                chosen = [other for other in self.blocks if other in chosen or other is site]
                yield list(self._all(chosen[:4]))

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
