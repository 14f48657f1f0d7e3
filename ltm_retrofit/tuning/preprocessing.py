"""How a model wants its images: read off timm's configuration or transformers' image processor, and tried."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config  # type: ignore[attr-defined]
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from torch import Tensor, nn

from ltm_retrofit.errors import DataError
from ltm_retrofit.finding.example import input_size

#: attribute under which a reloaded Hugging Face model keeps what its image processor said
RECORDED = "ltm_preprocessing"
#: stands there for all else where it was an image processor that does more than we do, with what is said of it
REFUSED = "refused"
#: Pillow's numbers of its filters, which image processors write down
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
ON_PIXELS = ("nearest", "bilinear", "bicubic")  # of these, what torchvision has for tensors
#: how far a smooth picture may come out from what an image processor makes of it, as a share of white
TOLERANCE = 0.05


@dataclass(frozen=True)
class Preprocessing:
    """Size, normalisation, interpolation, share of the resized image that is kept, order of the channels."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"  # of the shorter side resized; "squash" is of both, "border" of the longer one and padded
    reverse: bool = False  # blue first


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Read a model's preprocessing: the size off the live model, the rest off timm's config or HF's image processor.

    A model that says nothing is asked for its parts, as a backbone within a network of one's own says it. A model that
    came from nowhere, built from its configuration, gets a mean and a deviation of one half; one that came from
    somewhere without an image processor too, with a warning.

    Raises:
        DataError: where the model does not say its input size, or its image processor does more, or did before it was
            saved, than resizing, cropping and normalising.
    """
    size = next((size for part in model.modules() if (size := input_size(part)) is not None), None)
    if size is None:
        raise DataError(
            f"{type(model).__name__} does not say its input size, so images cannot be resized for it: pass a loader "
            "whose batches are ready for the model"
        )
    if size[0] not in (1, 3):
        raise DataError(
            f"{type(model).__name__} wants {size[0]} channels, and images have three or one: pass a loader whose "
            "batches are ready for the model"
        )
    said = _said_by(model)
    if len(set(said.values())) > 1:
        raise DataError(
            f"the parts of {type(model).__name__} want their images differently ({', '.join(said)}): pass a loader "
            "whose batches are ready for the model"
        )
    wanted = next(iter(said.values()), Preprocessing((0, 0), (0.5,), (0.5,), "bilinear"))
    mean, std = (_for_channels(values, size[0]) for values in (wanted.mean, wanted.std))
    return replace(wanted, size=size[1:], mean=mean, std=std)


def _said_by(model: nn.Module) -> dict[str, Preprocessing]:
    """Return what a model says, else what each of its parts that takes images does, by name; sizes are left out."""
    said: dict[str, Preprocessing] = {}
    asked = set()
    for name, part in model.named_modules():  # itself first
        if declared := _declared(part):
            said[name] = replace(_of_config(declared), size=(0, 0))
        elif (origin := _origin(part)) and origin not in asked and input_size(part) is not None:
            asked.add(origin)
            if (processor := _processor_of(part, origin)) is not None:
                said[name] = replace(_of_processor(processor), size=(0, 0))
        if part is model and (said or asked):
            break
    return said


def _declared(model: nn.Module) -> Mapping[str, Any] | None:
    """Return settings as timm writes them: recorded, timm's own, or those in the config of transformers' wrapper."""
    owners = (model, getattr(model, "config", None), getattr(model, "timm_model", None))
    places = [model.__dict__.get(RECORDED), *(getattr(owner, "pretrained_cfg", None) for owner in owners)]
    return next((place for place in places if isinstance(place, Mapping) and place), None)


def _of_config(declared: Mapping[str, Any]) -> Preprocessing:
    if REFUSED in declared:
        raise DataError(str(declared[REFUSED]))
    said = resolve_data_config(pretrained_cfg=dict(declared))  # type: ignore[no-untyped-call]
    size, mean, std = (tuple(said[key]) for key in ("input_size", "mean", "std"))
    interpolation, share, mode = (said[key] for key in ("interpolation", "crop_pct", "crop_mode"))
    return Preprocessing(size[1:], mean, std, interpolation, share, mode, bool(declared.get("reverse", False)))


def _origin(model: nn.Module) -> str:
    """Return what a transformers model was loaded from; empty for one that was not."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")


def _processor_of(model: nn.Module, name: str) -> Any:
    """Return the image processor beside a transformers checkpoint."""
    from transformers import AutoImageProcessor

    revision = {} if Path(name).is_dir() else {"revision": getattr(model.config, "_commit_hash", None)}
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **revision)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"no image processor found for {name} ({reason}): images are normalised with a mean and a deviation of "
            "0.5. Where that is not what the model knows, pass loaders whose batches are ready for it",
            stacklevel=4,
        )
        return None


def _of_processor(processor: Any) -> Preprocessing:
    """Read an image processor, and see that a picture comes out as from the processor itself.

    Raises:
        DataError: where it does not.
    """
    try:
        read = _read_processor(processor)
        picture = _smooth_picture()
        theirs, ours = processor(picture, return_tensors="pt")["pixel_values"][0], make_transform(read)(picture)
        away = (theirs - ours).abs().amax(dim=(1, 2)) * torch.tensor(read.std)
        if theirs.shape != ours.shape or not bool((away <= TOLERANCE).all()):
            raise ValueError(f"a picture comes out otherwise: {tuple(theirs.shape)}, off by {away.max():.2f} of white")
    except Exception as error:  # whatever an attribute that says other things than those we know leads to
        raise DataError(
            f"{type(processor).__name__} does more to an image than resizing, cropping and normalising it, or does it "
            "otherwise than can be read off it: pass loaders whose batches are ready for the model"
        ) from error
    return read


def _read_processor(processor: Any) -> Preprocessing:
    size: dict[str, Any] = dict(getattr(processor, "size", None) or {})
    crops = getattr(processor, "do_center_crop", None) and processor.crop_size
    crop: dict[str, Any] = dict(processor.crop_size) if crops else {}
    edge, share = size.get("shortest_edge"), getattr(processor, "crop_pct", None)
    resized: tuple[Any, Any] = (edge, edge) if edge else (size.get("height"), size.get("width"))
    if None in resized or "longest_edge" in size:
        raise DataError(f"it resizes to {size}")
    squash = not edge
    if share and edge and edge >= 384 and not crop:
        squash = True  # ConvNeXt's, at this size
    elif share:
        crop = crop or {"height": edge, "width": edge}
        resized = (int(resized[0] / share), int(resized[1] / share))
    if type(processor).__name__.startswith("Levit"):
        resized = (int(256 / 224 * resized[0]), int(256 / 224 * resized[1]))
    kept = (crop.get("height", resized[0]), crop.get("width", resized[1]))
    white = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    white = 1.0 if math.isclose(white, 1.0) else white
    normal = bool(processor.do_normalize)
    filtered = getattr(processor, "resample", None)
    return Preprocessing(
        kept,
        tuple(value / white for value in _three(processor.image_mean if normal else 0.0)),
        tuple(value / white for value in _three(processor.image_std if normal else 1.0)),
        filtered if isinstance(filtered, str) else FILTERS[2 if filtered is None else int(filtered)],
        kept[0] / resized[0],
        "squash" if squash else "center",
        reverse=bool(getattr(processor, "do_flip_channel_order", None)),
    )


def _three(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(values)


def _smooth_picture() -> Image.Image:
    """Draw a picture, wider than high, of which every part and every channel is another."""
    down, across = np.linspace(0, 255, 320)[:, None], np.linspace(0, 255, 480)[None, :]
    channels = (down + 0 * across, across + 0 * down, 255 - (down + across) / 4)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Average per-channel values where the live model has another number of channels than its checkpoint's."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def make_transform(
    wanted: Preprocessing, augment: str = "none", dtype: torch.dtype = torch.float32
) -> Callable[[Any], Tensor]:
    """Return PIL image → ``(C, H, W)`` of the dtype; ``"crop"`` shifts by up to a sixteenth of the size.

    Raises:
        DataError: on an interpolation that nobody knows.
    """
    from torchvision.transforms import v2

    height, width = wanted.size
    scaled = [math.floor(side / wanted.crop_pct + 1e-6) for side in (height, width)]  # as timm rounds
    if wanted.interpolation not in FILTERS:
        raise DataError(
            f"the model's images are resized by interpolation={wanted.interpolation!r}, which is none of "
            f"{', '.join(FILTERS)}: set it in its pretrained_cfg"
        )
    mode = v2.InterpolationMode[wanted.interpolation.upper()]
    colours = v2.RGB() if len(wanted.mean) == 3 else v2.Grayscale()
    if wanted.crop_mode == "border":
        fill: Any = tuple(round(255 * value) for value in wanted.mean)
        scale = ResizeKeepRatio(scaled, interpolation=wanted.interpolation, longest=1.0)  # type: ignore[no-untyped-call]
        steps: list[Any] = [colours, scale, CenterCropOrPad([height, width], fill=fill), v2.PILToTensor()]
    else:
        if wanted.crop_mode == "center" and height != width:
            resize: Any = ResizeKeepRatio(scaled, interpolation=wanted.interpolation)  # type: ignore[no-untyped-call]
        else:
            shorter = scaled if wanted.crop_mode == "squash" else scaled[:1]
            resize = v2.Resize(shorter, interpolation=mode, antialias=True)
        steps = [v2.PILToTensor(), resize]
        steps = steps if wanted.interpolation in ON_PIXELS else steps[::-1]
        steps = [colours, *steps, v2.CenterCrop([height, width])]
    if augment == "crop":
        steps.append(v2.RandomCrop([height, width], padding=max(height, width) // 16))
    if wanted.reverse:
        steps.append(reversed_channels)
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(wanted.mean), list(wanted.std))]
    steps += [] if dtype == torch.float32 else [v2.ToDtype(dtype)]
    return v2.Compose([eight_bits, *steps])  # type: ignore[no-any-return]


def eight_bits(image: Any) -> Any:
    """Return an image of eight bits, also of an array ``(H, W[, C])``; of 16, Pillow would cut off all above 255."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if str(getattr(image, "mode", "")).startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def reversed_channels(image: Tensor) -> Tensor:
    """Turn RGB ``(3, H, W)`` into BGR, or back."""
    return image.flip(0)
