"""timm's ``set_input_size``, of a converted model or of what it wraps."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from ltm_retrofit.converted.record import get_retrofit
from ltm_retrofit.plan import MergePlan


def at_planned_size(model: nn.Module) -> nn.Module | None:
    """Return a copy that takes inputs of the plan's size again, after `set_input_size`; None where that cannot be."""
    plan = get_retrofit(model).plan
    if planned_size(plan) is None or not can_resize(model):
        return None
    twin = copy.deepcopy(model)
    set_size(twin, planned_size(plan))
    return twin


def planned_size(plan: MergePlan) -> tuple[int, int] | None:
    """Return height and width of the plan's images, where it is for one kind of them."""
    images = [size for size in plan.input_size.values() if len(size) == 4]
    return (images[0][2], images[0][3]) if len(images) == 1 else None


def can_resize(model: nn.Module) -> bool:
    """Say whether a model, or what it wraps, has timm's ``set_input_size``."""
    return any(True for _ in _resizable(model))


def set_size(model: nn.Module, size: tuple[int, int] | None) -> None:
    """Set a model, or what it wraps, to images of this height and width; None leaves it as it is."""
    for module in _resizable(model) if size is not None else ():
        module.set_input_size(img_size=size)  # type: ignore[operator]


def _resizable(module: nn.Module) -> Iterator[nn.Module]:
    """Return the outermost modules that have the method."""
    if callable(getattr(module, "set_input_size", None)):
        yield module
        return
    for child in module.children():
        yield from _resizable(child)
