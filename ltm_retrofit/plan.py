"""What is a plan? Which site keeps how many tokens, and what that costs. Printable, editable, the saved artefact."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import yaml

from ltm_retrofit.config import LTMConfig, Strict
from ltm_retrofit.errors import BaseMismatch, CountError, RecipeError
from ltm_retrofit.finding.example import sizes_in_words
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import CLUSTERS, get_method, method_names
from ltm_retrofit.scopes import SCOPES
from ltm_retrofit.scopes.base import Row
from ltm_retrofit.scopes.flow import FLOW

_SIZES = {"input_size", "sizes_said"}  # fields whose values are sizes by name


@dataclass(frozen=True)
class MergePlan(Strict):
    """Which site keeps how many tokens. ``macs`` are for one image at ``input_size``, masks included.

    ``fixed_inputs`` are the inputs beside the image that it was made with: identifiers, masks, settings. ``sizes_said``
    is who said how high and wide an image is, the one that was followed first: ``"example"``, ``"request"``, ``"image
    processor"``, ``"patch embedding"``, ``"config"``, ``"pretrained_cfg"``. It is empty where nobody noted it.
    ``measured`` is what calibration saw of these rows, a name and a number each; empty where nothing was measured.
    ``size_aware`` says whether attentions weigh tokens that stay merged by how many they stand for.

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
    measured: dict[str, float] = field(default_factory=dict)
    size_aware: bool = True

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

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file to look at, to edit, and to convert by: YAML, or JSON where it is called so.

        Rows decide: whoever edits ``tokens_out`` leaves everything else as it is, and it is counted anew.
        """
        values, file = self.to_dict(), Path(path)
        text = json.dumps(values, indent=2) if file.suffix == ".json" else yaml.safe_dump(values, sort_keys=False)
        file.write_text(text, encoding="utf-8")

    def diff(self, other: MergePlan) -> str:
        """Say in which rows, settings and costs another plan differs, a line each; nothing where it does not.

        Example:
            >>> import timm, ltm_retrofit as ltm
            >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
            >>> sites = ltm.find_sites(model)
            >>> one, other = (ltm.make_plan(sites, ltm.LTMConfig(tokens=counts)) for counts in ((12, 9), (12, 8)))
            >>> print(one.diff(other))
            config.tokens: (12, 9) | (12, 8)
            blocks.2: 12 → 9 | 12 → 8
            blocks.3: 9 → 1 | 8 → 1
            MACs: 0.021 G (×0.661) | 0.020 G (×0.646)
        """
        ours, theirs = ({row.site: row for row in plan.rows} for plan in (self, other))
        pairs = [
            (f"config.{name}", str(value), str(getattr(other.config, name)))
            for name, value in vars(self.config).items()
        ]
        for site in dict.fromkeys((*ours, *theirs)):
            pairs.append((site, _counts(ours.get(site)), _counts(theirs.get(site))))
        pairs.append(("MACs", _costs(self), _costs(other)))
        return "\n".join(f"{name}: {one} | {two}" for name, one, two in pairs if one != two)

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
        if not self.size_aware:
            lines.append("no attention takes sizes: a merged token weighs there as much as any other")
        lines.append(f"MACs {self.macs_original / 1e9:.3f} G → {self.macs / 1e9:.3f} G (×{self.share:.3f}), predicted")
        if self.sizes_said:
            tokens = self.rows[0].tokens_in if self.rows[0].scope == FLOW.name else None
            lines.append(f"input {sizes_in_words(self.sizes_said, tokens)}")
        lines += _measured_in_words(self.measured, self.config.latency_batch)
        return "\n".join(lines)


def _costs(plan: MergePlan) -> str:
    return f"{plan.macs / 1e9:.3f} G (×{plan.share:.3f})"


def _counts(row: Row | None) -> str:
    return "not merged" if row is None else f"{row.tokens_in} → {row.tokens_out}"


def _measured_in_words(measured: Mapping[str, float], batch: int) -> list[str]:
    """Return a line for each thing that was measured when a plan was chosen."""
    lines = []
    if "difference" in measured:
        differ, auto = measured["difference"], measured["difference of auto"]
        than = f", by {auto:.4f} with it" if differ != auto else ", and no plan was clearly better"
        lines.append(
            f"calibrated on {measured['images']:.0f} images beside schedule auto: answers differ by "
            f"{differ:.4f}{than}; {measured['other answers']:.0%} are another class"
        )
    if "latency" in measured:
        lines.append(f"time ×{measured['latency']:.3f} ± {measured['noise']:.3f} at batch {batch}, measured here")
    return lines


def read_plan(path: Path) -> MergePlan:
    """Read a plan from a JSON or YAML file: one that `MergePlan.write` made, or the config.json of a saved folder.

    Raises:
        RecipeError: where there is none.
        BaseMismatch: as `MergePlan.from_dict`.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
        return MergePlan.from_dict(values.get("plan", values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} holds no plan ({error}): expected what `convert --json` prints") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def recounted(plan: MergePlan, sites: Sites) -> MergePlan:
    """Return a plan whose rows were edited as one that says what they cost; what was measured of it is gone.

    Raises:
        CountError: where the rows do not fit the sites.
    """
    rows: list[Row] = []
    for scope in SCOPES:
        own = [row for row in plan.rows if row.scope == scope.name]
        budget = scope.budget_of(sites, plan.config) if own else None
        rows += own if budget is None else budget.chained(own)
    order = {row.site: place for place, row in enumerate(plan.rows)}
    rows.sort(key=lambda row: order[row.site])
    counted = replace(
        plan,
        rows=tuple(rows),
        macs=make_macs(sites, plan.config, rows),
        unmerge=_unmerges(rows),
        size_aware=_weighs(sites, rows),
    )
    return plan if counted == plan else replace(counted, measured={})


def _weighs(sites: Sites, rows: Sequence[Row]) -> bool:
    """Say whether any block's attention weighs tokens that stay merged by their sizes, where there are such tokens."""
    merging = any(row.scope == FLOW.name and not row.slices for row in rows)
    return not merging or any(site.bias is not None for site in sites.of(FLOW.name))


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


def plan_of(sites: Sites, config: LTMConfig, rows: Sequence[Row]) -> MergePlan:
    """Return the plan of these rows, with what they cost.

    Raises:
        CountError: where they do not fit the sites.
    """
    return MergePlan(
        rows=tuple(rows),
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
        size_aware=_weighs(sites, rows),
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
