"""sites + config → plan: which site keeps how many tokens, and what that costs. Printable, JSON, the saved artefact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any, Self

from ltm_retrofit.config import LTMConfig, check_keys
from ltm_retrofit.errors import BudgetError, RecipeError, UnsupportedBlock
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.scopes.flow.budget import FlowBudget
from ltm_retrofit.scopes.grid.budget import GridBudget
from ltm_retrofit.scopes.local.budget import LocalBudget
from ltm_retrofit.scopes.local.site import LocalSite
from ltm_retrofit.scopes.rows import CLUSTERS, Budget, Option, Row

TOLERANCE = 0.02  # how far below its target a plan's share may lie


@dataclass(frozen=True)
class MergePlan:
    """Which site keeps how many tokens. ``macs`` are for one image at ``input_size``, masks included.

    ``fixed_inputs`` are the inputs beside the image that it was made with: identifiers, masks, settings.
    """

    rows: tuple[Row, ...]
    config: LTMConfig
    macs_original: int
    macs: int
    unmerge: bool  # bring every token back after the last block of scope FLOW
    input_size: dict[str, tuple[int, ...]]
    fixed_inputs: dict[str, Any]
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
                rows.append(Row(**{**row, "grid": tuple(row["grid"]) if row.get("grid") else None}))
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
            + (f" to {row.grid[0]}×{row.grid[1]}" if row.grid else "")
            for row in self.rows
        ]
        if self.unmerge:
            lines.append("all tokens are brought back after the last block")
        lines.append(f"MACs {self.macs_original / 1e9:.3f} G → {self.macs / 1e9:.3f} G (×{self.share:.3f}), predicted")
        return "\n".join(lines)


def make_plan(sites: Sites, config: LTMConfig) -> MergePlan:
    """Plan the token counts. Touches nothing.

    The scopes are tried from the one that saves most: FLOW, GRID, LOCAL, then FLOW with LOCAL blocks beside it.

    Args:
        sites: what `find_sites` found.
        config: the budget or the counts.

    Raises:
        BudgetError: where the target share cannot be met; ``.nearest`` can be.
        CountError: where ``config.tokens`` does not fit the sites.
        UnsupportedBlock: where ``config.sites`` names a block that cannot be cut, or no block can be.
    """
    _check(sites, config)
    if config.tokens is not None:
        budget = next(iter(_budgets(sites, config).values()))
        return _finish(sites, config, budget.from_tokens(config.tokens))
    assert config.flops is not None
    return _finish(sites, config, _from_budget(sites, config, config.flops))


def make_macs(sites: Sites, plan: MergePlan) -> int:
    """Count anew what a plan's rows cost on these sites."""
    return sites.total_macs + _change(sites, plan.config, plan.rows)


def _change(sites: Sites, config: LTMConfig, rows: Sequence[Row]) -> int:
    total, budgets = 0, _every_budget(sites, config)
    for scope in dict.fromkeys(row.scope for row in rows):
        total += budgets[scope].change([row for row in rows if row.scope == scope])
    return total


def _check(sites: Sites, config: LTMConfig) -> None:
    if not len(sites):
        raise UnsupportedBlock(
            "no block of this model can be cut: "
            + ("; ".join(f"{name}: {reason}" for name, reason in sites.excluded.items()) or "none was found")
        )
    every = (*sites.found, *sites.alternatives)
    known = [site.block for site in every]
    for name in config.sites or ():
        if name not in known:
            reason = sites.why(name)
            close = get_close_matches(name, known, n=1)
            raise UnsupportedBlock(
                f"sites names {name!r}, which cannot be cut: "
                + (reason or f"no such block; did you mean {close[0] if close else ', '.join(known)!r}?")
            )
    if config.scope is not None and config.scope not in {site.scope.value for site in every}:
        reasons = {**sites.narrowed, **sites.excluded}
        raise UnsupportedBlock(
            f"scope={config.scope!r} is not proven for any block of this model; scopes that are: "
            f"{', '.join(sorted({site.scope.value for site in every}))}. "
            + "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        )


def _every_budget(sites: Sites, config: LTMConfig) -> dict[str, Budget]:
    budgets: dict[str, Budget] = {}
    if sites.flow:
        budgets["FLOW"] = FlowBudget(sites, config)
    if sites.grid and config.method != "tome":
        budgets["GRID"] = GridBudget(sites, config)
    if sites.local:
        budgets["LOCAL"] = LocalBudget(sites, config, sites.local)
    return budgets


def _budgets(sites: Sites, config: LTMConfig) -> dict[str, Budget]:
    """Return the searches that the user allows, best scope first."""
    if config.scope == "GRID" and config.method == "tome":
        GridBudget(sites, config)  # says why not
    return {
        scope: budget
        for scope, budget in _every_budget(sites, config).items()
        if config.scope in (None, scope)
        and (
            config.sites is None
            or any(s.block in config.sites for s in (*sites.found, *sites.alternatives) if s.scope == scope)
        )
    }


def _from_budget(sites: Sites, config: LTMConfig, target: float) -> tuple[Row, ...]:
    """Find counts whose share lies in [target − 0.02, target], adding sites where the schedule cannot."""
    total = sites.total_macs
    change = int((target - 1) * total * (1 + 1e-12))
    reached: dict[tuple[Row, ...], int] = {}
    below: list[tuple[int, tuple[Row, ...]]] = []
    for batch in _batches(sites, config, change):
        reached.update(dict(batch))
        below = [(macs, rows) for rows, macs in reached.items() if total + macs <= target * total * (1 + 1e-12)]
        if below:
            fits = [entry for entry in below if total + entry[0] >= (target - TOLERANCE) * total]
            if fits:
                return max(fits, key=_gentle if _is_grid(fits[0][1]) else _macs)[1]
    nearest = total + (max(macs for macs, _ in below) if below else min(reached.values(), default=0))
    lowest, highest = (total + pick(reached.values(), default=0) for pick in (min, max))
    raise BudgetError(
        f"flops={target:g} cannot be met: plans of this model reach {lowest / total:.4f} to {highest / total:.4f} "
        f"of its MACs, the nearest {nearest / total:.4f}. Ask for flops={nearest / total!r}"
        + (" or name more sites" if config.sites is not None else ""),
        nearest / total,
    )


def _is_grid(rows: Sequence[Row]) -> bool:
    return any(row.grid is not None for row in rows)


def _macs(entry: tuple[int, tuple[Row, ...]]) -> Any:
    return entry[0]


def _gentle(entry: tuple[int, tuple[Row, ...]]) -> Any:
    """Prefer a mild step early to a harsh one late: a map of 4×4 that becomes 2×2 has lost what it had to say."""
    return min(row.tokens_out / row.tokens_in for row in entry[1]), entry[0]


def _batches(sites: Sites, config: LTMConfig, change: int) -> Iterator[list[Option]]:
    budgets = _budgets(sites, config)
    lowest: Option = ((), 0)
    for scope, budget in budgets.items():
        for batch in budget.search(change):
            yield batch
            if scope == "FLOW":
                lowest = min([lowest, *batch], key=lambda option: option[1])
    beside = [site for site in sites.found if isinstance(site, LocalSite)]
    if config.scope is None and lowest[0] and beside:
        # blocks before the first that is cut merge for themselves: costs add up
        for batch in LocalBudget(sites, config, beside).search(change - lowest[1]):
            yield [((*rows, *lowest[0]), macs + lowest[1]) for rows, macs in batch]


def _finish(sites: Sites, config: LTMConfig, rows: tuple[Row, ...]) -> MergePlan:
    return MergePlan(
        rows=rows,
        config=config,
        macs_original=sites.total_macs,
        macs=sites.total_macs + _change(sites, config, rows),
        unmerge=any(row.scope == "FLOW" for row in rows) and not any(row.action == "slice" for row in rows),
        input_size=sites.input_size,
        fixed_inputs=sites.fixed_inputs,
        classes=sites.ending.classes,
        readouts=sites.ending.readouts,
        base=sites.base,
    )
