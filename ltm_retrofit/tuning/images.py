"""Images without labels, prepared for a model: to calibrate a plan on, to look at, or to be answered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ltm_retrofit.converted.record import get_plan
from ltm_retrofit.errors import DataError, ExampleError
from ltm_retrofit.finding.example import home, shapes_in_words
from ltm_retrofit.tuning.preprocessing import Preprocessing, plain, preprocessing_of
from ltm_retrofit.tuning.sources import load_digits

#: what `gathered` takes
Images = str | os.PathLike[str] | Image.Image | Tensor | Sequence[Any]


class Prepared(NamedTuple):
    """Images as a converted model wants them."""

    names: list[str]  # of files their names; others are counted
    pixels: Tensor  # (n, C, H, W)
    opened: list[Any]  # each as it was given, or as its file has it
    argument: str  # by which the model takes them; empty where it takes them first
    wanted: Preprocessing | None  # None where its images are no pictures


def load_images(model: nn.Module, source: str | os.PathLike[str] | Sequence[Any], count: int = 32) -> Tensor:
    """Return images ``(n, C, H, W)`` as a model wants them, without labels: to calibrate on, or to look at.

    Args:
        model: whose image processor or transform prepares them.
        source: a folder with images in it, at any depth; the name ``"digits"``; or images and paths of images. Of a
            folder with more than ``count``, ``count`` are drawn, always the same.
        count: how many at most.

    Raises:
        DataError: where there are none, or a file is no image.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> ltm.load_images(model, "digits", 16).shape
        torch.Size([16, 3, 32, 32])
    """
    if not isinstance(source, str | os.PathLike):
        found = list(source)
    elif source == "digits":
        found = list(load_digits("train")["image"])
    else:
        found = _files_in(source)
    if not found:
        raise DataError(f"no image in {source!r}: give a folder with images in it, at any depth")
    if len(found) > count:
        found = [found[place] for place in sorted(Random(0).sample(range(len(found)), count))]
    prepared, (device, dtype) = preprocessing_of(model), home(model)
    return torch.stack([prepared(_opened(image)) for image in found]).to(device, dtype)


def gathered(images: Images) -> list[Any]:
    """Return images one by one: of a folder its files, of a batch ``(B, C, H, W)`` each image.

    Args:
        images: a path of an image or of a folder; an image, as PIL or an array; a tensor; or several of these.

    Raises:
        DataError: where there is none.
    """
    found: list[Any]
    if isinstance(images, str | os.PathLike):
        found = list(_files_in(images)) if Path(images).expanduser().is_dir() else [images]
    elif isinstance(images, Tensor):
        found = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, Sequence):
        found = [one for each in images for one in gathered(each)]
    else:
        found = [images]
    if not found:
        raise DataError(f"no image in {images!r}: give an image, or a folder with images in it, at any depth")
    return found


def prepare(model: nn.Module, found: Sequence[Any], first: int = 0) -> Prepared:
    """Prepare images that were gathered for a converted model, at the size that it was converted for.

    Args:
        model: a converted model.
        found: paths, images, or tensors ``(C, H, W)`` that are normalised already.
        first: the number of the first one, by which those without a name are called.

    Raises:
        DataError: where a file is no image, or nobody knows how the model wants its images.
        ExampleError: where one is of another kind or size, or the model takes no images.
    """
    sizes = get_plan(model).input_size
    argument = next((name for name, size in sizes.items() if len(size) == 4), None)
    if argument is None:
        raise ExampleError(f"{type(model).__name__} takes no images (B, C, H, W), but {shapes_in_words(sizes)}")
    _, *sides = sizes[argument]
    shape = sides[0], sides[1], sides[2]
    wanted = _preprocessing(model, shape, needed=not all(isinstance(image, Tensor) for image in found))
    names, pixels, every = [], [], []
    for place, image in enumerate(found, first):
        opened = _opened(image)
        names.append(Path(image).name if opened is not image else f"image {place}")
        every.append(opened)
        pixels.append(_pixels(opened, shape, wanted))
    return Prepared(names, torch.stack(pixels).to(*home(model)), every, argument, wanted)


def _preprocessing(model: nn.Module, shape: tuple[int, int, int], *, needed: bool) -> Preprocessing | None:
    """Return the model's preprocessing at the size that it was converted for; None where its images are no pictures.

    Raises:
        DataError: where there is none, and it is needed: not only to show an image, but to make it.
    """
    try:
        wanted = preprocessing_of(model)
    except DataError:  # it says nothing of its input; the plan does
        if needed:
            raise
        return plain(shape) if shape[0] in (1, 3) else None
    return wanted if wanted.shape == shape else plain(shape)


def _pixels(image: Any, shape: Sequence[int], wanted: Preprocessing | None) -> Tensor:
    """Return one image as the model wants it, ``(C, H, W)``."""
    if wanted is not None and isinstance(image, Image.Image | np.ndarray):
        image = wanted(image)
    several = ", ".join(map(str, shape))
    expected = f"a path, a PIL image, or a normalised floating-point tensor ({several}) or (B, {several})"
    if not isinstance(image, Tensor):
        raise ExampleError(f"image is {type(image).__name__}; expected {expected}")
    if not image.is_floating_point() or image.shape != torch.Size(shape):
        raise ExampleError(
            f"image is {image.dtype} of shape {tuple(image.shape)}; expected {expected}: the size that the model was "
            "converted for"
        )
    return image.detach()


def _files_in(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the images in a folder, at any depth."""
    Image.init()
    return sorted(file for file in Path(folder).expanduser().rglob("*") if file.suffix.lower() in Image.EXTENSION)


def _opened(image: Any) -> Any:
    if not isinstance(image, str | os.PathLike):
        return image
    try:
        with Image.open(Path(image).expanduser()) as file:
            file.load()
            return file.copy()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{image} cannot be read as an image: {reason}") from error
