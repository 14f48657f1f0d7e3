"""retrofit, and its inverse. Everything is checked and built first; a failed conversion leaves no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.converted.classifier import guard_classifier, make_readout, unguard_classifier
from ltm_retrofit.converted.guards import guard, unguard
from ltm_retrofit.converted.record import (
    Retrofit,
    align,
    converted_part,
    fingerprints_of,
    forwards_of,
    get_plan,
    get_retrofit,
    hosts_of,
    in_mode,
    is_retrofitted,
    mark_finetuned,
    masks_of,
    unwrapped,
    was_finetuned,
)
from ltm_retrofit.converted.resizing import example_of
from ltm_retrofit.errors import (
    AlreadyRetrofitted,
    BaseMismatch,
    CountError,
    RecipeError,
    RetrofitError,
    UnsupportedBlock,
    in_words,
)
from ltm_retrofit.find import find_sites
from ltm_retrofit.finding.example import Example, home, prepare_example, run, tensors_of
from ltm_retrofit.finding.proofs import all_equal
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.plan import MergePlan, check_method, make_macs
from ltm_retrofit.planner import make_plan
from ltm_retrofit.scopes import build_all
from ltm_retrofit.scopes.base import CHILD, Parts, install, uninstall
from ltm_retrofit.scopes.flow import FLOW
from ltm_retrofit.undisturbed import undisturbed, without_autocast

#: the model's record, and what is put in place
Conversion = tuple[Retrofit, Parts]


@without_autocast()
def retrofit(
    model: nn.Module,
    config: LTMConfig | None = None,
    example: Example | None = None,
    *,
    plan: MergePlan | None = None,
    images: Example | None = None,
) -> nn.Module:
    """Convert a model in place and return the same object: class, forward signature and its own keys stay.

    Where it is a wrapper of `torch.compile`, of data parallel training or of PEFT, what it wraps is converted.

    Args:
        model: a timm or Hugging Face vision transformer, or any module whose blocks can be cut.
        config: what to merge; ``LTMConfig(flops=0.7)`` where it and ``plan`` are left out.
        example: an input to prove the conversion on, of the size to plan for. Left out, it is made of the size that
            ``plan`` is for; else of the first of: the image processor saved beside the checkpoint, where it fixes both
            sides and the model takes them; the patch embedding; the Hugging Face config; timm's ``pretrained_cfg``.
            The plan says which it was.
        plan: a finished plan instead of ``config``, as `make_plan` or a saved folder has it.
        images: what ``schedule="calibrated"`` measures on, see `make_plan`.

    Raises:
        AlreadyRetrofitted: `restore` it first.
        NoAttentionError, ExampleError, UnsupportedBlock, BudgetError, CountError, RecipeError: nothing was changed.
        BaseMismatch: ``plan`` is for another model, or of another version of its method.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> model = ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
        >>> 0.68 <= ltm.get_plan(model).share <= 0.7
        True
    """
    given = model
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    _check(model, config, plan, images)
    put_back = align(model)  # first of all: the proofs compare bits
    try:
        if plan is not None and example is None:
            example = example_of(plan, model)
        sites = find_sites(model, example)
        example = prepare_example(model, example)
        if plan is None:
            plan = make_plan(sites, config or LTMConfig(flops=0.7), model=model, images=images)
        plan = _fitting(plan, sites)
        conversion = build(model, sites, plan)
        with undisturbed(model), torch.no_grad():
            expected = run(model, example)
        install(model, *conversion)
        guard(model)
        guard_classifier(model)
        _prove_or_restore(model, example, expected)
    except BaseException:
        put_back()
        raise
    return given


def restore(model: nn.Module) -> nn.Module:
    """Remove all that `retrofit` added, in place; the host's weights stay as they are now.

    Of a wrapper, what is converted in it is restored; so is a part of a model that was converted as a whole.

    Raises:
        NotRetrofitted: where there is nothing to remove.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> keys = list(model.state_dict())
        >>> list(ltm.restore(ltm.retrofit(model)).state_dict()) == keys
        True
    """
    given = model
    if is_retrofitted(model) or next(forwards_of(model), None) is None:
        model = converted_part(model)
    # else a part whose whole is gone: its plan is as well, but what was added to it is not
    finetuned = is_retrofitted(model) and was_finetuned(model)
    unguard(model)
    unguard_classifier(model)
    uninstall(model, list(forwards_of(model)))
    if finetuned:
        mark_finetuned(model)
    return given


def replan(model: nn.Module, config: LTMConfig, *, images: Example | None = None) -> nn.Module:
    """Give a converted model another budget, in place, and return it.

    The host's weights stay as they are, tuned or not. Where a block merges before and afterwards, by the same method,
    its mask keeps what it learned; name the blocks in ``sites`` to keep all of them. What a readout learned of the
    classifier's feature stays too.

    Args:
        model: a converted model.
        config: the new budget.
        images: see `make_plan`.

    Raises:
        NotRetrofitted: where it is not converted.
        BudgetError, CountError, UnsupportedBlock, RecipeError: the model is as it was.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> model = ltm.retrofit(model, ltm.LTMConfig(flops=0.8))
        >>> ltm.get_plan(ltm.replan(model, ltm.LTMConfig(flops=0.6))).share <= 0.6
        True
    """
    given, model = model, converted_part(model)
    old, example = get_plan(model), example_of(get_plan(model), model)
    record, parts = get_retrofit(model), ([*forwards_of(model)], hosts_of(model))
    learned = {site: mask.state_dict() for site, mask in masks_of(model).items()}
    restore(model)
    try:
        retrofit(model, config, example, images=images)
    except BaseException:
        install(model, record, parts)
        guard(model)
        guard_classifier(model)
        raise
    new = get_retrofit(model)
    new.pretrained = record.pretrained
    if (old.config.method, old.method_version) == (new.plan.config.method, new.plan.method_version):
        for site, mask in masks_of(model).items():
            _keep(mask, learned.get(site, {}))
    if new.readout is not None and record.readout is not None:
        _keep(new.readout, record.readout.state_dict())
    return given


def _keep(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state where it is of the same shapes: what a method of one's own learns may hang on the counts."""
    if {key: value.shape for key, value in module.state_dict().items()} == {k: v.shape for k, v in state.items()}:
        module.load_state_dict(state)


def _check(model: nn.Module, config: LTMConfig | None, plan: MergePlan | None, images: Example | None) -> None:
    """Check what `retrofit` was given, before anything is run."""
    if not isinstance(model, nn.Module):
        raise UnsupportedBlock(f"model is a {type(model).__name__}: pass the torch module itself, loaded")
    if config is not None and not isinstance(config, LTMConfig):
        raise RecipeError(f"config is a {type(config).__name__} ({config!r}): pass LTMConfig(flops=0.7)")
    if config is not None and plan is not None:
        raise RecipeError("give a config or a plan, not both: a plan holds the config that it was made from")
    if images is not None and (config is None or config.schedule != "calibrated"):
        raise RecipeError("images are what LTMConfig(schedule='calibrated') measures on: ask for it, or leave them out")
    if is_retrofitted(model) and converted_part(model) is model:
        raise AlreadyRetrofitted(
            f"this {type(model).__name__} is converted already ({get_plan(model).share:.3f} of its MACs): "
            "call ltm_retrofit.restore(model) first"
        )
    if any(True for _ in forwards_of(model)):
        raise AlreadyRetrofitted(
            "a part of this model is converted already, or it is itself a part of one: call ltm_retrofit.restore on it "
            "first"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedBlock(
            "this model is on the meta device: it can be planned for, and converted once it is loaded"
        )


def _fitting(plan: MergePlan, sites: Sites) -> MergePlan:
    """Return a finished plan that fits what was found.

    Raises:
        BaseMismatch: where it does not.
    """
    check_method(plan.config.method, plan.method_version)
    known = {(site.block, site.scope.value) for site in (*sites.found, *sites.alternatives)}
    for row in plan.rows:
        if (row.site, row.scope) not in known:
            names = ", ".join(dict.fromkeys(block for block, _ in known)) or "none"
            reason = sites.why(row.site) or f"blocks that can be cut: {names}"
            raise BaseMismatch(f"the plan merges at {row.site!r} ({row.scope}), which this model cannot: {reason}")
    if not plan.rows or plan.macs_original != sites.total_macs:
        raise BaseMismatch(
            f"the plan is for {plan.macs_original:,} MACs and {len(plan.rows)} sites, this model has "
            f"{sites.total_macs:,} MACs at its example's size: plan for this model, or pass an example of that size"
        )
    flow = [row for row in plan.rows if row.scope == FLOW.name]
    slices = any(row.slices for row in flow)
    if flow and ((slices and not sites.ending.prefix_only) or not (slices or plan.unmerge)):
        raise BaseMismatch(
            "the plan leaves only prefix tokens after the last block, and something in this model reads the patch "
            "tokens there: plan for this model"
        )
    try:
        made = make_macs(sites, plan.config, plan.rows)
    except CountError as error:
        raise BaseMismatch(f"the plan does not fit this model: {error}") from error
    if made != plan.macs:
        raise BaseMismatch(
            f"the plan says {plan.macs:,} MACs and its rows make {made:,}: it was altered, or is for another model"
        )
    if plan.classes != sites.ending.classes:
        raise BaseMismatch(
            f"the plan is for {plan.classes} classes, this model has {sites.ending.classes}: change the classifier "
            "before planning"
        )
    return plan


def build(model: nn.Module, sites: Sites, plan: MergePlan) -> Conversion:
    """Make every interceptor and mask, and the record; touch nothing."""
    for name, module in model.named_modules():
        left = isinstance(module._modules.get(CHILD), Retrofit)  # of a conversion that was taken away from a part
        if hasattr(module, CHILD) and not left:
            raise UnsupportedBlock(
                f"{name or type(model).__name__!r} of this model has an attribute {CHILD!r} of its own, which is our "
                "name for masks"
            )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        forwards, masks = parts = build_all(model, sites, plan)
        readout = make_readout(model, plan, masks.values())
    for module in (*masks, *(forward.block for forward in forwards)):
        if "forward" in module.__dict__:
            raise UnsupportedBlock(
                f"the forward of a {type(module).__name__} was replaced on the instance (a hook or a wrapper): remove "
                "that first"
            )
    record = Retrofit(
        dataclasses.replace(plan, base=sites.base, fixed_inputs=sites.fixed_inputs),
        readout,
        finetuned=was_finetuned(model),
        pretrained=fingerprints_of(model),
    ).to(home(model)[0])
    return record.train(model.training), parts


def _prove_or_restore(model: nn.Module, example: Example, expected: Any) -> None:
    """Prove a conversion; where that fails, undo it."""
    try:
        with undisturbed(model), torch.no_grad():
            prove_installed(model, example, expected)
    except BaseException as error:
        restore(model)
        if isinstance(error, RetrofitError) or not isinstance(error, Exception):
            raise
        raise UnsupportedBlock(
            f"proof (e): converted, this {type(model).__name__} does not run: {type(error).__name__}: {in_words(error)}"
        ) from error


def prove_installed(model: nn.Module, example: Example, expected: Any) -> None:
    """(e) with P = N the converted model is the original bit for bit; and with merging it runs, shapes kept."""
    with in_mode(model, "identity"):
        if not all_equal(run(model, example), expected):
            raise UnsupportedBlock("proof (e): with nothing merged the converted model differs from the original")
    ours, theirs = tensors_of(run(model, example)), tensors_of(expected)
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise UnsupportedBlock(
            f"proof (e): merging changes the output's shapes, {[tuple(t.shape) for t in theirs]} to "
            f"{[tuple(t.shape) for t in ours]}; output_tokens='full' brings every token back"
        )
    finite = [bool(torch.isfinite(tensor).all()) for tensor in theirs]
    if [bool(torch.isfinite(tensor).all()) for tensor in ours] != finite:
        raise UnsupportedBlock("proof (e): merging makes outputs that are not finite")
