"""sites + config → plan: which site keeps how many tokens, and what that costs. Printable, JSON, the saved artefact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from itertools import product
from math import ceil
from typing import Any, Self

from ltm_retrofit.config import LTMConfig, check_keys
from ltm_retrofit.errors import BudgetError, CountError, RecipeError, UnsupportedBlock
from ltm_retrofit.graph.sites import AttentionSite, Sites
from ltm_retrofit.merging.mask import merge_macs, partition, unmerge_macs

CLUSTERS = 64  # A of every mask's statistics
TOLERANCE = 0.02  # how far below its target a plan's share may lie


@dataclass(frozen=True)
class Row:
    """What one site does: ``merge`` N tokens into P, or ``slice`` to the prefix tokens after the last attention."""

    site: str
    scope: str
    tokens_in: int
    tokens_out: int
    action: str = "merge"


@dataclass(frozen=True)
class MergePlan:
    """Which site keeps how many tokens. ``macs`` are for one image at ``input_size``, masks included."""

    rows: tuple[Row, ...]
    config: LTMConfig
    macs_original: int
    macs: int
    unmerge: bool  # bring every token back after the last block
    input_size: dict[str, tuple[int, ...]]
    classes: int  # C of the statistics; 0 where the model has no classifier
    readouts: tuple[str, ...]  # the modules whose input is the feature that the classifier reads
    clusters: int = CLUSTERS
    base: dict[str, Any] = field(default_factory=dict)  # library, class and architecture of the model it is for

    @property
    def share(self) -> float:
        """Share of the original MACs that is left."""
        return self.macs / self.macs_original

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token counts after each row: what `LTMConfig.tokens` takes."""
        return tuple(row.tokens_out for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self)
        values["config"] = self.config.to_dict()
        values["rows"] = [asdict(row) for row in self.rows]
        values["input_size"] = {key: list(size) for key, size in self.input_size.items()}
        values["readouts"] = list(self.readouts)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; an unknown key is a `RecipeError`."""
        check_keys(values, cls.__dataclass_fields__, "merge plan")
        missing = [name for name in cls.__dataclass_fields__ if name not in values]
        if missing:
            raise RecipeError(f"this merge plan lacks {', '.join(missing)}: it was cut off, or is not one of ours")
        rows = []
        for row in values["rows"]:
            check_keys(row, Row.__dataclass_fields__, "row of a merge plan")
            try:
                rows.append(Row(**row))
            except TypeError as error:
                raise RecipeError(f"a row of this merge plan is incomplete: {error}") from None
        return cls(
            **{
                **values,
                "rows": tuple(rows),
                "config": LTMConfig.from_dict(values["config"]),
                "input_size": {key: tuple(size) for key, size in values["input_size"].items()},
                "readouts": tuple(values["readouts"]),
            }
        )

    def __str__(self) -> str:
        """Return the table of rows."""
        width = max(len("site"), *(len(row.site) for row in self.rows))
        lines = [f"{'site':<{width}}  scope  tokens       action"]
        lines += [
            f"{row.site:<{width}}  {row.scope:<5}  {row.tokens_in:>4} → {row.tokens_out:<4}  {row.action}"
            for row in self.rows
        ]
        if self.unmerge:
            lines.append("all tokens are brought back after the last block")
        lines.append(f"MACs {self.macs_original / 1e9:.3f} G → {self.macs / 1e9:.3f} G (×{self.share:.3f}), predicted")
        return "\n".join(lines)


def make_plan(sites: Sites, config: LTMConfig) -> MergePlan:
    """Plan the token counts. Touches nothing.

    Args:
        sites: what `find_sites` found.
        config: the budget or the counts.

    Raises:
        BudgetError: where the target share cannot be met; ``.nearest`` can be.
        CountError: where ``config.tokens`` does not fit the sites.
        UnsupportedBlock: where ``config.sites`` names a block that cannot be cut, or no block can be.
    """
    planner = _Planner(sites, config)
    if config.tokens is not None:
        return planner.finish(planner.from_tokens(config.tokens))
    assert config.flops is not None
    return planner.finish(planner.from_budget(config.flops))


def make_macs(sites: Sites, plan: MergePlan) -> int:
    """Count anew what a finished plan's rows cost on these sites."""
    return _Planner(sites, plan.config).macs(plan.rows)


class _Planner:
    """Costs of token counts, and the search for those that meet a budget."""

    def __init__(self, sites: Sites, config: LTMConfig) -> None:
        if not len(sites):
            raise UnsupportedBlock(
                "no block of this model can be cut: "
                + ("; ".join(f"{name}: {reason}" for name, reason in sites.excluded.items()) or "none was found")
            )
        self.sites, self.config = sites, config
        self.tokens, self.prefix = sites[0].layout.tokens, sites[0].layout.prefix
        self.slices = sites.ending.prefix_only and config.output_tokens == "auto"
        #: a slice after the last attention leaves nothing for a mask to do there
        self.mergeable = list(sites)[:-1] if self.slices else list(sites)
        if config.sites is not None:
            self.mergeable = [site for site in self.mergeable if site.block in self._named(config.sites)]

    def _named(self, names: Sequence[str]) -> set[str]:
        known = [site.block for site in self.sites]
        for name in names:
            if name not in known:
                reason = self.sites.excluded.get(name)
                close = get_close_matches(name, known, n=1)
                raise UnsupportedBlock(
                    f"sites names {name!r}, which cannot be cut: "
                    + (reason or f"no such block; did you mean {close[0] if close else ', '.join(known)!r}?")
                )
        return set(names)

    def scheduled(self) -> list[AttentionSite]:
        """Return the sites of the schedule, or all that the user named."""
        if self.config.sites is not None:
            return self.mergeable
        depth = len(self.sites)
        chosen = {self.sites[depth * quarter // 4].block for quarter in (1, 2, 3)}
        return [site for site in self.mergeable if site.block in chosen]

    def rows(self, counts: Mapping[str, int]) -> tuple[Row, ...]:
        """Turn counts after sites into rows; a site that merges nothing has none."""
        rows, present = [], self.tokens
        for site in self.sites:
            after = min(counts.get(site.block, present), present)
            if after < present:
                rows.append(Row(site.block, site.scope.value, present, after))
                present = after
        if self.slices:
            last = self.sites[-1]
            rows.append(Row(last.block, last.scope.value, present, self.prefix, "slice"))
        return tuple(rows)

    def macs(self, rows: Iterable[Row]) -> int:
        """Predict the whole model's MACs."""
        todo, present, total = {row.site: row for row in rows}, self.tokens, self.sites.total_macs
        for site in self.sites:
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

    def from_budget(self, target: float) -> tuple[Row, ...]:
        """Find counts whose share lies in [target − 0.02, target], adding sites where the schedule cannot."""
        total = self.sites.total_macs
        reached: dict[tuple[Row, ...], int] = {}
        for chosen in self._widening():
            for rows, macs in self._around(chosen, target):
                reached[rows] = macs
            below = [(macs, rows) for rows, macs in reached.items() if macs <= target * total * (1 + 1e-12)]
            if below and max(below, key=lambda entry: entry[0])[0] >= (target - TOLERANCE) * total:
                return max(below, key=lambda entry: entry[0])[1]
        nearest = max(macs for macs, _ in below) if below else min(reached.values(), default=total)
        lowest, highest = min(reached.values(), default=total), max(reached.values(), default=total)
        raise BudgetError(
            f"flops={target:g} cannot be met: plans of this model reach {lowest / total:.4f} to {highest / total:.4f} "
            f"of its MACs, the nearest {nearest / total:.4f}. Ask for flops={nearest / total!r}"
            + (" or name more sites" if self.config.sites is not None else ""),
            nearest / total,
        )

    def _widening(self) -> Iterator[list[AttentionSite]]:
        chosen = self.scheduled()
        yield chosen
        for site in [] if self.config.sites is not None else self.mergeable:
            if site not in chosen:
                chosen = [other for other in self.mergeable if other in chosen or other is site]
                yield chosen

    def _around(self, chosen: Sequence[AttentionSite], target: float) -> Iterator[tuple[tuple[Row, ...], int]]:
        """Go through one keep ratio for all sites, then through the neighbours of the best."""
        patches, seen = self.tokens - self.prefix, dict[tuple[Row, ...], tuple[int, tuple[int, ...]]]()

        def consider(counts: tuple[int, ...]) -> Iterator[tuple[tuple[Row, ...], int]]:
            rows = self.rows({site.block: count for site, count in zip(chosen, counts, strict=True)})
            if rows and rows not in seen:
                macs = self.macs(rows)
                seen[rows] = macs, counts
                if macs < self.sites.total_macs:
                    yield rows, macs

        for step in range(4 * patches, 0, -1):
            counts, present = [], patches
            for _ in chosen:
                present = ceil(present * step / (4 * patches))
                counts.append(present + self.prefix)
            yield from consider(tuple(counts))
        limit = target * self.sites.total_macs
        below = [(macs, counts) for macs, counts in seen.values() if macs <= limit]
        if not below:
            return
        _, best = max(below)
        moves = range(-2, 4) if len(chosen) <= 4 else range(0, 2)
        for move in product(moves, repeat=min(len(chosen), 4)):
            around = [count + shift for count, shift in zip(best, (*move, *[0] * len(best)), strict=False)]
            if all(a >= b for a, b in zip([self.tokens, *around], [*around, self.prefix + 1], strict=True)):
                yield from consider(tuple(around))

    def finish(self, rows: tuple[Row, ...]) -> MergePlan:
        """Put the plan together."""
        ending = self.sites.ending
        return MergePlan(
            rows=rows,
            config=self.config,
            macs_original=self.sites.total_macs,
            macs=self.macs(rows),
            unmerge=not self.slices,
            input_size=self.sites.input_size,
            classes=ending.classes,
            readouts=ending.readouts,
            base=self.sites.base,
        )
