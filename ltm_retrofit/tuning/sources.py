"""Where images come from: the embedded canvases, a folder, or the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ltm_retrofit.config import Strict
from ltm_retrofit.errors import DataError, RecipeError, check_choice
from ltm_retrofit.tuning.data import columns_of, is_stream
from ltm_retrofit.tuning.digits import SPLITS, Split, load_canvases
from ltm_retrofit.tuning.images import BUFFER


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
        for name in ("name", "train_split", "test_split", "image", "label"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise RecipeError(f"{name} must be a name, got {getattr(self, name)!r}")
        for name in ("train_per_digit", "test_per_digit", "limit"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "limit" and value is None):
                raise RecipeError(f"{name} must be a whole number from 1 on, got {value!r}")
        for name in ("labelled", "streaming"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} must be true or false, got {getattr(self, name)!r}")
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
        return _limited(load_canvases(cast("Split", split), per_digit=per_digit, seed=seed), section, test)
    import datasets

    folder, stream = Path(section.name), section.streaming and not test
    try:
        if folder.is_dir():
            files = sorted(str(file) for file in folder.glob(f"{split}*.parquet"))
            kind = "parquet" if files else "imagefolder"
            # explicit files: `datasets` guesses splits from file names otherwise
            files = files or sorted(str(file) for file in (folder / split).glob("*/*") if file.is_file())
            if not files:
                raise DataError(f"{folder} has neither {split}*.parquet nor {split}/CLASS/IMAGE files")
            table = datasets.load_dataset(kind, data_files={split: files}, split=split, streaming=stream)
        else:
            table = datasets.load_dataset(section.name, split=split, streaming=stream)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"cannot load split {split!r} of data {section.name!r} (no such folder here, so a Hub id): "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    wants = [("image", section.image), ("label", section.label)]
    columns = columns_of(table)
    for wanted, name in wants if test or section.labelled else wants[:1]:
        if name not in columns:
            raise DataError(
                f"data {section.name!r} has columns {', '.join(columns)}, not {name!r}: name its {wanted} "
                "column in the data section"
            )
        if name != wanted:
            table = table.rename_column(name, wanted)
    return _limited(table, section, test)


def _limited(table: Any, section: DataSection, test: bool) -> Any:
    if not test and section.limit is not None and is_stream(table):
        table = table.shuffle(seed=0, buffer_size=BUFFER).take(section.limit)
    elif not test and section.limit is not None and len(table) > section.limit:
        table = table.shuffle(seed=0).select(range(section.limit))
    return table if test or section.labelled else table.select_columns(["image"])
