"""The example input: checked, cut to one image, or made from what the model says of its input; and what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import ExampleError
from ltm_retrofit.undisturbed import run as run

Example = Tensor | Mapping[str, Any]


def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and floating dtype of a model's parameters."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return (channels, height, width) of the model's input where it says so, else None.

    In this order: its patch embedding, its Hugging Face config, timm's ``pretrained_cfg`` (which describes the
    checkpoint, not the model in hand).
    """
    for module in model.modules():
        size = getattr(module, "img_size", None)
        stem = next((child for child in module.children() if isinstance(child, nn.Conv2d)), None)
        if size is not None and stem is not None:
            return stem.in_channels, *_height_and_width(size)
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is not None:
        return int(getattr(config, "num_channels", 3)), *_height_and_width(size)
    declared = getattr(model, "pretrained_cfg", None)
    declared_size = declared.get("input_size") if isinstance(declared, Mapping) else None
    return tuple(declared_size) if declared_size else None


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def prepare_example(model: nn.Module, example: Example | None) -> Example:
    """Return an example of one image on which the model can be run; check what the user gave.

    Raises:
        ExampleError: where none was given and the model says nothing of its input; on wrong type, dtype or device.
    """
    device, dtype = home(model)
    if example is None:
        size = input_size(model)
        if size is None:
            raise ExampleError(
                f"{type(model).__name__} does not say what its input looks like: pass "
                "example=torch.randn(1, channels, height, width), or a dict of the model's keyword arguments"
            )
        noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        name = getattr(model, "main_input_name", None) if hasattr(model, "config") else None
        return {name: noise} if isinstance(name, str) else noise
    values = example if isinstance(example, Mapping) else {"example": example}
    # labels make a Hugging Face model add a loss; they are no input of the network
    values = {key: value for key, value in values.items() if key not in ("labels", "label")}
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ExampleError(
            f"an example is a tensor or a dict of keyword arguments with tensors, got {type(example).__name__}"
        )
    for key, value in tensors.items():
        if value.device != device and device.type != "meta":  # a model on the meta device is planned for, not run
            raise ExampleError(f"{key} is on {value.device}, the model on {device}: move one to the other")
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise ExampleError(f"{key} was made under torch.inference_mode(), so no proof can use it: pass its clone()")
        if value.ndim == 0 or len(value) == 0:
            raise ExampleError(f"{key} has shape {tuple(value.shape)}: an example holds at least one image")
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
            raise ExampleError(f"{key} holds values that are not finite: pass an image, or noise")
        if value.ndim >= 4 and value.dtype != dtype:
            raise ExampleError(f"{key} is {value.dtype}, the model {dtype}: convert one to the other")
    batch = len(next(iter(tensors.values())))
    single = {key: value[:1] if key in tensors and len(value) == batch else value for key, value in values.items()}
    return single if isinstance(example, Mapping) else single["example"]


def fixed_of(example: Example) -> dict[str, Any]:
    """Return what of an example is no image, as plain values for JSON: whole numbers, masks, settings.

    Such a tensor is a dict of ``dtype`` and nested ``values``; one on the meta device has none, and is left out.
    """
    fixed: dict[str, Any] = {}
    for key, value in example.items() if isinstance(example, Mapping) else ():
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_meta:
            fixed[key] = {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
        elif value is None or isinstance(value, (bool, int, float, str)):
            fixed[key] = value
    return fixed


def make_example(sizes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, Any], model: nn.Module) -> Example:
    """Return noise of these sizes on a model's device, and beside it what `fixed_of` noted.

    The global random state stays as it is.
    """
    device, dtype = home(model)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Any] = {
        key: torch.randn(size, generator=generator).to(device, dtype) for key, size in sizes.items() if key not in fixed
    }
    for key, value in fixed.items():
        if isinstance(value, Mapping):
            made[key] = torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]), device=device)
        else:
            made[key] = value
    return made[""] if "" in made else made


def floats_of(example: Example) -> list[Tensor]:
    """Return the floating tensors of an example that the image is in: those of three dimensions and more, if any."""
    values = example.values() if isinstance(example, Mapping) else [example]
    floats = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    return [value for value in floats if value.ndim > 2] or floats


def flags_of(example: Example) -> list[Tensor]:
    """Return the other tensors of an example: masks, counts, identifiers."""
    images = {id(value) for value in floats_of(example)}
    return [value for value in tensors_of(example) if id(value) not in images]


def in_float(example: Example) -> Example:
    """Return the same example with its floating tensors in float32."""
    return mapped(example, lambda value: value.float() if value.is_floating_point() else value)


def other_image(example: Example) -> Example:
    """Return the same example with other pixels: the same values in another order, or noise where all are one."""
    generator = torch.Generator().manual_seed(1)
    images = {id(value) for value in floats_of(example)}

    def redraw(value: Tensor) -> Tensor:
        if id(value) not in images:
            return value
        values = value.flatten()
        if bool((values == values[0]).all()):
            return torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        order = torch.randperm(len(values), generator=generator).to(value.device)
        return values[order].view(value.shape)

    return mapped(example, redraw)


def repeat_batch(example: Example, batch: int) -> Example:
    """Repeat the first image of an example to a batch; tensors that do not hold as many images stay as they are."""
    images = len(tensors_of(example)[0])
    return mapped(
        example, lambda value: value[:1].repeat(batch, *[1] * (value.ndim - 1)) if len(value) == images else value
    )


def on_meta(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Return copies on the meta device, where counting is cheap; no parameter is copied in memory on the way."""
    moved = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, moved).to("meta"), mapped(example, lambda value: value.to("meta"))


def mapped(example: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """Return the same example with each of its tensors changed."""
    if isinstance(example, Mapping):
        return {key: change(value) if isinstance(value, Tensor) else value for key, value in example.items()}
    return change(example)


def named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Go through all tensors in nested mappings, tuples and lists, depth first, each with its path: ``mask.0``.

    Not ``torch.utils._pytree``: to that, a mapping of a class that nobody registered is one leaf.
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (Mapping, tuple, list)):
        for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from named_tensors(entry, f"{path}.{key}" if path else f"{key}")


def tensors_of(value: Any) -> list[Tensor]:
    """Return all tensors of a model's output, or of a call (tensor, tuple, mapping, ``ModelOutput``), depth first."""
    return [tensor for _, tensor in named_tensors(value)]


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first argument of a call that is a tensor: the tokens, where a block is called."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def logits_of(output: Any) -> Tensor | None:
    """Return class logits ``(B, C)`` of a model's output: a plain 2-d tensor, or what HF calls ``logits``."""
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(logits, tuple) and logits and isinstance(logits[0], Tensor):
        logits = logits[0]
    return logits if isinstance(logits, Tensor) and logits.ndim == 2 else None
