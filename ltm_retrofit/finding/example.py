"""The example input: checked, cut to one image, or made from what the model says of its input; and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ltm_retrofit.errors import ExampleError
from ltm_retrofit.undisturbed import copied, undisturbed
from ltm_retrofit.undisturbed import run as run

Example = Tensor | Mapping[str, Any]

#: attribute under which a model keeps the (height, width) that was asked for
ASKED = "ltm_image_size"
#: attribute under which a model that came out of a folder of ours keeps its image processor; an older folder had
#: settings there, as timm writes them
KEPT = "ltm_preprocessing"


def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and floating dtype of a model's parameters."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Return (channels, height, width) of the images that a model is looked at with, by `sizes_said`, or None."""
    size = next(iter(sizes_said(model).values()), None)
    return None if size is None else (channels_of(model), *size)


def sizes_said(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return who says which (height, width) a model's images have, the one that is followed first.

    In this order: what was asked for; the image processor that came with its checkpoint, where all its images are of
    one size that the model takes; its patch embedding; its Hugging Face config; timm's ``pretrained_cfg`` (which
    describes the checkpoint, not the model in hand). A size that the model does not take comes last.
    """
    said: dict[str, Any] = {"patch embedding": next((size for size, _ in _patch_embeddings(model)), None)}
    said["config"] = getattr(_vision_config(model), "image_size", None)
    declared = getattr(model, "pretrained_cfg", None)
    said["pretrained_cfg"] = (declared.get("input_size") or (None,))[1:] if isinstance(declared, Mapping) else None
    live = {who: _height_and_width(size) for who, size in said.items() if size}
    asked = model.__dict__.get(ASKED)
    first = {} if asked is None else {"request": asked}
    processor = next(iter(processors_of(model).values()), None)
    made = None if processor is None else size_made(processor)
    if made is None:
        return first | live
    if made == next(iter(live.values()), None) or takes(model, made):
        return first | {"image processor": made} | live
    return first | live | {"image processor": made}


def sizes_in_words(said: Mapping[str, tuple[int, int]], tokens: int | None = None) -> str:
    """Say ``224×224 by the image processor, 257 tokens; the config says 518`` of what `sizes_said` returned."""
    who, (height, width) = next(iter(said.items()))
    text = f"{height}×{width} by the {who}" + (f", {tokens} tokens" if tokens else "")
    for other, size in said.items():
        if size != (height, width):
            text += f"; the {other} says {size[0] if size[0] == size[1] else f'{size[0]}×{size[1]}'}"
    return text


def channels_of(model: nn.Module) -> int:
    """Return how many channels a model's images have: its patch embedding's, its config's, its checkpoint's, or 3."""
    stem = next((stem.in_channels for _, stem in _patch_embeddings(model)), None)
    declared = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (None,)
    return int(stem or getattr(_vision_config(model), "num_channels", None) or declared[0] or 3)


def takes(model: nn.Module, size: tuple[int, int]) -> bool:
    """Try whether a model can be run on an image of this height and width: on the meta device, else as it is."""

    def on(move: Callable[[nn.Module, Example], tuple[nn.Module, Example]]) -> bool:
        try:
            host, example = move(model, _noise(model, (channels_of(model), *size)))
            with undisturbed(host), torch.no_grad():
                run(host, example)
        except Exception:  # a model that does not take it may fail in any way
            return False
        return True

    return on(on_meta) or on(lambda *unmoved: unmoved)


def processors_of(model: nn.Module) -> dict[str, Any]:
    """Return the image processors of transformers that came with a model, else those of its parts, by part.

    One that a folder of ours held is kept by the model. Otherwise the model's config says what folder or Hub id it was
    loaded from, and the processor is looked for there, or in the local cache of the Hub: never on the network.
    """
    found: dict[str, Any] = {}
    asked = set[str]()
    for name, part in model.named_modules():  # itself first
        kept, origin = part.__dict__.get(KEPT), origin_of(part)
        if kept is None and origin and origin not in asked and _sees(part):
            asked.add(origin)
            revision = {} if Path(origin).is_dir() else {"revision": getattr(part.config, "_commit_hash", None)}
            kept = read_processor(origin, **revision)
        if kept is not None and not isinstance(kept, Mapping):
            found[name] = kept
        if part is model and (found or origin):
            break
    return found


def origin_of(model: nn.Module) -> str:
    """Return the folder or Hub id that a transformers model was loaded from; empty for one that was not."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def read_processor(origin: str | Path, **options: Any) -> Any:
    """Return the image processor in a folder, or in the local cache of the Hub; None where there is none."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            str(origin), trust_remote_code=False, local_files_only=True, **options
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):  # none there, or none that it knows
        return None


def size_made(processor: Any, mode: str = "RGB", **options: Any) -> tuple[int, int] | None:
    """Return (height, width) of what an image processor makes of wide and of high pictures; None if of no one size."""
    try:
        shapes = {tuple(processed(processor, Image.new(mode, size), **options).shape) for size in ((75, 50), (50, 75))}
    except Exception:  # whatever it does to a picture
        return None
    (shape, *others) = shapes
    return (shape[1], shape[2]) if not others and len(shape) == 3 else None


def processed(processor: Any, image: Image.Image, **options: Any) -> Tensor:
    """Call an image processor; return the pixels ``(C, H, W)`` that it makes of one image."""
    pixels: Tensor = processor(image, return_tensors="pt", **options)["pixel_values"][0]
    return pixels


def _patch_embeddings(model: nn.Module) -> Iterator[tuple[Any, nn.Conv2d]]:
    """Go through the modules that know an image's size and have a convolution of their own: size, convolution."""
    for module in model.modules():
        size = getattr(module, "img_size", None)
        stem = next((child for child in module.children() if isinstance(child, nn.Conv2d)), None)
        if size is not None and stem is not None:
            yield size, stem


def _sees(model: nn.Module) -> bool:
    """Say whether a transformers model takes images."""
    takes_pixels = getattr(model, "main_input_name", None) == "pixel_values"
    return takes_pixels or getattr(_vision_config(model), "image_size", None) is not None


def _vision_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "vision_config", config)


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _noise(model: nn.Module, size: tuple[int, int, int]) -> Example:
    """Return one image of noise, as the model is called with it; the global random state stays as it is."""
    noise = torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(*home(model))
    name = getattr(model, "main_input_name", None) if hasattr(model, "config") else None
    return {name: noise} if isinstance(name, str) else noise


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
        return _noise(model, size)
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


def image_sizes(example: Example) -> list[tuple[int, int]]:
    """Return (height, width) of each tensor of an example that holds images (B, C, H, W)."""
    return [(value.shape[2], value.shape[3]) for value in floats_of(example) if value.ndim == 4]


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
    return copied(model, moved).to("meta"), mapped(example, lambda value: value.to("meta"))


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
