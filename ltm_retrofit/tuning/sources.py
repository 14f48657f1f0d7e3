"""Where images come from: the embedded digits, a folder, or the Hub.

The embedded data are handwritten digits on large, cluttered canvases. A digit covers a small part of its canvas and
the rest is background and fragments of other digits, so there is something to merge. The 1797 source digits are split
*before* anything is drawn: no stroke of a test digit, not even as clutter, is ever seen in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from PIL import Image

from ltm_retrofit.config import Strict
from ltm_retrofit.errors import DataError, RecipeError, check_choice
from ltm_retrofit.hub import in_short, unreachable
from ltm_retrofit.tuning.data import BUFFER, columns_of, is_stream
from ltm_retrofit.tuning.settings import check_types

if TYPE_CHECKING:
    import datasets

Split = Literal["train", "validation", "test"]
#: source digits of each split
SPLITS: dict[Split, tuple[int, int]] = {"train": (0, 1257), "validation": (1257, 1437), "test": (1437, 1797)}
#: what the split is called by which the best state of a fine-tune is chosen
VALIDATION = ("validation", "valid", "val", "dev")
#: side of a canvas in pixels where nothing else is said; the embedded model was trained on such
CANVAS = 128
#: ids on the Hub: a name, or an organisation and a name
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
#: images (1797, 8, 8) of 0 to 16, and labels: UCI's Optical Recognition of Handwritten Digits (see the README there)
DIGITS = Path(__file__).parent.parent / "assets" / "digits.npz"


@dataclass(frozen=True)
class DataSection(Strict):
    """Which data: the embedded ``digits`` canvases, a folder (parquet files or class folders), or a Hub id.

    ``validation_split`` is what the best state of a fine-tune is chosen by. Left out, it is the one of VALIDATION that
    the data has; where it has none, a share of the training images is held out (`TrainConfig.held_out`).
    ``train_per_digit`` and ``test_per_digit`` are canvases for each source digit, ``canvas`` is their side in pixels;
    ``limit`` caps the training images.
    ``labelled`` says whether training and validation labels are read: without them the unconverted model says what is
    there.
    ``streaming`` reads training images as they come instead of fetching all first; the train section then says steps.
    """

    name: str = "digits"
    train_split: str = "train"
    test_split: str = "test"
    validation_split: str | None = None
    image: str = "image"
    label: str = "label"
    train_per_digit: int = 4
    test_per_digit: int = 8
    canvas: int = CANVAS
    limit: int | None = None
    labelled: bool = True
    streaming: bool = False

    def __post_init__(self) -> None:
        """Check every value; nothing is corrected silently."""
        check_types(self)
        if self.streaming and self.name == "digits":
            raise RecipeError("the embedded digits are drawn, not streamed: set streaming to false")
        splits = {"train_split": self.train_split, "test_split": self.test_split}
        splits |= {} if self.validation_split is None else {"validation_split": self.validation_split}
        for one, other in combinations(splits, 2):
            if splits[one] == splits[other]:
                raise RecipeError(f"{one} and {other} are both {splits[one]!r}: take other images for each")
        if self.name == "digits":
            for split in splits.values():
                check_choice(split, SPLITS, "a split of the embedded digits")


def load_split(section: DataSection, split: str) -> Any:
    """Return a split as a `datasets` data set with columns ``image`` and, where labels are read, ``label``.

    Raises:
        DataError: where the data cannot be found or has no such split or columns.
    """
    test, train = split == section.test_split, split == section.train_split
    if section.name == "digits":
        # training canvases are drawn with another seed than those of the base's own training
        seed, per_digit = (1, section.train_per_digit) if train else (0, section.test_per_digit)
        table: Any = load_digits(cast("Split", split), per_digit=per_digit, seed=seed, canvas=section.canvas)
    else:
        table = _fetch(section.name, split, stream=section.streaming and train)
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
    if not train:
        return table if section.labelled else table.select_columns(["image"])
    if section.limit is not None and is_stream(table):
        table = table.shuffle(seed=0, buffer_size=BUFFER).take(section.limit)
    elif section.limit is not None and len(table) > section.limit:
        table = table.shuffle(seed=0).select(range(section.limit))
    return table if section.labelled else table.select_columns(["image"])


def load_validation(section: DataSection) -> Any:
    """Return the validation split, as `load_split` does; None where the section names none and the data has none.

    Raises:
        DataError: where the section names one that is not there, or it lacks columns.
    """
    split = section.validation_split
    if split is None:
        taken = (section.train_split, section.test_split)
        split = next((name for name in _splits_in(section.name) if name in VALIDATION and name not in taken), None)
    return None if split is None else load_split(section, split)


def _splits_in(name: str) -> list[str]:
    """Name the splits that data has: of a folder those of VALIDATION, of the Hub's all.

    Raises:
        DataError: where the Hub cannot be asked.
    """
    import datasets

    if name == "digits":
        return list(SPLITS)
    if (folder := Path(name)).is_dir():
        return [split for split in VALIDATION if any(folder.glob(f"{split}*.parquet")) or (folder / split).is_dir()]
    try:
        return list(datasets.get_dataset_split_names(name))
    except Exception as error:
        raise DataError(f"cannot ask for the splits of data {name!r}: {type(error).__name__}: {error}") from error


def _fetch(name: str, split: str, *, stream: bool) -> Any:
    """Return a split of a folder or of a data set on the Hub, as it is there.

    Raises:
        DataError: where there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _in_folder(folder, split, stream=stream)
    if folder.exists():
        raise DataError(f"data {name!r} is a file: give the folder that holds {split}/CLASS/IMAGE or {split}*.parquet")
    if not HUB_ID.fullmatch(name):
        there = next(place for place in folder.absolute().parents if place.is_dir())
        raise DataError(f"there is no folder {name}: {there} has {_some_names(there)}. Check the path")
    return _on_hub(name, split, stream=stream)


def _in_folder(folder: Path, split: str, *, stream: bool) -> Any:
    """Return a split of a folder: parquet files, or class folders. Not by way of `datasets`' builders where that helps.

    They guess splits from file names, copy all into a cache, and say "Downloading data" of what lies here.
    """
    import datasets

    files = sorted(str(file) for file in folder.glob(f"{split}*.parquet"))
    try:
        if files:
            with _without_bars():
                return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=stream)
        Image.init()
        known = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
        images = sorted(file for file in (folder / split).glob("*/*") if file.suffix.lower() in known)
        if not images:
            found = f"; it has {_some_names(folder)}" if not (folder / split).is_dir() else ""
            raise DataError(
                f"{folder} has neither {split}*.parquet nor {split}/CLASS/IMAGE files{found}. Put the images of each "
                f"class into a folder of their own below {folder / split}"
            )
        names = sorted({file.parent.name for file in images})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        columns = {"image": [str(file) for file in images], "label": [names.index(file.parent.name) for file in images]}
        table = datasets.Dataset.from_dict(columns, features=features, split=datasets.NamedSplit(split))
        return table.to_iterable_dataset() if stream else table
    except DataError:
        raise
    except Exception as error:  # whatever a foreign file does to a loader
        raise DataError(f"cannot load split {split!r} of the folder {folder}: {in_short(error)}") from error


def _on_hub(name: str, split: str, *, stream: bool) -> Any:
    """Return a split of a data set on the Hub; where that does not answer, of its copy in the cache."""
    import datasets

    missing = unreachable(name, "dataset")
    before = datasets.config.HF_HUB_OFFLINE
    try:
        # asked already, and in vain: `datasets` would ask five times more, before it looks into its cache
        datasets.config.HF_HUB_OFFLINE = before or bool(missing)
        return datasets.load_dataset(name, split=split, streaming=stream)
    except Exception as error:  # httpx, huggingface_hub and the file system each have their own
        raise DataError(
            f"cannot load split {split!r} of data {name!r}: there is no such folder here, and from the Hugging Face "
            f"Hub it cannot be had ({missing or in_short(error)}). Check the path or the name"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the bars of `datasets` away meanwhile, whose words are of downloads."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def _some_names(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return ", ".join(names[:6]) + " …" * (len(names) > 6) if names else "nothing in it"


def source_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the split's source digits: images ``(n, 8, 8)`` uint8 in 0..255, labels ``(n,)``."""
    with np.load(DIGITS) as stored:
        images, labels = stored["images"], stored["labels"]
    start, stop = SPLITS[split]
    chosen = np.random.default_rng(0).permutation(len(labels))[start:stop]
    return (images[chosen] * (255 / 16)).astype(np.uint8), labels[chosen].astype(np.int64)


def draw_canvas(
    digit: np.ndarray, others: np.ndarray, rng: np.random.Generator, *, canvas: int = CANVAS, crowded: bool = False
) -> np.ndarray:
    """Draw ``(canvas, canvas)`` uint8: clutter cut out of ``others``, then ``digit`` at a random place and scale.

    The digit is of 20 to 32 pixels on every canvas; clutter grows with its side. ``crowded`` canvases have smaller
    digits and brighter clutter; the base is trained on them first.
    """
    scales, inks = ((2.0, 3.5), (0.4, 0.9)) if crowded else ((2.5, 4.0), (0.3, 0.7))
    drawn = np.zeros((canvas, canvas), dtype=np.float32)

    def paste(patch: np.ndarray, size: int, ink: float) -> None:
        scaled = np.asarray(Image.fromarray(patch).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)
        top, left = rng.integers(0, canvas - size + 1, size=2)
        region = drawn[top : top + size, left : left + size]
        np.maximum(region, ink * scaled, out=region)

    for _ in range(rng.integers(6 * canvas // 64, 10 * canvas // 64 + 1)):
        side = int(rng.integers(3, 6))
        top, left = rng.integers(0, 8 - side + 1, size=2)
        fragment = others[rng.integers(len(others)), top : top + side, left : left + side]
        paste(np.ascontiguousarray(fragment), int(side * rng.uniform(2.0, 3.0)), rng.uniform(*inks))
    paste(digit, int(8 * rng.uniform(*scales)), rng.uniform(0.7, 1.0))
    noise = rng.normal(0.0, 20.0, size=drawn.shape).astype(np.float32)
    noisy: np.ndarray = np.clip(drawn + noise, 0, 255).astype(np.uint8)
    return noisy


def draw_split(split: Split, per_digit: int, seed: int, **drawing: Any) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``per_digit`` canvases of every digit of a split: ``(n, canvas, canvas)`` uint8 and labels ``(n,)``."""
    digits, labels = source_digits(split)
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    canvases = [draw_canvas(digit, digits, rng, **drawing) for _ in range(per_digit) for digit in digits]
    return np.stack(canvases), np.tile(labels, per_digit)


def load_digits(split: Split = "train", *, per_digit: int = 1, seed: int = 0, canvas: int = CANVAS) -> datasets.Dataset:
    """Return handwritten digits on cluttered canvases: a data set that needs no download, and has something to merge.

    Example:
        >>> import ltm_retrofit as ltm
        >>> data = ltm.load_digits("validation")
        >>> data.column_names, len(data), data[0]["image"].size
        (['image', 'label'], 180, (128, 128))

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``; no digit is in two of them.
        per_digit: canvases drawn of each of the split's 1257, 180 or 360 digits.
        seed: of the drawing, and of the order.
        canvas: side of an image in pixels. A digit is of 20 to 32 pixels on any.

    Returns:
        A `datasets` data set with columns ``image`` (RGB, canvas × canvas) and ``label``.

    Raises:
        RecipeError: where there is no such split, or a digit may not fit.
    """
    import datasets

    check_choice(split, SPLITS, "a split of the embedded digits")
    if canvas < 32:
        raise RecipeError(f"canvas is {canvas}: digits are up to 32 pixels high, so take at least that")
    canvases, labels = draw_split(split, per_digit, seed, canvas=canvas)
    order = np.random.default_rng(seed).permutation(len(labels))
    columns = {
        "image": [Image.fromarray(canvases[index]).convert("RGB") for index in order],
        "label": labels[order].tolist(),
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[*"0123456789"])})
    return datasets.Dataset.from_dict(columns, features=features)
