"""Where images come from: the embedded digits, a folder, or the Hub.

The embedded data are handwritten digits on large, cluttered canvases. A digit covers a small part of its canvas and
the rest is background and fragments of other digits, so there is something to merge. The 1797 source digits are split
*before* anything is drawn: no stroke of a test digit, not even as clutter, is ever seen in training.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ltm_retrofit.config import Strict
from ltm_retrofit.errors import DataError, RecipeError, check_choice
from ltm_retrofit.finding.example import home
from ltm_retrofit.tuning.data import BUFFER, columns_of, is_stream
from ltm_retrofit.tuning.preprocessing import preprocessing_of
from ltm_retrofit.tuning.settings import check_types

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "validation", "test"]
#: source digits of each split
SPLITS: dict[Split, tuple[int, int]] = {"train": (0, 1257), "validation": (1257, 1437), "test": (1437, 1797)}
CANVAS = 64
#: images (1797, 8, 8) of 0 to 16, and labels: UCI's Optical Recognition of Handwritten Digits (see the README there)
DIGITS = Path(__file__).parent.parent / "assets" / "digits.npz"


@dataclass(frozen=True)
class DataSection(Strict):
    """Which data: the embedded ``digits`` canvases, a folder (parquet files or class folders), or a Hub id.

    ``train_per_digit`` and ``test_per_digit`` are canvases for each source digit; ``limit`` caps the training images.
    ``labelled`` says whether the training labels are read: without them the unconverted model says what is there.
    ``streaming`` reads training images as they come instead of fetching all first; the train section then says steps.
    """

    name: str = "digits"
    train_split: str = "train"
    test_split: str = "test"
    image: str = "image"
    label: str = "label"
    train_per_digit: int = 4
    test_per_digit: int = 8
    limit: int | None = None
    labelled: bool = True
    streaming: bool = False

    def __post_init__(self) -> None:
        """Check every value; nothing is corrected silently."""
        check_types(self)
        if self.streaming and self.name == "digits":
            raise RecipeError("the embedded digits are drawn, not streamed: set streaming to false")
        if self.train_split == self.test_split:
            raise RecipeError(f"train_split and test_split are both {self.train_split!r}: test on other images")
        if self.name == "digits":
            for split in (self.train_split, self.test_split):
                check_choice(split, SPLITS, "a split of the embedded digits")


def load_split(section: DataSection, split: str) -> Any:
    """Return a split as a `datasets` data set with columns ``image`` and, where labels are read, ``label``.

    Raises:
        DataError: where the data cannot be found or has no such split or columns.
    """
    test = split == section.test_split
    if section.name == "digits":
        # training canvases are drawn with another seed than those of the base's own training
        seed, per_digit = (0, section.test_per_digit) if test else (1, section.train_per_digit)
        table: Any = load_digits(cast("Split", split), per_digit=per_digit, seed=seed)
    else:
        table = _fetch(section.name, split, stream=section.streaming and not test)
        columns = columns_of(table)
        for wanted in ("image", "label") if test or section.labelled else ("image",):
            if (name := getattr(section, wanted)) not in columns:
                raise DataError(
                    f"data {section.name!r} has columns {', '.join(columns)}, not {name!r}: name its {wanted} "
                    "column in the data section"
                )
            table = table if name == wanted else table.rename_column(name, wanted)
    if test:
        return table
    if section.limit is not None and is_stream(table):
        table = table.shuffle(seed=0, buffer_size=BUFFER).take(section.limit)
    elif section.limit is not None and len(table) > section.limit:
        table = table.shuffle(seed=0).select(range(section.limit))
    return table if section.labelled else table.select_columns(["image"])


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
        found = sorted(file for file in Path(source).expanduser().rglob("*") if file.suffix.lower() in _suffixes())
    if not found:
        raise DataError(f"no image in {source!r}: give a folder with images in it, at any depth")
    if len(found) > count:
        found = [found[place] for place in sorted(Random(0).sample(range(len(found)), count))]
    prepared, (device, dtype) = preprocessing_of(model), home(model)
    return torch.stack([prepared(_opened(image)) for image in found]).to(device, dtype)


def _suffixes() -> set[str]:
    Image.init()
    return set(Image.EXTENSION)


def _opened(image: Any) -> Any:
    if not isinstance(image, str | os.PathLike):
        return image
    try:
        with Image.open(image) as file:
            file.load()
            return file.copy()
    except (OSError, ValueError) as error:
        raise DataError(f"{image} cannot be read as an image: {error}") from error


def _fetch(name: str, split: str, *, stream: bool) -> Any:
    """Return a split of a folder or of a data set on the Hub, as it is there.

    Raises:
        DataError: where there is none.
    """
    import datasets

    folder = Path(name)
    try:
        if not folder.is_dir():
            return datasets.load_dataset(name, split=split, streaming=stream)
        files = sorted(str(file) for file in folder.glob(f"{split}*.parquet"))
        kind = "parquet" if files else "imagefolder"
        # explicit files: `datasets` guesses splits from file names otherwise
        files = files or sorted(str(file) for file in (folder / split).glob("*/*") if file.is_file())
        if not files:
            raise DataError(f"{folder} has neither {split}*.parquet nor {split}/CLASS/IMAGE files")
        return datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=stream)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot load split {split!r} of data {name!r} (no such folder here, so a Hub id): "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def source_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the split's source digits: images ``(n, 8, 8)`` uint8 in 0..255, labels ``(n,)``."""
    with np.load(DIGITS) as stored:
        images, labels = stored["images"], stored["labels"]
    start, stop = SPLITS[split]
    chosen = np.random.default_rng(0).permutation(len(labels))[start:stop]
    return (images[chosen] * (255 / 16)).astype(np.uint8), labels[chosen].astype(np.int64)


def draw_canvas(
    digit: np.ndarray, others: np.ndarray, rng: np.random.Generator, *, crowded: bool = False
) -> np.ndarray:
    """Draw one canvas ``(64, 64)`` uint8: clutter cut out of ``others``, then ``digit`` at a random place and scale.

    ``crowded`` canvases have smaller digits and brighter clutter; the base is trained on them first.
    """
    scales, inks = ((2.0, 3.5), (0.4, 0.9)) if crowded else ((2.5, 4.0), (0.3, 0.7))
    canvas = np.zeros((CANVAS, CANVAS), dtype=np.float32)

    def paste(patch: np.ndarray, size: int, ink: float) -> None:
        scaled = np.asarray(Image.fromarray(patch).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
        top, left = rng.integers(0, CANVAS - size + 1, size=2)
        region = canvas[top : top + size, left : left + size]
        np.maximum(region, ink * scaled, out=region)

    for _ in range(rng.integers(6, 11)):
        side = int(rng.integers(3, 6))
        top, left = rng.integers(0, 8 - side + 1, size=2)
        fragment = others[rng.integers(len(others)), top : top + side, left : left + side]
        paste(np.ascontiguousarray(fragment), int(side * rng.uniform(2.0, 3.0)), rng.uniform(*inks))
    paste(digit, int(8 * rng.uniform(*scales)), rng.uniform(0.7, 1.0))
    noise = rng.normal(0.0, 20.0, size=canvas.shape).astype(np.float32)
    drawn: np.ndarray = np.clip(canvas + noise, 0, 255).astype(np.uint8)
    return drawn


def draw_split(split: Split, per_digit: int, seed: int, *, crowded: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``per_digit`` canvases of every source digit of a split: ``(n, 64, 64)`` uint8 and labels ``(n,)``."""
    digits, labels = source_digits(split)
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    canvases = np.stack(
        [draw_canvas(digit, digits, rng, crowded=crowded) for _ in range(per_digit) for digit in digits]
    )
    return canvases, np.tile(labels, per_digit)


def load_digits(split: Split = "train", *, per_digit: int = 1, seed: int = 0) -> datasets.Dataset:
    """Return handwritten digits on cluttered canvases: a data set that needs no download, and has something to merge.

    Example:
        >>> import ltm_retrofit as ltm
        >>> data = ltm.load_digits("validation")
        >>> data.column_names, len(data), data[0]["image"].size
        (['image', 'label'], 180, (64, 64))

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``; no digit is in two of them.
        per_digit: canvases drawn of each of the split's 1257, 180 or 360 digits.
        seed: of the drawing, and of the order.

    Returns:
        A `datasets` data set with columns ``image`` (RGB, 64 × 64) and ``label``.

    Raises:
        RecipeError: where there is no such split.
    """
    import datasets

    check_choice(split, SPLITS, "a split of the embedded digits")
    canvases, labels = draw_split(split, per_digit, seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    columns = {
        "image": [Image.fromarray(canvases[index]).convert("RGB") for index in order],
        "label": labels[order].tolist(),
    }
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(columns, features=features)
