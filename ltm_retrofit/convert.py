"""retrofit, and its inverse. Everything is checked and built first; a failed conversion leaves no trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.converted.classifier import guard_head, make_readout, unguard_head
from ltm_retrofit.converted.fingerprints import fingerprints_of
from ltm_retrofit.converted.record import (
    FINETUNED,
    Retrofit,
    allow_methods,
    forwards_of,
    get_retrofit,
    in_mode,
    refuse_methods,
)
from ltm_retrofit.errors import (
    AlreadyRetrofitted,
    BaseMismatch,
    CountError,
    RecipeError,
    RetrofitError,
    UnsupportedBlock,
)
from ltm_retrofit.find import find_sites
from ltm_retrofit.finding.example import Example, home, prepare_example, run, tensors_of
from ltm_retrofit.finding.proofs import all_equal
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.plan import MergePlan, make_macs, make_plan
from ltm_retrofit.scopes.base import CHILD, Interceptor
from ltm_retrofit.scopes.flow.forward import BlockForward
from ltm_retrofit.scopes.grid.forward import GridForward
from ltm_retrofit.scopes.local.forward import LocalForward
from ltm_retrofit.scopes.masks import MASKS, flow_mask, grid_mask, local_mask
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
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UnsupportedBlock(
            "this model is on the meta device: it can be planned for, and converted once it is loaded"
        )
    example = prepare_example(model, example)
    sites = find_sites(model, example)
    if plan is None:
        plan = make_plan(sites, config or LTMConfig(flops=0.7))
    else:
        _check_fits(plan, sites)
    with torch.random.fork_rng(devices=[]):  # masks draw random weights before they get the pretrained ones
        conversion = build(model, sites, plan)
    with undisturbed(model), torch.no_grad():
        expected = run(model, example)
    install(model, *conversion)
    refuse_methods(model)
    guard_head(model)
    try:
        with undisturbed(model), torch.no_grad():
            prove_installed(model, example, expected)
    except BaseException as error:
        restore(model)
        if isinstance(error, RetrofitError) or not isinstance(error, Exception):
            raise
        raise UnsupportedBlock(
            f"proof (e): converted, this {type(model).__name__} does not run: {type(error).__name__}: {error}"
        ) from error
    return model


def restore(model: nn.Module) -> nn.Module:
    """Remove all that `retrofit` added, in place; the host's weights stay as they are now.

    Raises:
        NotRetrofitted: where there is nothing to remove.
    """
    finetuned = was_finetuned(model)
    get_plan(model)
    allow_methods(model)
    for forward in list(forwards_of(model)):
        forward.take_away()
    for module in list(model.modules()):
        if module is not model and isinstance(module._modules.get(CHILD), MASKS):
            del module._modules[CHILD]
    unguard_head(model)
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
    with in_mode(model, "original"):
        yield model


def _check_fits(plan: MergePlan, sites: Sites) -> None:
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
    flow = [row for row in plan.rows if row.scope == "FLOW"]
    slices = any(row.action == "slice" for row in flow)
    if flow and ((slices and not sites.ending.prefix_only) or not (slices or plan.unmerge)):
        raise BaseMismatch(
            "the plan leaves only prefix tokens after the last block, and something in this model reads the patch "
            "tokens there: plan for this model"
        )
    try:
        made = make_macs(sites, plan)
    except CountError as error:
        raise BaseMismatch(f"the plan does not fit this model: {error}") from error
    if made != plan.macs:
        raise BaseMismatch(
            f"the plan says {plan.macs:,} MACs and its rows make {made:,}: it was altered, or is for another model"
        )
    if plan.classes != sites.ending.classes:
        raise BaseMismatch(
            f"the plan is for {plan.classes} classes, this model has {sites.ending.classes}: change the head before "
            "planning"
        )


def build(
    model: nn.Module, sites: Sites, plan: MergePlan
) -> tuple[list[Interceptor], dict[nn.Module, nn.Module], Retrofit]:
    """Make every interceptor and mask; touch nothing."""
    device, _ = home(model)
    own = [name for name, module in model.named_modules() if hasattr(module, CHILD)]
    if own:
        raise UnsupportedBlock(
            f"{own[0] or type(model).__name__!r} of this model has an attribute {CHILD!r} of its own, which is our "
            "name for masks"
        )
    rows = {(row.site, row.scope): row for row in plan.rows}
    forwards: list[Interceptor] = []
    masks: dict[nn.Module, nn.Module] = {}
    merged, flow = False, sites.flow
    started = [index for index, site in enumerate(flow) if (site.block, site.scope) in rows]
    for index, site in enumerate(flow[started[0] :] if started else (), start=started[0] if started else 0):
        block, row = model.get_submodule(site.block), rows.get((site.block, site.scope))
        last = index == len(flow) - 1
        keep = row.tokens_out if row is not None and row.action == "slice" else None
        forwards.append(BlockForward(block, site, expects=merged, keep=keep, last=last, unmerge=last and plan.unmerge))
        if row is not None and row.action == "merge":
            masks[block] = flow_mask(block, site, row, plan)
            merged = True
    for point in sites.grid:
        if (row := rows.get((point.block, point.scope))) is not None:
            block = model.get_submodule(point.block)
            forwards.append(GridForward(block, point))
            masks[block] = grid_mask(model, point, row, plan)
    for chain in sites.local:
        if (row := rows.get((chain.block, chain.scope))) is not None:
            host, attention = model.get_submodule(chain.host), model.get_submodule(chain.attention)
            for place, name in enumerate(chain.chain):
                first, last = place == 0, place == len(chain.chain) - 1
                module = model.get_submodule(name)
                forwards.append(LocalForward(module, chain, host, first=first, last=last, attention=attention))
            masks[host] = local_mask(model, chain, row, plan)
    for module in (*masks, *(forward.block for forward in forwards)):
        if "forward" in module.__dict__:
            raise UnsupportedBlock(
                f"the forward of a {type(module).__name__} was replaced on the instance (a hook or a wrapper): remove "
                "that first"
            )
    kept = Retrofit(
        dataclasses.replace(plan, base=sites.base, fixed_inputs=sites.fixed_inputs),
        make_readout(model, plan),
        finetuned=was_finetuned(model),
        pretrained=fingerprints_of(model),
    ).to(device)
    return forwards, masks, kept.train(model.training)


def install(model: nn.Module, forwards: list[Interceptor], masks: dict[nn.Module, nn.Module], kept: Retrofit) -> None:
    """Put everything in place."""
    model._modules[CHILD] = kept
    for forward in forwards:
        forward.put_in_place()
    for host, mask in masks.items():
        if host is model:
            kept.mask = mask
        else:
            host._modules[CHILD] = mask


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
