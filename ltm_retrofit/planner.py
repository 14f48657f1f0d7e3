"""sites + config → plan: which site keeps how many tokens, by a rule, by the user's counts, or by what images show."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from math import ceil
from statistics import median
from typing import Any

import torch
from torch import nn

from ltm_retrofit.calibrate import Passes, calibrate
from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import BudgetError, CountError, RecipeError, UnsupportedBlock
from ltm_retrofit.finding.example import Example, home, make_example, repeat_batch
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.merging.methods import get_method, method_names
from ltm_retrofit.plan import MergePlan, plan_of
from ltm_retrofit.scopes import SCOPES, both_ways, build_all, tried
from ltm_retrofit.scopes.base import Budget, Option, Row
from ltm_retrofit.scopes.flow import FLOW
from ltm_retrofit.scopes.local import LOCAL
from ltm_retrofit.timing import alternated, quartiles
from ltm_retrofit.undisturbed import undisturbed

#: tokens that one of the last site stands for on average, above which accuracy is surely lost
FEW = 10
TOLERANCE = 0.02  # how far below its target a plan's share may lie
_ROUNDING = 1 + 1e-12  # a share that was computed from MACs and comes back as a target still meets itself
#: pairs of passes of one timing; and how uncertain the median of their ratios may be
PAIRS, NOISE = 12, 0.03
#: timings after which the search for a latency ends
TIMINGS = 6


def make_plan(
    sites: Sites, config: LTMConfig, *, model: nn.Module | None = None, images: Example | None = None
) -> MergePlan:
    """Plan the token counts. Touches nothing.

    The scopes are tried from the one that saves most: FLOW, GRID, LOCAL, then FLOW with LOCAL blocks beside it. Where
    less than a tenth of the tokens is left at the end, it warns.

    Args:
        sites: what `find_sites` found.
        config: the budget or the counts.
        model: the model that they were found in, where it has to run: for ``schedule="calibrated"`` and ``latency``.
        images: for ``schedule="calibrated"``: 16 to 64 images without labels, ``(n, C, H, W)``, prepared as the model
            wants them; or a dict of keyword arguments that holds them.

    Raises:
        BudgetError: where the target share cannot be met; ``.nearest`` can be.
        CountError: where ``config.tokens`` does not fit the sites.
        UnsupportedBlock: where ``config.sites`` names a block that cannot be cut, or no block can be.
        RecipeError: where the method does not serve the scope; where the model or the images that the config needs are
            missing or of another size; where the machine is too noisy for ``latency``.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7).eval()
        >>> sites = ltm.find_sites(model)
        >>> print(ltm.make_plan(sites, ltm.LTMConfig(tokens=(12, 9))))
        site      scope  tokens       action
        blocks.1  FLOW     17 → 12    merge
        blocks.2  FLOW     12 → 9     merge
        blocks.3  FLOW      9 → 1     slice
        MACs 0.031 G → 0.021 G (×0.661), predicted
        input 32×32 by the patch embedding, 17 tokens; the pretrained_cfg says 224
        >>> config = ltm.LTMConfig(flops=0.7, schedule="calibrated")
        >>> plan = ltm.make_plan(sites, config, model=model, images=torch.randn(16, 3, 32, 32))
        >>> plan.measured["difference"] <= plan.measured["difference of auto"]
        True
    """
    _check(sites, config)
    _check_needs(config, model, images)
    if config.tokens is not None:
        rows = next(iter(_budgets(sites, config).values())).from_tokens(config.tokens)
        if not rows:
            raise CountError(f"tokens={config.tokens} merges nothing: no count is below that of the tokens there are")
        plan = plan_of(sites, config, rows)
    elif config.latency is not None:
        assert model is not None
        plan = _by_latency(Search(sites, config, model, images), model, config.latency, config.latency_batch)
    else:
        assert config.flops is not None
        plan = Search(sites, config, model, images).by_macs(config.flops)
    if not plan.measured and (warning := _too_few(plan.rows)):  # else it was said what the images showed
        warnings.warn(warning, stacklevel=2)
    return plan


def _check_needs(config: LTMConfig, model: nn.Module | None, images: Example | None) -> None:
    """Check that what a config needs beside the sites is there."""
    calibrated = config.schedule == "calibrated"
    if calibrated and config.tokens is not None:
        raise RecipeError("schedule='calibrated' chooses the token counts itself: give flops or latency, not tokens")
    if calibrated and (model is None or images is None):
        raise RecipeError(
            "schedule='calibrated' measures what merging changes: pass model= and images=, 16 to 64 images without "
            "labels (`--calibrate FOLDER` on the command line), or use schedule='auto'"
        )
    if config.latency is not None and model is None:
        raise RecipeError("latency is measured: pass the model as model=, or give flops")
    if model is not None and any(parameter.is_meta for parameter in model.parameters()):
        raise RecipeError("a model on the meta device cannot be run: load it, or plan with flops and another schedule")


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


@dataclass(frozen=True)
class Search:
    """All that a search for a plan looks at."""

    sites: Sites
    config: LTMConfig
    model: nn.Module | None
    images: Example | None

    @cached_property
    def passes(self) -> Passes:
        """The passes by which plans are calibrated, for whatever share of the MACs."""
        assert self.model is not None and self.images is not None
        return Passes(self.model, self.sites, self.config, self.images)

    def by_macs(self, target: float) -> MergePlan:
        """Return a plan whose share of the MACs lies in [target − 0.02, target].

        Raises:
            BudgetError: where there is none.
        """
        config = replace(self.config, latency=None, flops=target)
        total = self.sites.total_macs
        change = int((target - 1) * total * _ROUNDING)

        def fits(macs: int) -> bool:
            return (target - TOLERANCE) * total <= total + macs <= target * total * _ROUNDING

        reached: dict[tuple[Row, ...], int] = {}
        for budget, batch in self.batches(config, change):
            reached.update(batch)
            # the first batch with a plan that fits ends the search: each merges at more sites than those before it
            if found := [option for option in reached.items() if fits(option[1])]:
                return self.best_of(config, budget, found, change, fits)
        below = [macs for macs in reached.values() if macs <= change]
        nearest = total + (max(below) if below else min(reached.values(), default=0))
        least, most = (total + pick(reached.values(), default=0) for pick in (min, max))
        raise BudgetError(
            f"flops={target:g} cannot be met: plans of this model reach {least / total:.4f} to {most / total:.4f} "
            f"of its MACs, the nearest {nearest / total:.4f}. Ask for flops={ceil(1e4 * nearest / total) / 1e4:g}"
            + (" or name more sites" if self.config.sites is not None else ""),
            nearest / total,
        )

    def best_of(
        self, config: LTMConfig, budget: Budget[Any], found: list[Option], change: int, fits: Callable[[int], bool]
    ) -> MergePlan:
        """Return the plan of the schedule, or one that is better by what the images show."""
        if config.schedule != "calibrated":
            return plan_of(self.sites, config, max(found, key=budget.rank)[0])
        found = sorted(found, key=budget.rank, reverse=True)
        rows, measured = calibrate(self.passes, budget, change, found, fits)
        return replace(plan_of(self.sites, config, rows), measured=measured)

    def batches(self, config: LTMConfig, change: int) -> Iterator[tuple[Budget[Any], list[Option]]]:
        """Go through the plans of each scope, then through those of two scopes together."""
        cheapest: Option = ((), 0)
        for name, budget in _budgets(self.sites, config).items():
            for batch in budget.search(change):
                yield budget, batch
                if name == FLOW.name:
                    cheapest = min([cheapest, *batch], key=lambda option: option[1])
        # Where FLOW at its cheapest is too dear, blocks that it cannot cut merge beside it: their costs add up.
        rest = LOCAL.budget_of(replace(self.sites, alternatives=()), config)
        if config.scope is None and cheapest[0] and rest is not None:
            for batch in rest.search(change - cheapest[1]):
                yield rest, [((*rows, *cheapest[0]), macs + cheapest[1]) for rows, macs in batch]


def _by_latency(search: Search, model: nn.Module, target: float, batch: int) -> MergePlan:
    """Look for the MACs at which the measured time is just below the target.

    Raises:
        BudgetError: where no plan is fast enough; ``.nearest`` is the fastest ratio that was measured.
        RecipeError: where the machine is too noisy.
    """
    example = repeat_batch(make_example(search.sites.input_size, search.sites.fixed_inputs, model), batch)
    slow, fast, share = 1.0, 0.0, target  # shares of MACs known to be too slow, and fast enough
    plan, fastest = None, float("inf")
    for _ in range(TIMINGS):
        try:
            candidate = search.by_macs(share)
        except BudgetError as error:
            if plan is not None or error.nearest >= slow:
                break
            candidate = search.by_macs(error.nearest)
        ratio, noise = timed(model, search.sites, candidate, example)
        fastest = min(fastest, ratio)
        if ratio <= target:
            plan, fast = replace(candidate, measured={**candidate.measured, "latency": ratio, "noise": noise}), share
            if ratio > target - max(TOLERANCE, noise):
                break
        else:
            slow = candidate.share
        # a part of the time stays whatever merges, the rest falls with the MACs; a little less, against noise
        stays = (ratio - candidate.share) / (1 - candidate.share)
        aimed = (target - stays) / (1 - stays) - NOISE / 3 if stays < target else 0.0
        share = aimed if fast < aimed < slow else (fast + slow) / 2
    if plan is None:
        raise BudgetError(
            f"latency={target:g} cannot be met: the fastest plan that was tried takes {fastest:.3f} of the original's "
            f"time at batch {batch} on this machine. Ask for latency={fastest:.3f} or more, or a larger latency_batch",
            fastest,
        )
    return replace(plan, config=search.config)


def timed(model: nn.Module, sites: Sites, plan: MergePlan, example: Example) -> tuple[float, float]:
    """Return the time of a model as planned in units of its own, and how uncertain that is (a standard error).

    Raises:
        RecipeError: where too uncertain.
    """
    parts = build_all(model, sites, plan)

    with undisturbed(model), torch.inference_mode(), tried(model, parts), both_ways(model, parts[0], example) as ways:
        for pairs in (PAIRS, 3 * PAIRS):
            taken = alternated(ways, home(model)[0], pairs)
            ratios = [after / before for before, after in taken]
            low, _, high = quartiles(ratios)
            noise = 0.93 * (high - low) / pairs**0.5  # of a median, from the quartiles of a normal distribution
            if noise <= NOISE:
                return median(ratios), noise
    raise RecipeError(
        f"this machine is too noisy to plan by latency: after {pairs} pairs of passes the ratio is "
        f"{median(ratios):.3f} ± {noise:.3f}, and a plan needs ± {NOISE}. Wait until nothing else runs, or give flops"
    )
