"""Scope FLOW: tokens stay merged, so every block after a site costs less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import ceil

import torch

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import Place, Scope
from ltm_retrofit.scopes.base import Budget, Made, Option, Row, made
from ltm_retrofit.scopes.flow.allocate import Curve, allocate, levels
from ltm_retrofit.scopes.flow.site import FlowSite


def place_of(site: FlowSite, row: Row, of: Made, dtype: torch.dtype | None = None) -> Place:
    """Say to a method where a row's mask works."""
    counts = (row.tokens_in, row.tokens_out, site.layout.prefix)
    return Place(site.scope, site.dim, site.key_dim, *counts, rounds=row.rounds, dtype=dtype, **made(of))


#: shares of the patches that a site alone leaves, when what it loses is measured
PROBED = (0.75, 0.5, 0.3, 0.15)
#: share of the MACs below which the first block merges as well
LITTLE = 0.45


class FlowBudget(Budget[FlowSite]):
    """Costs of token counts, and the search for those that meet a budget."""

    def __init__(self, sites: Sites, config: LTMConfig) -> None:
        blocks = sites.of(Scope.FLOW)
        self.slices = sites.ending.prefix_only and config.output_tokens == "auto"
        # a slice after the last attention, or no MLP behind it, leaves nothing for a mask to do there
        idle = self.slices or blocks[-1].cost.back[1] == 0
        super().__init__(sites, config, blocks, blocks[:-1] if idle else blocks)
        self.tokens, self.prefix = blocks[0].layout.tokens, blocks[0].layout.prefix
        self.prefix_macs = sites.ending.prefix_macs

    def scheduled(self) -> list[FlowSite]:
        """Return the sites of the schedule, or all that the user named.

        Many mild merges lose less than few harsh ones, but each costs a matching: five in twelve blocks are where more
        bring little (docs/real.md). They lie evenly spread before the last two blocks, where a merge saves least, and
        begin with the first one where little shall be left: later merges alone would have to join what differs.
        """
        if self.config.sites is not None or self.config.schedule not in ("auto", "calibrated"):
            return super().scheduled()
        depth = len(self.blocks)
        if self.config.tokens is not None:
            count = len(self._merging(self.config.tokens))
            chosen = {self.blocks[depth * place // (count + 1)].block for place in range(1, count + 1)}
        else:
            count = ceil(5 * depth / 12)
            places = {max(0, round((depth - 2) * place / count) - 1) for place in range(1, count + 1)}
            early = min(places) if self.config.flops is not None and self.config.flops < LITTLE else 0
            chosen = {self.blocks[place - early].block for place in places}
        return [site for site in self.mergeable if site.block in chosen]

    def rows(self, counts: Mapping[str, int]) -> tuple[Row, ...]:
        """Turn counts after sites into rows; a site that merges nothing has none."""
        rows, present = [], self.tokens
        for site in self.blocks:
            after = min(counts.get(site.block, present), present)
            if after < present:
                rows.append(Row(site.block, site.scope.value, present, after, rounds=self.rounds))
                present = after
        if self.slices:
            last = self.blocks[-1]
            rows.append(Row(last.block, last.scope.value, present, self.prefix, "slice"))
        return tuple(rows)

    def chained(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """Return rows that were edited, each with as many tokens as the one before leaves."""
        todo, present, chain = {row.site: row for row in rows}, self.tokens, []
        for site in self.blocks:
            if (row := todo.get(site.block)) is not None:
                chain.append(replace(row, tokens_in=present))
                if row.tokens_out > present:
                    raise CountError(
                        f"{row.site}: {present} tokens arrive, so {row.tokens_out} cannot be left: choose at most that"
                    )
                present = row.tokens_out
        return tuple(chain)

    def change(self, rows: Sequence[Row]) -> int:
        """Return by how many MACs rows change the model, masks included."""
        todo, present, total = {row.site: row for row in rows}, self.tokens, 0
        if not todo:
            return 0
        for site in self.blocks:
            row = todo.get(site.block)
            after = row.tokens_out if row else present
            total += site.cost(present, after) - site.cost(self.tokens, self.tokens)
            total += self._mask_macs(site, row) if row is not None else 0
            present = after
        return total + (self.prefix_macs if self.slices else 0)

    def from_tokens(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """Take the user's counts, one for each scheduled or named site (or for every block)."""
        pairs, present = self.counted(self._merging(tokens), self.scheduled()), self.tokens
        for site, count in pairs:
            if count > present:
                raise CountError(f"{site.block} has {present} tokens, so {count} cannot be left")
            row = Row(site.block, site.scope.value, present, count, rounds=self.rounds)
            self.method.macs(place_of(site, row, self))  # refuses counts that cannot be
            present = count
        return self.rows({site.block: count for site, count in pairs})

    def _merging(self, tokens: Sequence[int]) -> Sequence[int]:
        """Leave out a last count that says the slice aloud."""
        return tokens[:-1] if self.slices and tokens[-1] == self.prefix else tokens

    def search(self, change: int) -> Iterator[list[Option]]:
        """Yield plans near a budget, for the schedule's sites first and then for more and more of them."""
        for chosen in self.widening():
            yield list(self._around(chosen, change))

    def probes(self) -> list[tuple[Row, ...]]:
        """Return for each site that may merge, alone, a few counts."""
        patches = self.tokens - self.prefix
        counts = sorted({self.prefix + max(1, round(share * patches)) for share in PROBED}, reverse=True)
        return [self.rows({site.block: count}) for site in self.mergeable for count in counts if count < self.tokens]

    def allocated(self, change: int, losses: Mapping[tuple[Row, ...], float]) -> list[Option]:
        """Return for each number of sites, up to that of the schedule, the plan that should lose least."""
        measured: dict[str, dict[int, float]] = {site.block: {} for site in self.mergeable}
        for rows, loss in losses.items():
            measured[rows[0].site][rows[0].tokens_out] = loss
        curves = {block: Curve(self.tokens, points) for block, points in measured.items()}
        saving = -change + (self.prefix_macs if self.slices else 0)
        most = len(self.mergeable if self.config.sites is not None else self.scheduled())
        found = allocate(self.blocks, curves, self._price, levels(self.tokens, self.prefix), saving, most)
        return [(rows, self.change(rows)) for rows in map(self.rows, found)]

    def _price(self, site: FlowSite, before: int, after: int) -> int:
        """Return what a block costs with ``before`` tokens and ``after``, less what it costs in the original."""
        last = self.slices and site is self.blocks[-1]
        macs = site.cost(before, self.prefix if last else after) - site.cost(self.tokens, self.tokens)
        return macs + self._mask_macs(site, Row(site.block, site.scope.value, before, after, rounds=self.rounds))

    def _mask_macs(self, site: FlowSite, row: Row) -> int:
        """Return what a row's mask costs."""
        if row.slices or row.tokens_out == row.tokens_in:
            return 0
        place = place_of(site, row, self)
        # where only prefix tokens are left in the end, nothing is brought back
        return self.method.macs(place) + (0 if self.slices else self.method.unmerge_macs(place))

    def near(self, rows: tuple[Row, ...], change: int) -> list[Option]:
        """Return plans in which one site keeps more or fewer tokens, or lies one block aside, and the last makes up."""
        places = {site.block: place for place, site in enumerate(self.blocks)}
        merging = [(places[row.site], row.tokens_out) for row in rows if not row.slices]
        moved = list[list[tuple[int, int]]]()
        for index, (place, count) in enumerate(merging):
            for shift in (-1, 1):
                moved.append([*merging[:index], (place + shift, count), *merging[index + 1 :]])
            for factor in (0.9, 1.1):
                fewer = round(self.prefix + factor * (count - self.prefix))
                moved.append([*merging[:index], (place, fewer), *merging[index + 1 :]])
        return [option for each in moved if (option := self._settled(each, change)) is not None]

    def _settled(self, merging: Sequence[tuple[int, int]], change: int) -> Option | None:
        """Scale the counts of a plan so that it just meets the budget; None where no scale does."""
        allowed = {site.block for site in self.mergeable}
        blocks = [self.blocks[place].block for place, _ in merging if 0 <= place < len(self.blocks)]
        if len(set(blocks)) < len(merging) or not allowed.issuperset(blocks):
            return None
        for percent in range(130, 60, -1):
            counts = [self.prefix + max(1, (count - self.prefix) * percent // 100) for _, count in merging]
            rows = self.rows(dict(zip(blocks, counts, strict=True)))
            if (macs := self.change(rows)) <= change:
                return rows, macs
        return None

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

        # at most 1024 ratios: with many patches neighbouring ones cost almost the same
        for step in range(4 * patches, 0, -max(1, patches // 256)):
            counts, present = [], patches
            for _ in chosen:
                present = ceil(present * step / (4 * patches))
                counts.append(present + self.prefix)
            yield from consider(tuple(counts))
        below = [(macs, counts) for macs, counts in seen.values() if macs <= limit]
        if not below:
            return
        # one ratio for all makes coarse steps where there are few tokens; a token more or less at a site is finer
        _, best = max(below)
        moves = range(-2, 4) if len(chosen) <= 4 else range(0, 2)
        for move in product(moves, repeat=min(len(chosen), 4)):
            around = [count + shift for count, shift in zip(best, (*move, *[0] * len(best)), strict=False)]
            if all(a >= b for a, b in zip([self.tokens, *around], [*around, self.prefix + 1], strict=True)):
                yield from consider(tuple(around))
