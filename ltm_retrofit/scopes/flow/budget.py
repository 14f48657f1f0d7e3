"""Scope FLOW: tokens stay merged, so every block after a site costs less."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import ceil

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.partition import merge_macs, partition, unmerge_macs
from ltm_retrofit.scopes.flow.site import FlowSite
from ltm_retrofit.scopes.rows import CLUSTERS, Option, Row


class FlowBudget:
    """Costs of token counts, and the search for those that meet a budget."""

    def __init__(self, sites: Sites, config: LTMConfig) -> None:
        self.sites, self.config, self.blocks = sites, config, sites.flow
        self.tokens, self.prefix = self.blocks[0].layout.tokens, self.blocks[0].layout.prefix
        self.slices = sites.ending.prefix_only and config.output_tokens == "auto"
        #: a slice after the last attention, or no back half there, leaves nothing for a mask to do
        idle = self.slices or self.blocks[-1].cost.back[1] == 0
        self.mergeable = list(self.blocks)[:-1] if idle else list(self.blocks)
        if config.sites is not None:
            self.mergeable = [site for site in self.mergeable if site.block in config.sites]

    def scheduled(self) -> list[FlowSite]:
        """Return the sites of the schedule, or all that the user named."""
        if self.config.sites is not None:
            return self.mergeable
        depth = len(self.blocks)
        chosen = {self.blocks[depth * quarter // 4].block for quarter in (1, 2, 3)}
        return [site for site in self.mergeable if site.block in chosen]

    def rows(self, counts: Mapping[str, int]) -> tuple[Row, ...]:
        """Turn counts after sites into rows; a site that merges nothing has none."""
        rows, present = [], self.tokens
        for site in self.blocks:
            after = min(counts.get(site.block, present), present)
            if after < present:
                rows.append(Row(site.block, site.scope.value, present, after))
                present = after
        if self.slices:
            last = self.blocks[-1]
            rows.append(Row(last.block, last.scope.value, present, self.prefix, "slice"))
        return tuple(rows)

    def change(self, rows: Iterable[Row]) -> int:
        """Return by how many MACs rows change the model, masks included."""
        todo, present, total = {row.site: row for row in rows}, self.tokens, 0
        if not todo:
            return 0
        for site in self.blocks:
            row = todo.get(site.block)
            after = row.tokens_out if row else present
            total += site.cost(present, after) - site.cost(self.tokens, self.tokens)
            if row is not None and row.action == "merge":
                total += merge_macs(
                    self.config.method,
                    site.dim,
                    site.key_dim,
                    row.tokens_in,
                    row.tokens_out,
                    self.prefix,
                    max(1, self.sites.ending.classes),
                    CLUSTERS,
                )
                if not self.slices:
                    total += unmerge_macs(self.config.method, site.dim, row.tokens_in, row.tokens_out, self.prefix)
            present = after
        return total + (self.sites.ending.prefix_macs if self.slices else 0)

    def from_tokens(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """Take the user's counts, one for each scheduled or named site (or for every block)."""
        tokens = list(tokens)
        chosen = self.scheduled()
        if self.slices and len(tokens) in (len(chosen) + 1, len(self.mergeable) + 1) and tokens[-1] == self.prefix:
            tokens.pop()  # the slice, said aloud
        if len(tokens) == len(self.mergeable):
            chosen = self.mergeable
        if len(tokens) != len(chosen):
            raise CountError(
                f"tokens has {len(tokens)} counts; expected {len(chosen)}, one after each of "
                f"{', '.join(site.block for site in chosen)}, or {len(self.mergeable)}, one after each block that can "
                "be cut. Name other blocks in sites="
            )
        present = self.tokens
        for site, count in zip(chosen, tokens, strict=True):
            if count > present:
                raise CountError(f"{site.block} has {present} tokens, so {count} cannot be left")
            if self.config.method != "slice":
                partition(present, count, self.prefix)
            elif count < max(1, self.prefix):
                raise CountError(f"{site.block}: slicing to {count} tokens would cut prefix tokens ({self.prefix})")
            present = count
        rows = self.rows(dict(zip((site.block for site in chosen), tokens, strict=True)))
        if not rows:
            raise CountError(f"tokens={tuple(tokens)} merges nothing: {self.tokens} tokens are all there are")
        return rows

    def search(self, change: int) -> Iterator[list[Option]]:
        """Yield plans near a budget, for the schedule's sites first and then for more and more of them."""
        for chosen in self._widening():
            yield list(self._around(chosen, change))

    def _widening(self) -> Iterator[list[FlowSite]]:
        chosen = self.scheduled()
        yield chosen
        for site in [] if self.config.sites is not None else self.mergeable:
            if site not in chosen:
                chosen = [other for other in self.mergeable if other in chosen or other is site]
                yield chosen

    def _around(self, chosen: Sequence[FlowSite], limit: int) -> Iterator[Option]:
        """Go through one keep ratio for all sites, then through the neighbours of the best."""
        patches, seen = self.tokens - self.prefix, dict[tuple[Row, ...], tuple[int, tuple[int, ...]]]()

        def consider(counts: tuple[int, ...]) -> Iterator[Option]:
            rows = self.rows({site.block: count for site, count in zip(chosen, counts, strict=True)})
            if rows and rows not in seen:
                macs = self.change(rows)
                seen[rows] = macs, counts
                if macs < 0:
                    yield rows, macs

        for step in range(4 * patches, 0, -max(1, patches // 256)):
            counts, present = [], patches
            for _ in chosen:
                present = ceil(present * step / (4 * patches))
                counts.append(present + self.prefix)
            yield from consider(tuple(counts))
        below = [(macs, counts) for macs, counts in seen.values() if macs <= limit]
        if not below:
            return
        _, best = max(below)
        moves = range(-2, 4) if len(chosen) <= 4 else range(0, 2)
        for move in product(moves, repeat=min(len(chosen), 4)):
            around = [count + shift for count, shift in zip(best, (*move, *[0] * len(best)), strict=False)]
            if all(a >= b for a, b in zip([self.tokens, *around], [*around, self.prefix + 1], strict=True)):
                yield from consider(tuple(around))
