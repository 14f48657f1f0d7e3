"""retrofit, and its inverse. Everything is checked and built first; a failed conversion leaves no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ltm_retrofit.blocks import CHILD, FINETUNED, GRID_METHODS, BlockForward, Refusal, Retrofit, forwards_of
from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import AlreadyRetrofitted, BaseMismatch, NotRetrofitted, RecipeError, UnsupportedBlock
from ltm_retrofit.graph.example import Example, home, prepare_example, run, tensors_of
from ltm_retrofit.graph.find import find_sites
from ltm_retrofit.graph.prove import all_equal
from ltm_retrofit.graph.sites import AttentionSite, Sites
from ltm_retrofit.merging.baselines import SliceMask, ToMeMask
from ltm_retrofit.merging.mask import MaskModule
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.plan import MergePlan, Row, make_macs, make_plan
from ltm_retrofit.undisturbed import undisturbed


def retrofit(
    model: nn.Module,
    config: LTMConfig | None = None,
    example: Example | None = None,
    *,
    plan: MergePlan | None = None,
) -> nn.Module:
    """Convert a model in place and return the same object: class, forward signature and its own keys stay.

    Args:
        model: a timm or Hugging Face vision transformer, or any module whose blocks can be cut.
        config: what to merge; ``LTMConfig(flops=0.7)`` where it and ``plan`` are left out.
        example: an input to prove the conversion on; made from what the model says of itself where left out.
        plan: a finished plan instead of ``config``, as `make_plan` or a saved folder has it.

    Raises:
        AlreadyRetrofitted: `restore` it first.
        NoAttentionError, ExampleError, UnsupportedBlock, BudgetError, CountError: nothing was changed.
        BaseMismatch: ``plan`` is for another model.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedBlock(f"model is a {type(model).__name__}: pass the torch module itself, loaded")
    if config is not None and not isinstance(config, LTMConfig):
        raise RecipeError(f"config is a {type(config).__name__} ({config!r}): pass LTMConfig(flops=0.7)")
    if config is not None and plan is not None:
        raise RecipeError("give a config or a plan, not both: a plan holds the config that it was made from")
    if not is_retrofitted(model) and any(True for _ in forwards_of(model)):
        raise AlreadyRetrofitted("a part of this model is converted already: restore that part first")
    if is_retrofitted(model):
        raise AlreadyRetrofitted(
            f"this {type(model).__name__} is converted already ({get_plan(model).share:.3f} of its MACs): "
            "call ltm_retrofit.restore(model) first"
        )
    example = prepare_example(model, example)
    sites = find_sites(model, example)
    if plan is None:
        plan = make_plan(sites, config or LTMConfig(flops=0.7))
    else:
        _check_fits(plan, sites)
    with torch.random.fork_rng(devices=[]):  # masks draw random weights before they get the pretrained ones
        conversion = _build(model, sites, plan)
    with undisturbed(model), torch.no_grad():
        expected = run(model, example)
    _install(model, *conversion)
    try:
        with undisturbed(model), torch.no_grad():
            _prove_installed(model, example, expected)
    except BaseException:
        restore(model)
        raise
    return model


def restore(model: nn.Module) -> nn.Module:
    """Remove all that `retrofit` added, in place; the host's weights stay as they are now.

    Raises:
        NotRetrofitted: where there is nothing to remove.
    """
    finetuned = was_finetuned(model)
    get_plan(model)
    for forward in list(forwards_of(model)):
        del forward.block.__dict__["forward"]
        forward.block._modules.pop(CHILD, None)
    for name in GRID_METHODS:
        if isinstance(model.__dict__.get(name), Refusal):
            del model.__dict__[name]
    del model._modules[CHILD]
    if finetuned:
        mark_finetuned(model)
    return model


def is_retrofitted(model: nn.Module) -> bool:
    """Say whether a model is converted."""
    return isinstance(model._modules.get(CHILD), Retrofit)


def get_plan(model: nn.Module) -> MergePlan:
    """Return the plan of a converted model.

    Raises:
        NotRetrofitted: where it is not converted.
    """
    return get_retrofit(model).plan


def get_retrofit(model: nn.Module) -> Retrofit:
    """Return what a converted model keeps of its conversion.

    Raises:
        NotRetrofitted: where it is not converted.
    """
    kept = model._modules.get(CHILD)
    if not isinstance(kept, Retrofit):
        raise NotRetrofitted(
            f"this {type(model).__name__} is not converted: call ltm_retrofit.retrofit(model, LTMConfig(...)) first, "
            "and pass the model itself, not a wrapper around it"
        )
    return kept


def was_finetuned(model: nn.Module) -> bool:
    """Say whether `finetune` has trained a model's weights, before or after its conversion."""
    if is_retrofitted(model):
        return bool(get_retrofit(model).finetuned)
    return bool(model.__dict__.get(FINETUNED, False))


def mark_finetuned(model: nn.Module) -> None:
    """Note that a model's weights are no longer the pretrained ones."""
    if is_retrofitted(model):
        get_retrofit(model).finetuned.fill_(True)
    else:
        model.__dict__[FINETUNED] = True


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the original path meanwhile, for teachers and comparisons.

    Raises:
        NotRetrofitted: where the model is not converted.
    """
    get_plan(model)
    with _mode(model, "original"):
        yield model


@contextmanager
def _mode(model: nn.Module, mode: str) -> Iterator[None]:
    before = [(forward, forward.mode) for forward in forwards_of(model)]
    try:
        for forward, _ in before:
            forward.mode = mode
        yield
    finally:
        for forward, old in before:
            forward.mode = old


def _check_fits(plan: MergePlan, sites: Sites) -> None:
    known = {site.block: site for site in sites}
    for row in plan.rows:
        if row.site not in known:
            reason = sites.excluded.get(row.site, f"blocks that can be cut: {', '.join(known) or 'none'}")
            raise BaseMismatch(f"the plan merges at {row.site!r}, which this model cannot: {reason}")
    tokens = sites[0].layout.tokens
    if (plan.rows and plan.rows[0].tokens_in != tokens) or plan.macs_original != sites.total_macs:
        raise BaseMismatch(
            f"the plan is for {plan.rows[0].tokens_in} tokens and {plan.macs_original:,} MACs, this model has {tokens} "
            f"and {sites.total_macs:,} at its example's size: plan for this model, or pass an example of that size"
        )
    slices = any(row.action == "slice" for row in plan.rows)
    if (slices and not sites.ending.prefix_only) or not (slices or plan.unmerge):
        raise BaseMismatch(
            "the plan leaves only prefix tokens after the last block, and something in this model reads the patch "
            "tokens there: plan for this model"
        )
    if make_macs(sites, plan) != plan.macs:
        raise BaseMismatch(
            f"the plan says {plan.macs:,} MACs and its rows make {make_macs(sites, plan):,}: it was altered, or is for "
            "another model"
        )
    if plan.classes != sites.ending.classes:
        raise BaseMismatch(
            f"the plan is for {plan.classes} classes, this model has {sites.ending.classes}: change the head before "
            "planning"
        )


def _build(
    model: nn.Module, sites: Sites, plan: MergePlan
) -> tuple[list[BlockForward], dict[str, nn.Module], Retrofit]:
    """Make every interceptor and mask; touch nothing."""
    device, _ = home(model)
    rows = {row.site: row for row in plan.rows}
    first = next(index for index, site in enumerate(sites) if site.block in rows)
    if CHILD in model._modules or hasattr(model, CHILD):
        raise UnsupportedBlock(f"this {type(model).__name__} has an attribute {CHILD!r} of its own, our name for masks")
    forwards, masks, merged = [], {}, False
    for index, site in enumerate(sites[first:], start=first):
        block, row = model.get_submodule(site.block), rows.get(site.block)
        if hasattr(block, CHILD):
            raise UnsupportedBlock(f"block {site.block!r} has an attribute {CHILD!r} of its own, our name for its mask")
        last = index == len(sites) - 1
        keep = row.tokens_out if row is not None and row.action == "slice" else None
        forwards.append(BlockForward(block, site, expects=merged, keep=keep, last=last, unmerge=last and plan.unmerge))
        if row is not None and row.action == "merge":
            masks[site.block] = _make_mask(block, site, row, plan)
            merged = True
    readout = None
    if plan.config.method == "ltm" and masks and plan.readouts:
        width = sum(model.get_submodule(name).get_parameter("weight").shape[1] for name in plan.readouts)
        readout = Statistics(width, plan.classes, plan.clusters).to(device)
    kept = Retrofit(dataclasses.replace(plan, base=sites.base), readout, finetuned=was_finetuned(model)).to(device)
    return forwards, masks, kept.train(model.training)


def _make_mask(block: nn.Module, site: AttentionSite, row: Row, plan: MergePlan) -> nn.Module:
    """Make a site's mask, its similarity initialised from the block's pretrained keys."""
    prefix = site.layout.prefix
    if plan.config.method == "slice":
        return SliceMask(row.tokens_in, row.tokens_out).train(block.training)
    device, dtype = home(block)
    if plan.config.method == "tome":
        tome = ToMeMask(site.dim, row.tokens_in, row.tokens_out, prefix)
        return tome.to(device).train(block.training)
    mask = MaskModule(
        site.dim, site.key_dim, row.tokens_in, row.tokens_out, prefix, max(1, plan.classes), plan.clusters
    ).to(device, dtype)
    weight, bias = site.key.mean_map(block)
    with torch.no_grad():
        mask.key.weight.copy_(weight)
        mask.key.bias.copy_(bias if bias is not None else torch.zeros_like(mask.key.bias))
    return mask.train(block.training)


def _install(model: nn.Module, forwards: list[BlockForward], masks: dict[str, nn.Module], kept: Retrofit) -> None:
    model._modules[CHILD] = kept
    for name in GRID_METHODS:
        if callable(getattr(model, name, None)):
            model.__dict__[name] = Refusal(model, name)
    for forward in forwards:
        forward.block.__dict__["forward"] = forward
        if forward.name in masks:
            forward.block._modules[CHILD] = masks[forward.name]


def _prove_installed(model: nn.Module, example: Example, expected: Any) -> None:
    """(e) with P = N the converted model is the original bit for bit; and with merging it runs, shapes kept."""
    with _mode(model, "identity"):
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
