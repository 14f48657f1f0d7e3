"""Transforms from the model's own configuration; labels checked before anything is trained; batches taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import DataError
from ltm_retrofit.graph.example import input_size

AUGMENTS = ("none", "crop")
#: attribute under which a reloaded Hugging Face model keeps what its image processor said
RECORDED = "ltm_preprocessing"
Data = Any  # a `datasets` data set with columns image and label, or an iterable of batches


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images: size, normalisation, interpolation, share of the resized image that is kept."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    squash: bool = False  # resize both sides, instead of the shorter one and cropping


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Read a model's preprocessing: the size off the live model, the rest off timm's config or HF's image processor.

    Raises:
        DataError: where the model does not say its input size.
    """
    size = input_size(model)
    if size is None:
        raise DataError(
            f"{type(model).__name__} does not say its input size, so images cannot be resized for it: pass a loader "
            "whose batches are ready for the model"
        )
    declared = model.__dict__.get(RECORDED) or getattr(model, "pretrained_cfg", None)
    if isinstance(declared, Mapping):
        mean, std = (_for_channels(declared[key], size[0]) for key in ("mean", "std"))
        squash = declared.get("crop_mode") == "squash"
        return Preprocessing(size[1:], mean, std, declared["interpolation"], declared["crop_pct"], squash)
    folder = Path(getattr(getattr(model, "config", None), "_name_or_path", "") or "/nowhere")
    if (folder / "preprocessor_config.json").is_file():
        from transformers import AutoImageProcessor

        processor: Any = AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
        # image processors of transformers resize both sides, unless they say a shortest edge
        squash = "shortest_edge" not in (getattr(processor, "size", None) or {})
        mean, std = (_for_channels(values, size[0]) for values in (processor.image_mean, processor.image_std))
        mode = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(int(getattr(processor, "resample", 3) or 0), "bicubic")
        return Preprocessing(size[1:], mean, std, mode, squash=squash)
    half = (0.5,) * size[0]
    return Preprocessing(size[1:], half, half, "bilinear")


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Average per-channel values where the live model has another number of channels than its checkpoint's."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def make_transform(wanted: Preprocessing, augment: str = "none") -> Callable[[Any], Tensor]:
    """Return PIL image → ``(C, H, W)``; ``"crop"`` shifts by up to a sixteenth of the size."""
    from torchvision.transforms import v2

    height, width = wanted.size
    scaled = [round(height / wanted.crop_pct), round(width / wanted.crop_pct)]
    mode = getattr(v2.InterpolationMode, wanted.interpolation.upper(), v2.InterpolationMode.BICUBIC)
    steps: list[Any] = [v2.RGB() if len(wanted.mean) == 3 else v2.Grayscale(), v2.PILToTensor()]
    shorter = scaled if wanted.squash or height != width else scaled[:1]
    steps += [v2.Resize(shorter, interpolation=mode, antialias=True), v2.CenterCrop([height, width])]
    if augment == "crop":
        steps.append(v2.RandomCrop([height, width], padding=max(height, width) // 16))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(wanted.mean), list(wanted.std))]
    return v2.Compose(steps)  # type: ignore[no-any-return]


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


def check_labels(data: Data, classes: int, split: str) -> None:
    """Check a data set's columns and labels against a model's classes.

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
    seen = set(data["label"])
    outside = sorted((label for label in seen if not isinstance(label, int) or not 0 <= label < classes), key=str)
    if outside:
        raise DataError(
            f"the {split} split has labels {outside[:5]} outside the model's {classes} classes (0 to {classes - 1}): "
            "give the model a head of as many classes as the data has"
        )
    absent = sorted(set(range(classes)) - seen)
    if absent:
        names = getattr(data.features["label"], "names", None)
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
        DataError: where it is neither.
    """
    labels: Any = None
    if isinstance(batch, Mapping):
        name = next((key for key in ("labels", "label") if key in batch), None)
        if name is not None or not labelled:
            return {key: value for key, value in batch.items() if key != name}, None if name is None else batch[name]
    elif isinstance(batch, (list, tuple)) and len(batch) == 2:
        inputs, labels = batch
        if isinstance(labels, Tensor) and labels.ndim == 1 and bool((labels == UNLABELLED).all()) and not labelled:
            labels = None
        return inputs, labels
    elif not labelled and isinstance(batch, (list, tuple)) and len(batch) == 1:
        return batch[0], None
    elif not labelled and isinstance(batch, Tensor):
        return batch, None
    shown = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
    raise DataError(f"a batch is (images, labels) or a dict with 'labels', got {shown}")


def size_of(inputs: Any) -> int:
    """Return the number of images in a batch's inputs."""
    first = (
        next(value for value in inputs.values() if isinstance(value, Tensor)) if isinstance(inputs, Mapping) else inputs
    )
    return len(first)


def batches_on(
    loader: Iterable[Any], device: torch.device, labelled: bool = True
) -> Iterator[tuple[Any, Tensor | None]]:
    """Go through a loader, everything moved to the device."""
    for batch in loader:
        inputs, labels = split_batch(batch, labelled)
        if isinstance(inputs, Mapping):
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        else:
            inputs = inputs.to(device)
        yield inputs, None if labels is None else labels.to(device)
