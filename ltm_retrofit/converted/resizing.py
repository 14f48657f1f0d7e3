"""Inputs that a converted model takes: of its plan's size, or of another that timm's ``set_input_size`` gave it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ltm_retrofit.converted.record import get_plan, in_mode, is_retrofitted
from ltm_retrofit.errors import CheckpointError, ExampleError, in_words
from ltm_retrofit.finding.example import (
    ASKED,
    Example,
    input_size,
    make_example,
    on_meta,
    prepare_example,
    run,
    shapes_in_words,
    sizes_in_words,
    sizes_said,
    takes,
)
from ltm_retrofit.macs import count_macs_quick
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.undisturbed import copied, undisturbed


def at_planned_size(model: nn.Module) -> nn.Module | None:
    """Return a copy that takes inputs of the plan's size again, after `set_input_size`; None where that cannot be."""
    size = planned_size(get_plan(model))
    if size is None or not can_resize(model):
        return None
    twin = copied(model)
    set_size(twin, size)
    return twin


def planned_size(plan: MergePlan) -> tuple[int, int] | None:
    """Return height and width of the plan's images, where it is for one kind of them."""
    images = [size for size in plan.input_size.values() if len(size) == 4]
    return (images[0][2], images[0][3]) if len(images) == 1 else None


def can_resize(model: nn.Module) -> bool:
    """Say whether a model, or what it wraps, has timm's ``set_input_size``."""
    return any(True for _ in _resizable(model))


def set_size(model: nn.Module, size: tuple[int, int] | None) -> None:
    """Set a model, or what it wraps, to images of this height and width; None changes nothing."""
    for module in _resizable(model) if size is not None else ():
        module.set_input_size(img_size=size)  # type: ignore[operator]


def _resizable(module: nn.Module) -> Iterator[nn.Module]:
    """Return the outermost modules that have the method."""
    if callable(getattr(module, "set_input_size", None)):
        yield module
        return
    for child in module.children():
        yield from _resizable(child)


def example_of(plan: MergePlan, model: nn.Module) -> Example:
    """Make an input of the size that a plan is for; the global random state stays the same.

    Raises:
        CheckpointError: where the plan's inputs beside the image cannot be made.
    """
    try:
        return make_example(plan.input_size, plan.fixed_inputs, model)
    except Exception as error:  # a plan from a file is foreign input
        raise CheckpointError(f"the plan's inputs cannot be made: {type(error).__name__}: {in_words(error)}") from error


def present_example(model: nn.Module) -> Example:
    """Make an input that a model takes now: a converted one of its plan's size, unless `set_input_size` changed it."""
    if is_retrofitted(model):
        size, shape = planned_size(get_plan(model)), image_shape(model)
        if size is None or shape is None or shape[1:] == size:
            return example_of(get_plan(model), model)
    return prepare_example(model, None)


def image_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """Return (channels, height, width) of the images that a model is fed; None where nobody knows.

    Those of a converted model are its plan's, unless `set_input_size` changed them. A network that says nothing of its
    images is asked for its parts, as a backbone within it says it.
    """
    said = next((shape for part in model.modules() if (shape := input_size(part)) is not None), None)
    if is_retrofitted(model) and (size := planned_size(get_plan(model))) is not None:
        if said is None or said[1:] == size or not can_resize(model) or takes(model, size):
            channels = next(shape[1] for shape in get_plan(model).input_size.values() if len(shape) == 4)
            return channels, *size
    return said


def sizes_now(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return who says which (height, width) the images have that a model is fed, the one that is followed first.

    Of a converted model it is what its plan noted; ``"plan"`` where that notes no source.
    """
    shape = image_shape(model)
    if shape is None or not is_retrofitted(model):
        return sizes_said(model)
    noted = get_plan(model).sizes_said or {"plan": shape[1:]}
    return noted if next(iter(noted.values())) == shape[1:] else sizes_said(model)


def ask_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Have a model looked at, fed and measured with images of this (height, width), whatever it says itself.

    Where it has timm's ``set_input_size``, that is called. A converted model keeps to its plan.

    Raises:
        ExampleError: where it does not take them; nothing is changed then.
    """
    if is_retrofitted(model):
        if (planned := planned_size(get_plan(model))) == size:
            return
        raise ExampleError(
            f"this model is converted for images of {planned}, not {size}: convert the original for that size, or "
            "leave the size out"
        )
    try:
        twin, _ = on_meta(model, {})
        set_size(twin, size)
        taken = takes(twin if can_resize(model) else model, size)
        reason = ""
    except Exception as error:  # timm's own checks
        taken, reason = False, f": {in_words(error)}"
    if not taken:
        said = sizes_said(model)
        raise ExampleError(
            f"{type(model).__name__} does not take images of {size[0]}×{size[1]}{reason}"
            + (f". It is made for {sizes_in_words(said)}" if said else "")
        )
    set_size(model, size)
    model.__dict__[ASKED] = size


def resized(model: nn.Module) -> tuple[int, int] | None:
    """Return the input size (H, W) that `set_input_size` gave a converted model; None where it takes its plan's.

    Raises:
        CheckpointError: where it takes its plan's inputs no longer, and cannot be set to them.
    """
    plan = get_plan(model)
    macs = _original_macs(model, plan)
    if macs == plan.macs_original or (macs is None and not can_resize(model)):
        return None
    twin, size = at_planned_size(model), input_size(model)
    if twin is None or size is None or _original_macs(twin, plan) != plan.macs_original:
        raise CheckpointError(
            f"this {type(model).__name__} no longer is what its plan was made for: on "
            f"{shapes_in_words(plan.input_size)} it does not cost the plan's {plan.macs_original:,} MACs, "
            "or does not run. Undo what was changed (LoRA by merge_and_unload, replaced modules, another patch size), "
            "or call ltm_retrofit.restore(model) and retrofit the model that you have"
        )
    return size[1:]


def size_from(value: Any) -> tuple[int, int] | None:
    """Read the size that a folder says its model was set to.

    Raises:
        CheckpointError: where it is no size.
    """
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int and side > 0 for side in value):
        raise CheckpointError(f"resized must be [height, width], got {value!r}")
    return value[0], value[1]


def _original_macs(model: nn.Module, plan: MergePlan) -> int | None:
    """Count what the original path costs on the plan's inputs; None where it does not take them."""
    example = example_of(plan, model)
    try:
        with in_mode(model, "original"), undisturbed(model), torch.no_grad():
            return count_macs_quick(lambda: run(model, example))
    except Exception:  # a model of another size may fail in any way
        return None
