"""Scope LOCAL: each MLP (or attention) sees fewer tokens; nothing else changes, so savings add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

import torch

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import Place, Scope
from ltm_retrofit.scopes.base import Budget, Made, Option, Row, made
from ltm_retrofit.scopes.local.site import LocalSite, cells_of

#: a row, or None where nothing is merged, and by how many MACs it changes the model
Rung = tuple[Row | None, int]


def place_of(site: LocalSite, row: Row, of: Made, dtype: torch.dtype | None = None) -> Place:
    """Say to a method where a row's mask works: in each cell of a sequence.

    Raises:
        CountError: where the row's counts are not those of whole cells.
    """
    count, size, rest = cells_of(site)
    kept, left = divmod(row.tokens_out - rest, count)
    if left or not 1 <= kept <= size or row.tokens_in != site.layout.tokens:
        raise CountError(
            f"{site.block}: {row.tokens_in} → {row.tokens_out} tokens do not fit {count} cells of {size} tokens "
            f"({rest} others stay): choose {rest} + {count}·k with k from 1 to {size}"
        )
    cell = Place(site.scope, site.dim, site.key_dim, size, kept, rounds=row.rounds, dtype=dtype, **made(of))
    return replace(cell, cells=count, width=site.width)


class LocalBudget(Budget[LocalSite]):
    """Costs of counts in cells, and the search for those that meet a budget."""

    def __init__(self, sites: Sites, config: LTMConfig) -> None:
        order = list(dict.fromkeys(site.attention for site in sites.of(Scope.LOCAL)))  # of the model
        blocks = sorted(sites.of(Scope.LOCAL), key=lambda site: (order.index(site.attention), not site.mixes))
        super().__init__(sites, config, blocks, blocks)
        # attentions see merged tokens where the user names them, or where MLPs alone would keep few of theirs
        behind = [site for site in self.mergeable if not site.mixes]
        self.chosen = self.mergeable if config.sites is not None else behind or self.mergeable

    def cost(self, site: LocalSite, row: Row) -> int:
        """Return by how many MACs a row changes the model."""
        place, (_, linear, square) = place_of(site, row, self), site.cost
        if row.tokens_out == row.tokens_in:
            return 0
        saved = linear * (row.tokens_in - row.tokens_out) + square * (row.tokens_in**2 - row.tokens_out**2)
        return site.layout.sequences * (self.method.macs(place) + self.method.unmerge_macs(place) - saved)

    def change(self, rows: Sequence[Row]) -> int:
        """Return by how many MACs rows change the model, masks included."""
        named = {site.block: site for site in self.mergeable}
        return sum(self.cost(named[row.site], row) for row in rows)

    def from_tokens(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """Take the user's counts, one for each site."""
        rows = []
        for site, count in self.counted(tokens, self.chosen):
            row = Row(site.block, site.scope.value, site.layout.tokens, count, rounds=self.rounds)
            self.method.macs(place_of(site, row, self))  # refuses counts that cannot be
            if row.tokens_out < row.tokens_in:
                rows.append(row)
        return tuple(rows)

    def search(self, change: int) -> Iterator[list[Option]]:
        """Yield one keep ratio for all sites, then the plan in which the first ones keep more.

        MLPs alone as long as they keep half of their tokens, then with attentions, then MLPs alone down to one token.
        Why not MLPs alone: a small MobileViT that keeps 74 % of its MACs (docs/results.md) has 97.3 % before any tuning
        with attentions; MLPs alone would keep 2 to 4 of 64 tokens.
        """
        if len(self.chosen) < len(self.mergeable):
            yield list(self._around(self.chosen, change, least=0.5))
            yield list(self._around(self.mergeable, change))
        yield list(self._around(self.chosen, change))

    def _around(self, blocks: Sequence[LocalSite], change: int, least: float = 0.0) -> Iterator[Option]:
        ladders = [self._ladder(site) for site in blocks]
        steps = max((cells_of(site)[1] for site in blocks), default=0)
        before = [ladder[0] for ladder in ladders]
        for step in range(steps - 1, max(1, ceil(least * steps)) - 1, -1):
            present = [_at(ladder, step / steps) for ladder in ladders]
            yield _option(present)
            if sum(cost for _, cost in present) <= change:
                for index in range(len(present)):  # the first sites, whose tokens are not mixed yet, keep more
                    mixed = [*before[: index + 1], *present[index + 1 :]]
                    if sum(cost for _, cost in mixed) > change:
                        break
                    yield _option(mixed)
                return
            before = present

    def _ladder(self, site: LocalSite) -> list[Rung]:
        """Return the rows of a site by falling cost, each keeping fewer tokens than the one before."""
        count, size, rest = cells_of(site)
        ladder: list[Rung] = [(None, 0)]
        for kept in range(size - 1, 0, -1):
            counts = (count * size + rest, count * kept + rest)
            row = Row(site.block, site.scope.value, *counts, rounds=self.rounds)
            if (cost := self.cost(site, row)) < ladder[-1][1]:  # merging a few tokens may cost more than it saves
                ladder.append((row, cost))
        return ladder


def _at(ladder: list[Rung], share: float) -> Rung:
    """Return the rung that keeps at least this share of the tokens, the cheapest of those."""
    return [rung for rung in ladder if rung[0] is None or rung[0].tokens_out >= ceil(share * rung[0].tokens_in - 1e-9)][
        -1
    ]


def _option(rungs: Sequence[Rung]) -> Option:
    return tuple(row for row, _ in rungs if row is not None), sum(cost for _, cost in rungs)
