"""Scope LOCAL: each MLP (or attention) sees fewer tokens; nothing else changes, so savings add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.partition import merge_macs, partition, unmerge_macs
from ltm_retrofit.scopes.local.site import LocalSite
from ltm_retrofit.scopes.rows import CLUSTERS, Option, Row


def cells_of(site: LocalSite) -> tuple[int, int, int]:
    """Return the number of cells of one sequence, the tokens in each, and those that no cell holds."""
    size = site.cell[0] * site.cell[1]
    patches = site.layout.tokens - site.layout.prefix - site.layout.trail
    return patches // size, size, site.layout.tokens - patches // size * size


class LocalBudget:
    """Costs of counts in cells, and the search for those that meet a budget."""

    def __init__(self, sites: Sites, config: LTMConfig, blocks: Sequence[LocalSite]) -> None:
        self.config, self.classes = config, max(1, sites.ending.classes)
        order = list(dict.fromkeys(site.attention for site in blocks))  # of the model; an attention before its MLP
        blocks = sorted(blocks, key=lambda site: (order.index(site.attention), not site.mixes))
        self.blocks = [site for site in blocks if config.sites is None or site.block in config.sites]
        #: attentions see merged tokens where the user names them, or where MLPs alone would keep few of theirs
        behind = [site for site in self.blocks if not site.mixes]
        self.chosen = self.blocks if config.sites is not None else behind or self.blocks

    def row(self, site: LocalSite, kept: int) -> Row:
        """Return the row that keeps ``kept`` tokens of each cell."""
        count, size, rest = cells_of(site)
        return Row(site.block, site.scope.value, count * size + rest, count * kept + rest)

    def kept(self, site: LocalSite, row: Row) -> int:
        """Return how many tokens of each cell a row keeps.

        Raises:
            CountError: where its counts are not those of whole cells.
        """
        count, size, rest = cells_of(site)
        kept, left = divmod(row.tokens_out - rest, count)
        if left or not 1 <= kept <= size or row.tokens_in != site.layout.tokens:
            raise CountError(
                f"{site.block}: {row.tokens_in} → {row.tokens_out} tokens do not fit {count} cells of {size} tokens "
                f"({rest} others stay): choose {rest} + {count}·k with k from 1 to {size}"
            )
        return kept

    def cost(self, site: LocalSite, kept: int) -> int:
        """Return by how many MACs keeping ``kept`` tokens of each cell changes the model."""
        count, size, rest = cells_of(site)
        if kept == size:
            return 0
        _, linear, square = site.cost
        before, after = (count * each + rest for each in (size, kept))
        saved = linear * (before - after) + square * (before**2 - after**2)
        method, cells = self.config.method, count * site.layout.sequences
        once = merge_macs(method, site.dim, site.key_dim, size, kept, 0, self.classes, 0)
        once += unmerge_macs(method, site.width, size, kept, 0)
        step = 2 * CLUSTERS * (site.dim + self.classes) if method == "ltm" else 0  # of each sequence
        return cells * once + site.layout.sequences * (step - saved)

    def change(self, rows: Sequence[Row]) -> int:
        """Return by how many MACs rows change the model, masks included."""
        named = {site.block: site for site in self.blocks}
        return sum(self.cost(named[row.site], self.kept(named[row.site], row)) for row in rows)

    def from_tokens(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """Take the user's counts, one for each site."""
        if len(tokens) != len(self.chosen):
            raise CountError(
                f"tokens has {len(tokens)} counts; expected {len(self.chosen)}, one for each of "
                f"{', '.join(site.block for site in self.chosen)}. Name fewer blocks in sites="
            )
        rows = []
        for site, count in zip(self.chosen, tokens, strict=True):
            row = Row(site.block, site.scope.value, site.layout.tokens, count)
            partition(cells_of(site)[1], self.kept(site, row), 0)
            if row.tokens_out < row.tokens_in:
                rows.append(row)
        if not rows:
            raise CountError(f"tokens={tuple(tokens)} merges nothing")
        return tuple(rows)

    def search(self, change: int) -> Iterator[list[Option]]:
        """Yield one keep ratio for all sites, then the plan in which the first ones keep more.

        MLPs alone as long as they keep half of their tokens, then with attentions, then MLPs alone down to one token.
        Why not MLPs alone: a small MobileViT that keeps 74 % of its MACs (docs/results.md) has 97.3 % before any tuning
        with attentions; MLPs alone would keep 2 to 4 of 64 tokens.
        """
        if len(self.chosen) < len(self.blocks):
            yield list(self._around(self.chosen, change, least=0.5))
            yield list(self._around(self.blocks, change))
        yield list(self._around(self.chosen, change))

    def _around(self, blocks: Sequence[LocalSite], change: int, least: float = 0.0) -> Iterator[Option]:
        ladders = [self._ladder(site) for site in blocks]
        steps = max((cells_of(site)[1] for site in blocks), default=0)
        before = [ladder[0] for ladder in ladders]
        for step in range(steps - 1, max(1, ceil(least * steps)) - 1, -1):
            present = [self._at(ladder, step / steps) for ladder in ladders]
            yield self._option(present)
            if sum(cost for _, cost in present) <= change:
                for index in range(len(present)):  # the first sites, whose tokens are not mixed yet, keep more
                    mixed = [*before[: index + 1], *present[index + 1 :]]
                    if sum(cost for _, cost in mixed) > change:
                        break
                    yield self._option(mixed)
                return
            before = present

    def _ladder(self, site: LocalSite) -> list[tuple[Row | None, int]]:
        """Return the rows of a site by falling cost, each keeping fewer tokens than the one before."""
        ladder: list[tuple[Row | None, int]] = [(None, 0)]
        for kept in range(cells_of(site)[1] - 1, 0, -1):
            cost = self.cost(site, kept)
            if cost < ladder[-1][1]:
                ladder.append((self.row(site, kept), cost))
        return ladder

    def _at(self, ladder: list[tuple[Row | None, int]], share: float) -> tuple[Row | None, int]:
        """Return the rung that keeps at least this share of the tokens, the cheapest of those."""
        allowed = [
            rung for rung in ladder if rung[0] is None or rung[0].tokens_out >= ceil(share * rung[0].tokens_in - 1e-9)
        ]
        return allowed[-1]

    def _option(self, rungs: Sequence[tuple[Row | None, int]]) -> Option:
        return tuple(row for row, _ in rungs if row is not None), sum(cost for _, cost in rungs)
