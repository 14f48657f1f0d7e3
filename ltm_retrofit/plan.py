"""sites + config → plan: which site keeps how many tokens, and what that costs. Printable, JSON, the saved artefact."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from ltm_retrofit.config import LTMConfig, Strict
from ltm_retrofit.errors import BaseMismatch, BudgetError, CountError, RecipeError, UnsupportedBlock
from ltm_retrofit.finding.example import sizes_in_words
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import CLUSTERS, get_method, method_names
from ltm_retrofit.scopes import SCOPES
from ltm_retrofit.scopes.base import Budget, Option, Row
from ltm_retrofit.scopes.flow import FLOW
from ltm_retrofit.scopes.local import LOCAL

#: tokens that one of the last site stands for on average, above which accuracy is surely lost
FEW = 10
TOLERANCE = 0.02  # how far below its target a plan's share may lie
_SIZES = {"input_size", "sizes_said"}  # fields whose values are sizes by name
_ROUNDING = 1 + 1e-12  # a share that was computed from MACs and comes back as a target still meets itself


@dataclass(frozen=True)
class MergePlan(Strict):
    """Which site keeps how many tokens. ``macs`` are for one image at ``input_size``, masks included.

    ``fixed_inputs`` are the inputs beside the image that it was made with: identifiers, masks, settings. ``sizes_said``
    is who said how high and wide an image is, the one that was followed first: ``"example"``, ``"request"``, ``"image
    processor"``, ``"patch embedding"``, ``"config"``, ``"pretrained_cfg"``. It is empty where nobody noted it.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> plan = ltm.make_plan(ltm.find_sites(model), ltm.LTMConfig(tokens=(12, 9)))
        >>> plan == ltm.MergePlan.from_dict(plan.to_dict())
        True
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
    clusters: int  # A, likewise
    base: dict[str, Any]  # library, class and architecture of the model it is for
    method_version: int = 1
    sizes_said: dict[str, tuple[int, int]] = field(default_factory=dict)

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
        nested: dict[str, Any] = {"config": self.config.to_dict(), "rows": [row.to_dict() for row in self.rows]}
        for name in _SIZES:
            nested[name] = {key: list(size) for key, size in getattr(self, name).items()}
        return {**super().to_dict(), **nested}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            RecipeError: where a key is unknown or missing.
            BaseMismatch: where its method is not registered, or in another version.
        """
        read = dict(values)
        if "config" in read:
            # plans of before there were versions have none, and are of the first
            check_method(read["config"].get("method", LTMConfig.method), read.get("method_version", 1))
            read["config"] = LTMConfig.from_dict(read["config"])
        if "rows" in read:
            read["rows"] = tuple(map(Row.from_dict, read["rows"]))
        for name in _SIZES & read.keys():
            read[name] = {key: tuple(size) for key, size in read[name].items()}
        return super().from_dict(read)

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
        if self.sizes_said:
            tokens = self.rows[0].tokens_in if self.rows[0].scope == FLOW.name else None
            lines.append(f"input {sizes_in_words(self.sizes_said, tokens)}")
        return "\n".join(lines)


def read_plan(path: Path) -> MergePlan:
    """Read a plan from a JSON file: one that `MergePlan.to_dict` made, or the config.json of a saved folder.

    Raises:
        RecipeError: where there is none.
        BaseMismatch: as `MergePlan.from_dict`.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return MergePlan.from_dict(values.get("plan", values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path} holds no plan ({error}): expected what `convert --json` prints") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def recounted(plan: MergePlan, sites: Sites) -> MergePlan:
    """Return a plan whose rows were edited as one that says what they cost.

    Raises:
        CountError: where the rows do not fit the sites.
    """
    return replace(plan, macs=make_macs(sites, plan.config, plan.rows), unmerge=_unmerges(plan.rows))


def _unmerges(rows: Sequence[Row]) -> bool:
    """Say whether tokens that stay merged are left at the end, to be brought back."""
    return any(row.scope == FLOW.name for row in rows) and not any(row.slices for row in rows)


def check_method(name: str, version: int) -> None:
    """Check that a plan's method is the registry's: what another version computes, this one would compute differently.

    Raises:
        BaseMismatch: where it is not registered, or in another version.
    """
    if name not in method_names():
        raise BaseMismatch(
            f"this plan is of method {name!r}, which is not registered: call ltm_retrofit.register_method(...) with "
            f"it first. Registered are {', '.join(map(repr, method_names()))}"
        )
    present = get_method(name).version
    if version != present:
        raise BaseMismatch(
            f"saved with version {version} of method {name!r}, this ltm_retrofit has {present}: convert the base anew, "
            "or load it with the version that wrote it"
        )


def make_plan(sites: Sites, config: LTMConfig) -> MergePlan:
    """Plan the token counts. Touches nothing.

    The scopes are tried from the one that saves most: FLOW, GRID, LOCAL, then FLOW with LOCAL blocks beside it. Where
    less than a tenth of the tokens is left at the end, it warns.

    Args:
        sites: what `find_sites` found.
        config: the budget or the counts.

    Raises:
        BudgetError: where the target share cannot be met; ``.nearest`` can be.
        CountError: where ``config.tokens`` does not fit the sites.
        UnsupportedBlock: where ``config.sites`` names a block that cannot be cut, or no block can be.
        RecipeError: where the method does not serve the scope.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> print(ltm.make_plan(ltm.find_sites(model), ltm.LTMConfig(tokens=(12, 9))))
        site      scope  tokens       action
        blocks.1  FLOW     17 → 12    merge
        blocks.2  FLOW     12 → 9     merge
        blocks.3  FLOW      9 → 1     slice
        MACs 0.031 G → 0.021 G (×0.661), predicted
        input 32×32 by the patch embedding, 17 tokens; the pretrained_cfg says 224
    """
    _check(sites, config)
    budgets = _budgets(sites, config)
    if config.tokens is not None:
        rows = next(iter(budgets.values())).from_tokens(config.tokens)
        if not rows:
            raise CountError(f"tokens={config.tokens} merges nothing: no count is below that of the tokens there are")
    else:
        assert config.flops is not None
        rows = _from_flops(sites, config, budgets, config.flops)
    if warning := _too_few(rows):
        warnings.warn(warning, stacklevel=2)
    return MergePlan(
        rows=rows,
        config=config,
        macs_original=sites.total_macs,
        macs=make_macs(sites, config, rows),
        unmerge=_unmerges(rows),
        input_size=sites.input_size,
        sizes_said=sites.sizes_said,
        fixed_inputs=sites.fixed_inputs,
        classes=sites.ending.classes,
        readouts=sites.ending.readouts,
        clusters=CLUSTERS,
        base=sites.base,
        method_version=get_method(config.method).version,
    )


def _too_few(rows: Sequence[Row]) -> str:
    """Say that a plan leaves too few tokens to see much by; empty where it does not.

    A DINOv2-S of 257 tokens, which recognised 87 % of 160 photographs, recognised untuned 78 % at ×0.35 of its MACs
    (38 tokens at the end), 73 % at ×0.3 (26), 64 % at ×0.25 (17), 44 % at ×0.2 (9), 19 % at ×0.1 (5).
    """
    staying = [row for row in rows if row.scope == FLOW.name and not row.slices]
    if not staying or FEW * staying[-1].tokens_out >= staying[0].tokens_in:
        return ""
    first, last = staying[0], staying[-1]
    return (
        f"of {first.tokens_in} tokens only {last.tokens_out} are left after {last.site}: most of what an image shows "
        "is gone there, and accuracy with it, which tuning brings back in part at best. Keep a larger share, "
        "flops=0.35 or more, and look at `ltm-retrofit report --data` before you rely on it"
    )


def make_macs(sites: Sites, config: LTMConfig, rows: Sequence[Row]) -> int:
    """Count what rows cost on these sites: scopes add up, for their rows lie in different blocks.

    Raises:
        CountError: where they do not fit.
    """
    total = sites.total_macs
    for scope in SCOPES:
        if own := [row for row in rows if row.scope == scope.name]:
            if (budget := scope.budget_of(sites, config)) is None:
                raise CountError(f"{own[0].site}: method {config.method!r} does not serve scope {scope.name}")
            total += budget.change(own)
    return total


def _check(sites: Sites, config: LTMConfig) -> None:
    """Check that what a config names is there."""
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
    scopes = sorted({site.scope.value for site in every})
    if config.scope is not None and config.scope not in scopes:
        reasons = {**sites.narrowed, **sites.excluded}
        raise UnsupportedBlock(
            f"scope={config.scope!r} is not proven for any block of this model; scopes that are: {', '.join(scopes)}. "
            + "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        )


def _budgets(sites: Sites, config: LTMConfig) -> dict[str, Budget[Any]]:
    """Return the searches that the user allows, by scope, the best first.

    Raises:
        RecipeError: where the method serves none of the scopes.
        UnsupportedBlock: where no site is both named and in the scope.
    """
    allowed = {
        site.scope
        for site in (*sites.found, *sites.alternatives)
        if config.scope in (None, site.scope) and (config.sites is None or site.block in config.sites)
    }
    if not allowed:
        raise UnsupportedBlock(f"none of sites={config.sites} is in scope {config.scope}: name others, or no scope")
    searches = {scope.name: scope.budget_of(sites, config) for scope in SCOPES if scope.name in allowed}
    budgets = {str(name): budget for name, budget in searches.items() if budget is not None}
    if not budgets:
        others = [name for name in method_names() if allowed & {*get_method(name).scopes}]
        raise RecipeError(
            f"method={config.method!r} does not serve scope {' or '.join(sorted(allowed))}, only "
            f"{' and '.join(get_method(config.method).scopes)}: use method={' or '.join(map(repr, others))}, or a "
            "scope that it serves"
        )
    return budgets


def _from_flops(sites: Sites, config: LTMConfig, budgets: Mapping[str, Budget[Any]], target: float) -> tuple[Row, ...]:
    """Search for rows whose share lies in [target − 0.02, target]."""
    total = sites.total_macs
    highest = target * total * _ROUNDING
    reached: dict[tuple[Row, ...], int] = {}
    for budget, batch in _batches(sites, config, budgets, int((target - 1) * total * _ROUNDING)):
        reached.update(batch)
        # the first batch with a plan that fits ends the search: each one merges at more sites than those before it
        fits = [option for option in reached.items() if (target - TOLERANCE) * total <= total + option[1] <= highest]
        if fits:
            return max(fits, key=budget.rank)[0]
    below = [macs for macs in reached.values() if total + macs <= highest]
    nearest = total + (max(below) if below else min(reached.values(), default=0))
    least, most = (total + pick(reached.values(), default=0) for pick in (min, max))
    raise BudgetError(
        f"flops={target:g} cannot be met: plans of this model reach {least / total:.4f} to {most / total:.4f} "
        f"of its MACs, the nearest {nearest / total:.4f}. Ask for flops={nearest / total!r}"
        + (" or name more sites" if config.sites is not None else ""),
        nearest / total,
    )


def _batches(
    sites: Sites, config: LTMConfig, budgets: Mapping[str, Budget[Any]], change: int
) -> Iterator[tuple[Budget[Any], list[Option]]]:
    """Go through the plans of each scope, then through those of two scopes together."""
    cheapest: Option = ((), 0)
    for name, budget in budgets.items():
        for batch in budget.search(change):
            yield budget, batch
            if name == FLOW.name:
                cheapest = min([cheapest, *batch], key=lambda option: option[1])
    # Where FLOW at its cheapest is too dear, blocks that it cannot cut merge for themselves beside it: costs add up.
    rest = LOCAL.budget_of(replace(sites, alternatives=()), config)
    if config.scope is None and cheapest[0] and rest is not None:
        for batch in rest.search(change - cheapest[1]):
            yield rest, [((*rows, *cheapest[0]), macs + cheapest[1]) for rows, macs in batch]
