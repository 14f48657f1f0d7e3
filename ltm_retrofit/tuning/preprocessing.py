"""How a model wants its images: its own image processor is called, or timm's own transform; neither is imitated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ltm_retrofit.converted.resizing import image_shape
from ltm_retrofit.errors import DataError
from ltm_retrofit.finding.example import KEPT, origin_of, processed, processors_of, size_made

#: stood in an older folder for all else where there was an image processor that could not be imitated
REFUSED = "refused"
#: of a model that nobody says anything of
PLAIN = {"mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}


@dataclass(frozen=True)
class Preprocessing:
    """Makes a model's pixels ``(C, H, W)`` of a PIL image, an array ``(H, W[, C])`` or a tensor ``(C, H, W)``.

    ``host`` is what its host brought along: it takes a PIL image of eight bits a channel.
    """

    shape: tuple[int, int, int]
    host: Callable[[Image.Image], Tensor]

    def __call__(self, image: Any) -> Tensor:
        """Make them."""
        return self.host(eight_bits(image))

    def of(self, colour: str) -> Tensor:
        """Return what becomes of a colour that Pillow knows by name, ``(C,)``."""
        return self(Image.new("RGB", (64, 64), colour))[:, self.shape[1] // 2, self.shape[2] // 2]

    def shown(self, pixels: Tensor) -> Tensor:
        """Undo what the host does to values: of pixels ``(C, H, W)``, values from 0 to 1, red first."""
        # asked of the host by plain pictures: nothing of it has to be known
        black, white, red = (self.of(colour).view(-1, 1, 1) for colour in ("black", "white", "red"))
        values = ((pixels - black) / (white - black)).clamp(0, 1)
        return values.flip(0) if int(((red - black) / (white - black)).argmax()) == 2 else values

    def seen(self, image: Image.Image) -> tuple[float, float]:
        """Return which share of an image's height and of its width is left, 0 to 1: the rest is cropped away."""
        # asked of the host, too: by pictures of the same size that grow brighter downwards, and to the right
        width, height = image.size
        level, upright = (((np.arange(side) + 0.5) / side * 255).round().astype(np.uint8) for side in (width, height))
        down = np.broadcast_to(upright[:, None], (height, width))
        right = np.broadcast_to(level, (height, width))
        tall = wide = 0.0
        for brightness in (down, right):
            ramp = Image.fromarray(np.ascontiguousarray(brightness)).convert("RGB")
            ramp.getexif()[0x0112] = image.getexif().get(0x0112, 1)  # how the camera was held: the host may turn it
            values = self.shown(self(ramp))[0]
            rows, columns = values.shape
            # from a quarter to three quarters: what a resize does at the edges plays no part
            top, bottom = values[rows // 4].mean(), values[3 * rows // 4].mean()
            left, end = values[:, columns // 4].mean(), values[:, 3 * columns // 4].mean()
            tall = max(tall, abs(float(bottom - top)) / (3 * rows // 4 - rows // 4) * rows)
            wide = max(wide, abs(float(end - left)) / (3 * columns // 4 - columns // 4) * columns)
        return min(tall, 1.0), min(wide, 1.0)


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Return what makes a model's images: transformers' image processor or timm's own transform, at the model's size.

    The size is that of `image_shape`: a converted model's is its plan's. An image processor that is of another size is
    called with its sizes scaled to that. A model that says nothing is asked for its parts, as a backbone within a
    network of one's own says it. A model that came from nowhere, built from its configuration, gets a mean and a
    deviation of one half; one that came from a folder without an image processor too, with a warning.

    Raises:
        DataError: where the model does not say its input size; where its image processor makes images of several
            sizes, or other than the model takes; where that of a model from the Hub is not in the local cache.
    """
    shape = image_shape(model)
    if shape is None:
        raise DataError(
            f"{type(model).__name__} does not say its input size, so images cannot be resized for it: pass a loader "
            "whose batches are ready for the model"
        )
    if shape[0] not in (1, 3):
        raise DataError(
            f"{type(model).__name__} wants {shape[0]} channels, and images have three or one: pass a loader whose "
            "batches are ready for the model"
        )
    hosts = _brought_along(model)
    said = [_comparable(host) for host in hosts.values()]
    if any(one != said[0] for one in said):
        raise DataError(
            f"the parts of {type(model).__name__} want their images differently ({', '.join(hosts)}): pass a loader "
            "whose batches are ready for the model"
        )
    host = next(iter(hosts.values()), None)
    if host is None:
        _say_that_none_came(model)
        host = PLAIN
    call = _timms(host, shape) if isinstance(host, Mapping) else _processors(host, shape)
    return Preprocessing(shape, call)


def plain(shape: tuple[int, int, int]) -> Preprocessing:
    """Return what makes the images, of three channels or one, of a model of which nothing but their shape is known."""
    return Preprocessing(shape, _timms(PLAIN, shape))


def _brought_along(model: nn.Module) -> dict[str, Any]:
    """Return what came with a model, else with each of its parts, by part: settings of timm's, or image processors."""
    found: dict[str, Any] = {}
    processors = processors_of(model)
    for name, part in model.named_modules():  # itself first
        if declared := _declared(part):
            found[name] = declared
        elif name in processors:
            found[name] = processors[name]
        if part is model and (found or origin_of(model)):
            break
    return found


def _declared(model: nn.Module) -> Mapping[str, Any] | None:
    """Return settings as timm writes them: an older folder's, timm's own, or those in the config of a wrapper."""
    owners = (model, getattr(model, "config", None), getattr(model, "timm_model", None))
    places = [model.__dict__.get(KEPT), *(getattr(owner, "pretrained_cfg", None) for owner in owners)]
    return next((place for place in places if isinstance(place, Mapping) and place), None)


def _comparable(host: Any) -> Any:
    from timm.data import resolve_data_config  # type: ignore[attr-defined]

    if not isinstance(host, Mapping):
        return host.to_dict()
    return {**resolve_data_config(pretrained_cfg=dict(host)), "input_size": None}  # type: ignore[no-untyped-call]


def _say_that_none_came(model: nn.Module) -> None:
    """Warn, or refuse, where a model came from somewhere, and its image processor did not.

    Raises:
        DataError: where it came from the Hub, which may have one.
    """
    origins = dict.fromkeys(origin for part in model.modules() if (origin := origin_of(part)))
    for origin in origins:
        if not Path(origin).is_dir() and origin.count("/") == 1:
            raise DataError(
                f"the image processor of {origin} is not in the local cache, so nobody knows how the model wants its "
                f"images: call transformers.AutoImageProcessor.from_pretrained({origin!r}) once, which fetches it, or "
                "pass loaders whose batches are ready for the model"
            )
        warnings.warn(
            f"no image processor found for {origin}: images are normalised with a mean and a deviation of 0.5. Where "
            "that is not what the model knows, pass loaders whose batches are ready for it",
            stacklevel=4,
        )


# ------------------------------------------------------------------------------------------------------------- timm


def _timms(declared: Mapping[str, Any], shape: tuple[int, int, int]) -> Callable[[Image.Image], Tensor]:
    """Make timm's own transform for evaluation.

    Raises:
        DataError: where it cannot be made of these settings.
    """
    from timm.data import create_transform, resolve_data_config  # type: ignore[attr-defined]
    from torchvision.transforms import Compose

    if REFUSED in declared:
        raise DataError(str(declared[REFUSED]))
    blue_first = bool(declared.get("reverse"))  # in an older folder, of an image processor that turns channels round
    try:
        settings = resolve_data_config({"input_size": shape}, dict(declared))  # type: ignore[no-untyped-call]
        for name in ("mean", "std"):
            values = _for_channels(tuple(settings[name]), shape[0])
            settings[name] = values[::-1] if blue_first else values
        transform = create_transform(**settings, is_training=False)
        call = partial(_as_timm, Compose([transform, reversed_channels]) if blue_first else transform, shape[0])
        call(Image.new("RGB", (75, 50)))
    except Exception as error:
        raise DataError(
            f"timm's transform cannot be made of what the model says of its images ({dict(declared)}): "
            f"{type(error).__name__}: {error}. Mend its pretrained_cfg, or pass loaders whose batches are ready for "
            "the model"
        ) from error
    return call


def _as_timm(transform: Callable[[Any], Tensor], channels: int, image: Image.Image) -> Tensor:
    return transform(image.convert("RGB" if channels == 3 else "L"))  # as timm's data sets do


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Average per-channel values where the live model has another number of channels than its checkpoint's."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels


# ----------------------------------------------------------------------------------------------------- transformers


def _processors(processor: Any, shape: tuple[int, int, int]) -> Callable[[Image.Image], Tensor]:
    """Return a call of an image processor that makes images of this shape.

    Raises:
        DataError: where it makes others.
    """
    return partial(_as_transformers, processor, options_for(processor, shape), shape[0])


def options_for(processor: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return what an image processor is to be called with, beside the image, so that it makes images of this shape.

    Raises:
        DataError: where it makes others all the same.
    """
    mode, options = "RGB", dict[str, Any]()
    if shape[0] == 1:
        mode, options = "L", {"do_convert_rgb": False}
        for name in ("image_mean", "image_std"):
            values = getattr(processor, name, None)
            values = values if isinstance(values, (list, tuple)) else (values or 0.0,)
            options[name] = list(_for_channels(tuple(values), 1))
    made = size_made(processor, mode, **options)
    if made is not None and made != shape[1:]:
        scales = {"height": shape[1] / made[0], "width": shape[2] / made[1]}
        for name in ("size", "crop_size"):
            if sides := {side: value for side, value in dict(getattr(processor, name, None) or {}).items() if value}:
                # the shorter edge has to reach in both directions
                options[name] = {s: round(v * scales.get(s, max(scales.values()))) for s, v in sides.items()}
        made = size_made(processor, mode, **options)
    if made != shape[1:]:
        came = "images of several sizes, or none" if made is None else f"images of {made[0]}×{made[1]}"
        raise DataError(
            f"{type(processor).__name__}, the model's image processor, makes {came}, and the model is fed images of "
            f"{shape[1]}×{shape[2]}: pass loaders whose batches are ready for the model"
        )
    return options


def _as_transformers(processor: Any, options: Mapping[str, Any], channels: int, image: Image.Image) -> Tensor:
    from transformers.image_utils import load_image

    upright = load_image(image)  # as transformers' pipelines do: turned as a camera noted it, in RGB
    return processed(processor, upright if channels == 3 else upright.convert("L"), **options)


# -------------------------------------------------------------------------------------------------------- augmentation


def make_transform(
    wanted: Preprocessing, augment: str = "none", dtype: torch.dtype = torch.float32
) -> Callable[[Any], Tensor]:
    """Return PIL image → ``(C, H, W)`` of the dtype; ``"crop"`` shifts by up to a sixteenth of the size."""
    from torchvision.transforms import v2

    steps: list[Any] = [wanted]
    if augment == "crop":
        _, *sides = wanted.shape
        steps.append(v2.RandomCrop(sides, padding=max(sides) // 16, fill=wanted.of("black").tolist()))
    steps += [] if dtype == torch.float32 else [v2.ToDtype(dtype)]
    return v2.Compose(steps)  # type: ignore[no-any-return]


def eight_bits(image: Any) -> Any:
    """Return an image of eight bits, also of an array ``(H, W[, C])`` or a tensor ``(C, H, W)``.

    Of 16 bits, Pillow would cut off all above 255, and with it transformers and timm.

    Raises:
        DataError: where it is an array of other numbers.
    """
    if isinstance(image, Tensor):
        image = (image.movedim(0, -1) if image.ndim == 3 else image).cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype not in (np.uint8, np.uint16, np.bool_):
            raise DataError(
                f"an image is an array of {image.dtype}, and the host's own preprocessing takes 8 bits a channel: give "
                "uint8 from 0 to 255, or pass a loader whose batches are ready for the model"
            )
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if str(getattr(image, "mode", "")).startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def reversed_channels(image: Tensor) -> Tensor:
    """Turn RGB ``(3, H, W)`` into BGR, or back."""
    return image.flip(0)
