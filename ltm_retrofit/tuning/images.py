"""Images without labels, prepared for a model: to calibrate a plan on, or to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ltm_retrofit.errors import DataError
from ltm_retrofit.finding.example import home
from ltm_retrofit.tuning.preprocessing import preprocessing_of
from ltm_retrofit.tuning.sources import load_digits


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
        Image.init()  # else few suffixes are known
        files = Path(source).expanduser().rglob("*")
        found = sorted(file for file in files if file.suffix.lower() in Image.EXTENSION)
    if not found:
        raise DataError(f"no image in {source!r}: give a folder with images in it, at any depth")
    if len(found) > count:
        found = [found[place] for place in sorted(Random(0).sample(range(len(found)), count))]
    prepared, (device, dtype) = preprocessing_of(model), home(model)
    return torch.stack([prepared(_opened(image)) for image in found]).to(device, dtype)


def _opened(image: Any) -> Any:
    if not isinstance(image, str | os.PathLike):
        return image
    try:
        with Image.open(image) as file:
            file.load()
            return file.copy()
    except (OSError, ValueError) as error:
        raise DataError(f"{image} cannot be read as an image: {error}") from error
