"""Adapters: what a conversion added and a short training changed, for the base checkpoint that they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ltm_retrofit.convert import restore, retrofit
from ltm_retrofit.converted.record import bytes_of, fingerprint, get_retrofit
from ltm_retrofit.converted.resizing import example_of, resized
from ltm_retrofit.errors import BaseMismatch, CheckpointError
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.saving.base import base_state, differing, is_ours, load_exactly
from ltm_retrofit.tuning.classes import NEW_CLASSIFIER, set_classes
from ltm_retrofit.undisturbed import remembered

#: an adapter that carries more than this share of the host's numbers is no adapter
MOST = 0.5


def adapter_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what an adapter file holds, and what its config says of the base.

    Masks, statistics, a classifier that is new, and every entry of the host that changed since the conversion.

    Raises:
        CheckpointError: where most of the host was trained, so that there is no base left to attach to.
    """
    before, host = get_retrofit(model).pretrained, base_state(model)
    if (size := resized(model)) is not None:
        raise CheckpointError(
            f"this {type(model).__name__} was set to inputs of {size[0]}×{size[1]} since it was converted, which its "
            "base is not: save it whole (adapter=False)"
        )
    if gone := sorted(before.keys() - host.keys()):
        raise CheckpointError(
            f"this {type(model).__name__} has lost {', '.join(gone[:3])} since it was converted, which its base has: "
            "save it whole (adapter=False)"
        )
    # a classifier that was new before the conversion, or one of another shape since
    fresh = set(model.__dict__.get(NEW_CLASSIFIER, ()))
    fresh |= {key for key in before if before[key][0] != host[key].shape}
    carried = [key for key, value in host.items() if key in fresh or before.get(key) != fingerprint(value)]
    weight = sum(host[key].numel() for key in carried if key not in fresh)
    whole = sum(value.numel() for value in host.values())
    if weight > MOST * whole:
        raise CheckpointError(
            f"{weight:,} of the {whole:,} numbers of this {type(model).__name__} changed since it was converted, so "
            "there is no base that an adapter could be attached to: save it whole (adapter=False), or train masks only"
        )
    state = {key: value for key, value in model.state_dict().items() if is_ours(key) or key in carried}
    rest = {key: value for key, value in host.items() if key not in carried}
    return state, {"carried": carried, "new_head": sorted(fresh & set(carried)), "sha256": digest_of(rest)}


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Return one SHA-256 over names, shapes, dtypes and numbers."""
    whole = hashlib.sha256()
    for key in sorted(state):
        whole.update(f"{key} {tuple(state[key].shape)} {state[key].dtype}".encode())
        whole.update(bytes_of(state[key]))
    return whole.hexdigest()


def labels_of(model: nn.Module) -> list[str]:
    """Name the classes, where the model knows what they are called; an empty list where it does not."""
    classes = range(get_retrofit(model).plan.classes)
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    declared = getattr(model, "pretrained_cfg", None)
    if isinstance(declared, Mapping) and declared.get("label_names"):
        named = dict(enumerate(declared["label_names"]))
    return [str(named[index]) for index in classes] if set(named) == set(classes) else []


def attach(
    base: nn.Module, said: Mapping[str, Any], plan: MergePlan, state: Mapping[str, Tensor], labels: list[str]
) -> nn.Module:
    """Convert a base in place, and give it the adapter's entries.

    Args:
        base: the checkpoint that the adapter was trained on.
        said: what the adapter's config says of it.
        plan: the adapter's.
        state: the adapter's entries.
        labels: names of the classes, where they are known.

    Raises:
        BaseMismatch: where this is not the base that the adapter was trained on; nothing was changed then.
        CheckpointError: where entries do not fit.
    """
    carried = set(said["carried"])
    own = base.state_dict()
    if digest_of({key: value for key, value in own.items() if key not in carried}) != said["sha256"]:
        raise BaseMismatch(
            f"this {type(base).__name__} is not the base that the adapter was trained on, or has other weights: load "
            "the same checkpoint, untouched"
        )
    held = {key: own[key].clone() for key in carried if key in own}
    put_back = remembered(base)
    try:
        if said["new_head"]:
            set_classes(base, labels or plan.classes)
        given, present = {key: state[key] for key in carried}, base.state_dict()
        if differences := differing(given, {key: value for key, value in present.items() if key in carried}):
            raise BaseMismatch(f"the adapter's entries do not fit this base: {differences}")
        base.load_state_dict(given, strict=False)
        retrofit(base.eval(), plan=plan, example=example_of(plan, base))
        present = base.state_dict()
        if differences := differing(state, {key: value for key, value in present.items() if key in state}):
            restore(base)
            raise CheckpointError(f"the adapter does not fit its plan: {differences}")
    except BaseException:
        put_back()
        base.load_state_dict(held, strict=False)
        raise
    load_exactly(base, {**base.state_dict(), **state})
    # what changed stays known as changed: an adapter of an adapter is one for the same base
    get_retrofit(base).pretrained.update({key: ((), "", 0) for key in carried})
    return base.eval()
