"""Labels checked before anything is trained; batches taken apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ltm_retrofit.errors import DataError

Data = Any  # a `datasets` data set with columns image and label, or an iterable of batches

#: stands for a label where a data set has none
UNLABELLED = -1


def is_table(data: Data) -> bool:
    """Say whether data is a `datasets` data set, as opposed to a loader."""
    return hasattr(data, "column_names") and hasattr(data, "features")


def is_stream(data: Data) -> bool:
    """Say whether data is a `datasets` data set that is read as it goes by, of unknown length."""
    return is_table(data) and not hasattr(data, "__len__")


def columns_of(data: Data) -> list[str]:
    """Name a data set's columns; a stream may not know them before it has read a row."""
    return list(data.column_names or next(iter(data), {}))


def labels_in(data: Data, split: str) -> set[int]:
    """Return the labels that a data set has.

    Raises:
        DataError: where they are no whole numbers.
    """
    stored = data.with_format(None)["label"]  # as they are, without a transform of every image
    others = {str(label): label for label in stored if type(label) is not int}
    if others:
        raise DataError(
            f"the {split} split has labels that are no whole numbers: {[others[key] for key in sorted(others)][:5]}: "
            "number them with dataset.class_encode_column('label'), and drop rows without one"
        )
    return set(stored)


def classes_in(data: Data, split: str) -> list[str] | int:
    """Name the classes of a data set; where they have no names, say how many there are.

    Raises:
        DataError: where there is none, or the numbers leave some out.
    """
    names: list[str] | None = getattr((data.features or {}).get("label"), "names", None)
    if names:
        return names
    seen = sorted(labels_in(data, split))
    if not seen or seen != list(range(len(seen))):
        raise DataError(
            f"the {split} split has labels {', '.join(map(str, seen[:8])) or 'of no image'}{' …' * (len(seen) > 8)}: "
            "number the classes from 0 on without gaps, or give them names (datasets.ClassLabel)"
        )
    return len(seen)


def check_same_classes(train: Data, test: Data) -> None:
    """Check that a label means the same in two splits, as far as they say what it means.

    Raises:
        DataError: where their classes have other names.
    """
    said = [
        getattr(data.features["label"], "names", None) for data in (train, test) if "label" in (data.features or {})
    ]
    if len(said) == 2 and said[0] != said[1]:
        first, other = ("numbers" if names is None else f"classes {names[:5]}" for names in said)
        raise DataError(
            f"the training split has {first} and the test split {other}: one label would mean two things. Give both "
            "splits the same class folders"
        )


def check_labels(data: Data, classes: int, split: str, places: Sequence[int] | None = None) -> None:
    """Check a data set's columns and labels against a model's classes, which ``places`` may name for each label.

    Raises:
        DataError: columns missing, labels outside the classes, or a class that no image has.
    """
    columns = columns_of(data)
    if {"image", "label"} - set(columns):
        raise DataError(
            f"the {split} split has columns {', '.join(columns)}; expected image and label: rename them with "
            "dataset.rename_column, or name them in the recipe's data section"
        )
    if is_stream(data):
        return  # its labels are checked as they come
    if len(data) == 0:
        raise DataError(f"the {split} split is empty")
    seen = labels_in(data, split)
    if places is not None:
        seen = {places[label] if label in range(len(places)) else label for label in seen}
    outside = sorted(label for label in seen if not 0 <= label < classes)
    if outside:
        raise DataError(
            f"the {split} split has labels {outside[:5]} outside the model's {classes} classes (0 to {classes - 1}): "
            "give the model a head of as many classes as the data has"
        )
    absent = sorted(set(range(classes)) - seen)
    if absent:
        names = None if places is not None else getattr(data.features["label"], "names", None)
        shown = [names[label] if names and label < len(names) else str(label) for label in absent[:5]]
        raise DataError(
            f"no image of the {split} split has class {', '.join(shown)}{' …' if len(absent) > 5 else ''} "
            f"({len(absent)} of the model's {classes} classes): use a split that has all of them, stratified for "
            "example, or give the model another head"
        )


def split_batch(batch: Any, labelled: bool = True) -> tuple[Any, Tensor | None]:
    """Return (inputs, labels) of a loader's batch: a pair, or a mapping with ``labels`` (or ``label``).

    Where not all data is ``labelled``, also images alone, or a mapping without labels: labels are None then.

    Raises:
        DataError: where it is neither, or its labels are no numbers.
    """
    inputs, labels = _parts_of(batch, labelled)
    if labels is None and labelled:
        raise DataError("a batch has None for labels: drop images without one, or set distill")
    if labels is None or isinstance(labels, Tensor):
        return inputs, labels
    try:
        return inputs, torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the labels of a batch are no numbers: {str(labels)[:60]}: number the classes") from error


def _parts_of(batch: Any, labelled: bool) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        name = next((key for key in ("labels", "label") if key in batch), None)
        if name is not None or not labelled:
            return {key: value for key, value in batch.items() if key != name}, None if name is None else batch[name]
    elif isinstance(batch, (list, tuple)) and len(batch) == 2:
        inputs, labels = batch
        unlabelled = isinstance(labels, Tensor) and labels.ndim == 1 and bool((labels == UNLABELLED).all())
        return inputs, None if unlabelled and not labelled else labels
    elif not labelled and isinstance(batch, (list, tuple)) and len(batch) == 1:
        return batch[0], None
    elif not labelled and isinstance(batch, Tensor):
        return batch, None
    shown = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise DataError(f"a batch is (images, labels) or a dict with 'labels', got {shown}")


def size_of(inputs: Any) -> int:
    """Return the number of images in a batch's inputs."""
    first = (
        next(value for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
        if isinstance(inputs, Mapping)
        else inputs
    )
    return len(first)


def batches_on(
    loader: Iterable[Any], device: torch.device, labelled: bool = True
) -> Iterator[tuple[Any, Tensor | None]]:
    """Go through a loader, everything moved to the device."""

    def moved(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    for batch in loader:
        inputs, labels = split_batch(batch, labelled)
        if isinstance(inputs, Mapping):
            yield {key: moved(value) for key, value in inputs.items()}, moved(labels)
        else:
            yield moved(inputs), moved(labels)
