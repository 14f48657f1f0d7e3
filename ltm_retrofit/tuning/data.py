"""How data become batches: in which order, from any place on, epoch after epoch.

Over 400 lines: the way of an image from a data set through order, loader and epochs into a batch. To go on where a run
was interrupted, all of these have to agree.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ltm_retrofit.errors import CheckpointError, DataError
from ltm_retrofit.finding.example import home
from ltm_retrofit.tuning import checkpoints
from ltm_retrofit.tuning.preprocessing import make_transform, preprocessing_of
from ltm_retrofit.tuning.processes import Accelerator, shared
from ltm_retrofit.tuning.settings import TrainConfig

Data = Any  # a `datasets` data set with columns image and label, or an iterable of batches
Transform = Callable[[Any], Tensor]
ClassOf = Sequence[int] | None  # the model's class of each label, where they differ

#: what a column of classes is called elsewhere
LABELS = ("labels", "target", "targets", "class", "category", "fine_label")
#: stands for a label where a data set has none
UNLABELLED = -1
#: images of a stream that are shuffled among each other
BUFFER = 1000
#: stands for the batch after the last one
END = object()


def is_table(data: Data) -> bool:
    """Say whether data is a `datasets` data set, as opposed to a loader."""
    return hasattr(data, "column_names") and hasattr(data, "features")


def is_stream(data: Data) -> bool:
    """Say whether data is a `datasets` data set that is read as it goes by, of unknown length."""
    return is_table(data) and not hasattr(data, "__len__")


def columns_of(data: Data) -> list[str]:
    """Name a data set's columns; a stream may not know them before it has read its first image."""
    return list(data.column_names or next(iter(data), {}))


def has_labels(data: Data) -> bool:
    """Say whether a data set has a column ``label``.

    Raises:
        DataError: where it has none, but another one that looks like it: it would be learned from as if without labels.
    """
    columns, features = columns_of(data), data.features or {}
    likely = [name for name in columns if name in LABELS or hasattr(features.get(name), "names")]
    if "label" not in columns and likely:
        raise DataError(
            f"the data set has no column 'label', but {likely[0]!r}: data.rename_column({likely[0]!r}, 'label') to "
            f"learn from it, data.remove_columns({likely[0]!r}) to learn without labels"
        )
    return "label" in columns


def check_kind(data: Any, name: str) -> None:
    """Check that data is a data set or a loader.

    Raises:
        DataError: where it is a path, several splits, or no data at all, with the way from there.
    """
    if isinstance(data, str | os.PathLike):
        raise DataError(
            f"{name} is the path {str(data)!r}: load it, datasets.load_dataset('imagefolder', data_dir={str(data)!r}, "
            "split='train'), or use the command line, which takes folders"
        )
    if isinstance(data, Mapping):
        raise DataError(f"{name} is a dict of {', '.join(map(repr, data))}: pass one of them, {name}[...]")
    if isinstance(data, TrainConfig):
        raise DataError(f"{name} is a TrainConfig: pass it by name, config=TrainConfig(...)")


# ------------------------------------------------------------------------------------------- images of a data set


class Order(Sampler[tuple[int, int]]):
    """Which image comes when in a pass through the data, and the seed of its augmentation.

    Both follow from seed, pass and image alone. So a run goes on with the images that were next, whatever the number
    of workers, and reads none of the earlier ones again.
    """

    def __init__(self, count: int, shuffle: bool, seed: int) -> None:
        self.count, self.shuffle, self.seed = count, shuffle, seed
        self.begin(0)

    def begin(self, turn: int, first: int = 0) -> None:
        """Let the next pass be this one, without its ``first`` images."""
        self.turn, self.first = turn, first

    def __len__(self) -> int:
        """Count the images of a pass."""
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield index and seed."""
        indices = torch.arange(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.turn))
            indices = torch.randperm(self.count, generator=generator)
        for index in indices[self.first :].tolist():
            yield index, seed_of(self.seed, self.turn, index)


def seed_of(*numbers: int) -> int:
    """Return a seed that depends on all of these numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


class Images(Dataset[tuple[Tensor, int]]):
    """The images of a `datasets` data set as (image, label), by index and seed.

    Args:
        data: the data set.
        transform: of an image.
        limit: share of the images that may be unreadable; in place of each comes the next one in the data set.
        class_of: the model's class of each label, where they differ.

    Raises:
        DataError: where a transform of the data set's own leaves no image.
    """

    def __init__(self, data: Any, transform: Transform, limit: float, class_of: ClassOf = None) -> None:
        self.data, self.decode = undecoded(data)
        if self.data.format["type"] is not None and "image" not in (first := self.data[0]):
            raise DataError(
                f"the data set's own transform gives {', '.join(map(str, first))}, no image: call reset_format() on "
                "it, or pass a DataLoader of its batches"
            )
        self.transform, self.limit, self.class_of = transform, limit, class_of
        # shared with the loader's workers, which write into it
        self.unreadable = torch.zeros(len(data), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Return image and label.

        Raises:
            DataError: where more than the accepted share of images cannot be read.
        """
        index, seed = key
        while True:
            entry = self.data[index]
            try:
                image = self.decode(entry["image"])
                break
            except Exception as error:  # whatever a decoder makes of damaged bytes
                self._count(index, entry, error)
                index = (index + 1) % len(self)
        return seeded(self.transform, image, seed), label_of(entry, self.class_of)

    def _count(self, index: int, entry: Mapping[str, Any], error: Exception) -> None:
        self.unreadable[index] = True
        if (found := int(self.unreadable.sum())) > self.limit * len(self) or found == len(self):
            raise too_many(f"{found} of {len(self)} images", name_of(entry, index), self.limit, error) from error

    def damaged(self) -> list[int]:
        """Return which images this process could not read so far."""
        return [int(index) for index in self.unreadable.nonzero()]

    def digest(self) -> str:
        """Return a digest of the first, the middle and the last image, as they are stored."""
        found = hashlib.blake2b(digest_size=8)
        stored, _ = undecoded(self.data.with_format(None))  # without the user's transform, which may be random
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            entry = stored[index]
            image = entry["image"]
            if isinstance(image, dict) and image["bytes"] is None:
                path = Path(image["path"] or "")  # may be missing, within an archive, or on a server
                image = path.read_bytes() if path.is_file() else path.name
            elif isinstance(image, dict):
                image = image["bytes"]
            found.update(image if isinstance(image, bytes) else repr(image).encode())
            found.update(repr(entry.get("label")).encode())
        return found.hexdigest()


class Stream(IterableDataset[tuple[Tensor, int]]):
    """A streamed `datasets` data set as (image, label), shuffled within a buffer.

    Args:
        data: the data set.
        transform: of an image.
        config: seed, workers, of which each counts what it cannot read, and the share of the images so far, or of as
            many as the buffer holds, that may be unreadable; they are left out.
        class_of: the model's class of each label, where they differ.
        shuffle: whether to.
    """

    def __init__(self, data: Any, transform: Transform, config: TrainConfig, class_of: ClassOf, shuffle: bool) -> None:
        self.data, self.decode = undecoded(data.shuffle(seed=config.seed, buffer_size=BUFFER) if shuffle else data)
        self.transform, self.class_of, self.seed, self.limit = transform, class_of, config.seed, config.unreadable
        found = torch.zeros(max(1, config.workers), dtype=torch.long)
        self.unreadable = found.share_memory_()  # type: ignore[no-untyped-call]
        self.begin(0)

    def begin(self, turn: int) -> None:
        """Let the next pass be this one."""
        self.turn = turn
        self.data.set_epoch(turn)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Yield images and labels; `datasets` shares its files out among the loader's workers.

        Raises:
            DataError: where more than the accepted share of images cannot be read.
        """
        worker, found = getattr(get_worker_info(), "id", 0), 0
        for index, entry in enumerate(self.data):
            try:
                image = self.decode(entry["image"])
            except Exception as error:  # whatever a decoder makes of damaged bytes
                found += 1
                # the most of any pass: workers may have begun the next one while this one is still being learned
                self.unreadable[worker] = max(found, int(self.unreadable[worker]))
                if found > self.limit * max(index + 1, BUFFER):
                    some = f"{found} of the stream's first {index + 1} images"
                    raise too_many(some, name_of(entry, index), self.limit, error) from error
                continue
            seed = seed_of(self.seed, self.turn, worker, index)
            yield seeded(self.transform, image, seed), label_of(entry, self.class_of)

    def damaged(self) -> list[int]:
        """Return as many numbers as there were images in one pass that this process could not read."""
        return list(range(int(self.unreadable.sum())))


def too_many(some: str, last: str, limit: float, error: Exception) -> DataError:
    """Return what to raise where more images cannot be read than are accepted."""
    return DataError(
        f"{some} cannot be read, the last one found is {last} ({type(error).__name__}: {error}); accepted is a share "
        f"of {limit:g}: remove them, or raise TrainConfig.unreadable for training"
    )


def name_of(entry: Mapping[str, Any], index: int) -> str:
    """Return the file that an undecoded image lies in; where nothing says, its number."""
    image = entry["image"]
    path = image.get("path") if isinstance(image, Mapping) else getattr(image, "filename", None)
    return str(path or f"image {index}")


def label_of(entry: Mapping[str, Any], class_of: ClassOf) -> int:
    """Return the model's class of an image; `UNLABELLED` where the data has none.

    Raises:
        DataError: where it is no whole number.
    """
    label = entry.get("label", UNLABELLED)
    label = label.item() if hasattr(label, "item") else label
    if type(label) is not int or label < UNLABELLED or (class_of is not None and label >= len(class_of)):
        raise DataError(
            f"an image has the label {label!r}, and labels are whole numbers from 0 on: drop images without one, or "
            "leave the column out and set distill"
        )
    return label if class_of is None or label == UNLABELLED else class_of[label]


def undecoded(data: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return a data set whose images come as bytes, and what decodes one; unchanged where they come otherwise."""
    from datasets import Image

    feature = (data.features or {}).get("image")
    custom = getattr(data, "format", {"type": None})["type"] is not None
    if not isinstance(feature, Image) or not feature.decode or custom:
        return data, lambda image: image
    return data.cast_column("image", Image(mode=feature.mode, decode=False)), feature.decode_example


def seeded(transform: Transform, image: Any, seed: int) -> Tensor:
    """Transform an image with random numbers that follow from a seed; the process's own stay where they are."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU, where images are made ready
        return transform(image)


def make_loader(
    model: nn.Module, data: Data, config: TrainConfig, *, shuffle: bool, class_of: ClassOf = None
) -> Iterable[Any]:
    """Return batches ``(images, labels)`` of a data set as the model wants them; a loader is returned unchanged."""
    if not is_table(data):
        return data  # type: ignore[no-any-return]
    transform = make_transform(preprocessing_of(model), config.augment, home(model)[1])
    dataset: Images | Stream
    if is_stream(data):
        dataset, order = Stream(data, transform, config, class_of, shuffle), None
    else:
        dataset, order = Images(data, transform, config.unreadable, class_of), Order(len(data), shuffle, config.seed)
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=order,
        # its own: workers' base seeds would come out of the random numbers of dropout otherwise
        generator=torch.Generator().manual_seed(config.seed),
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=shuffle and (order is None or len(order) >= config.batch_size),
    )


# ----------------------------------------------------------------------------------------------------- the epochs


class Passes:
    """The epochs of a run, and the passes through the data that they take.

    An epoch has as many batches as the loader, or as many as were asked for. In the second case a pass through the data
    goes on in the next epoch, and a new pass begins where the data ends.

    Args:
        loader: of batches; one that `make_loader` made can begin at any place.
        length: batches in an epoch; None is all that the loader has.
        images: in a batch, in all processes.
        accelerator: of processes that share the loader.

    Raises:
        DataError: where the length is neither given nor known, or zero, or the loader cannot be shared.
    """

    def __init__(self, loader: Any, *, length: int | None, images: int, accelerator: Accelerator | None = None) -> None:
        sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
        self.order = sampler if isinstance(sampler, Order) else None
        self.data = dataset if isinstance(dataset, (Images, Stream)) else None
        self.loader, self.images = loader if accelerator is None else shared(loader, accelerator), images
        try:
            self.known: int | None = len(self.loader)
        except TypeError:
            self.known = None
        if length is None and self.known is None:
            raise DataError(
                "finetune needs to know how many steps an epoch has: pass a loader that has a length, or set "
                "TrainConfig.steps"
            )
        if self.known == 0:
            raise DataError("the training loader has no batch: it needs at least one")
        self.length = length or self.known or 0
        #: which pass this is, batches drawn of it, and the random numbers that it began with
        self.turn, self.within, self.start = 0, 0, dict[str, Any]()
        self.batches = self._go()

    def state(self) -> dict[str, Any]:
        """Return where the passes are, and what this process draws next."""
        return {"turn": self.turn, "within": self.within, "start": self.start, "now": self._random_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.turn, self.within, self.start = state["turn"], state["within"], state["start"]
        self._set_random_state(state["now"])

    def damaged(self) -> list[int]:
        """Return which images of a data set could not be read so far, by this process; of a stream, in one pass."""
        return [] if self.data is None else self.data.damaged()

    def digest(self) -> str:
        """Tell data sets apart that have as many images; empty where that would take reading them."""
        return self.data.digest() if isinstance(self.data, Images) else ""

    def draw(self, done: int) -> Iterator[Any]:
        """Go through the batches of an epoch that are not done.

        Raises:
            CheckpointError: where the data are not those of the run that goes on.
            DataError: where the loader has no batch.
        """
        for _ in range(self.length - done):
            while (batch := next(self.batches)) is END:
                pass
            yield batch
        if self.within == self.known:  # now, so that a checkpoint between two epochs begins with the next pass
            next(self.batches)

    def _go(self) -> Iterator[Any]:
        """Go through pass after pass, with `END` after each."""
        while True:
            flow = self._from_here()
            while self.within != self.known and (batch := next(flow, END)) is not END:
                self.within += 1
                yield batch
            said = f"the training loader says that it has {self.known} batches, and"
            if not self.within:
                raise self._empty()
            if self.within != self.known and self.known is not None:
                warnings.warn(f"{said} ends after {self.within}: it starts over there", stacklevel=2)
            if self.within == self.known and next(flow, END) is not END:
                warnings.warn(f"{said} goes on after them: the rest of its batches is left out", stacklevel=2)
            self.turn, self.within = self.turn + 1, 0
            yield END

    def _empty(self) -> DataError:
        if self.turn:
            return DataError(
                "the training loader gives no batch when it is started over: pass one that does, not an iterator"
            )
        if isinstance(self.data, Stream):
            return DataError(
                f"the stream has fewer images than the batch of {self.images} needs, for each of the loader's workers: "
                "lower batch_size or workers"
            )
        return DataError("the training loader has no batch: it needs at least one")

    def _from_here(self) -> Iterator[Any]:
        """Begin a pass, or go on with it.

        The order of a data set's own loader is sent to the place at once. Any other loader, and a stream, is drawn
        from up to there, with the random numbers that the pass began with: the same batches come wherever they follow
        from those. (`accelerate.skip_first_batches` would not read what it skips. But it knows torch's own loaders
        only, and leaves the random numbers of workers behind.)

        Raises:
            CheckpointError: where there are not as many.
        """
        if self.order is not None:
            self.order.begin(self.turn, self.within * self.images)
            return iter(self.loader)
        if isinstance(self.data, Stream):
            self.data.begin(self.turn)
        if not self.within:
            self.start = self._random_state()
            return iter(self.loader)
        now = checkpoints.random_state()
        self._set_random_state(self.start)
        flow: Iterator[Any] = iter(self.loader)
        for at in range(self.within):
            if next(flow, END) is END:
                raise CheckpointError(
                    f"the checkpoint's run had drawn {self.within} batches of the data, and these end after {at}: go "
                    "on with the same data"
                )
        checkpoints.set_random_state(now)
        return flow

    def _generators(self) -> list[torch.Generator]:
        """Return the loader's own sources of randomness, those that Accelerate adds included."""
        owners = [self.loader, getattr(self.loader, "sampler", None)]
        owners.append(getattr(getattr(self.loader, "batch_sampler", None), "sampler", None))
        found = [getattr(owner, name, None) for owner in owners for name in ("generator", "synchronized_generator")]
        return [one for one in found if isinstance(one, torch.Generator)]

    def _random_state(self) -> dict[str, Any]:
        states = [generator.get_state() for generator in self._generators()]
        return {"process": checkpoints.random_state(), "loader": states}

    def _set_random_state(self, state: Mapping[str, Any]) -> None:
        checkpoints.set_random_state(state["process"])
        for generator, own in zip(self._generators(), state["loader"], strict=True):
            generator.set_state(own)


# ------------------------------------------------------------------------------------------------------ a batch


def split_batch(batch: Any, labelled: bool = True) -> tuple[Any, Tensor | None]:
    """Return (inputs, labels) of a loader's batch: a pair, or a mapping with ``labels`` (or ``label``).

    Where not all data is ``labelled``, also images alone, or a mapping without labels: labels are None then.

    Raises:
        DataError: where it is neither, or its labels are no numbers.
    """
    inputs, labels, fits = batch, None, not labelled and isinstance(batch, Tensor)
    if isinstance(batch, Mapping):
        name = next((key for key in ("labels", "label") if key in batch), None)
        fits = name is not None or not labelled
        inputs, labels = {key: value for key, value in batch.items() if key != name}, batch.get(name)
    elif isinstance(batch, (list, tuple)):
        fits = len(batch) == 2 or (len(batch) == 1 and not labelled)
        inputs, labels = (*batch, None, None)[:2]
        if not labelled and isinstance(labels, Tensor) and labels.ndim == 1 and bool((labels == UNLABELLED).all()):
            labels = None
    if not fits:
        shown = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(f"a batch is (images, labels) or a dict with 'labels', got {shown}")
    images = inputs if isinstance(inputs, Tensor) else inputs.get("pixel_values") if isinstance(inputs, dict) else None
    if getattr(images, "dtype", None) == torch.uint8:
        raise DataError(
            "a batch has images of uint8, 0 to 255: prepare them as the model wants them, or pass a data set"
        )
    if labels is None and labelled:
        raise DataError("a batch has None for labels: drop images without one, or set distill")
    if labels is None or isinstance(labels, Tensor):
        return inputs, labels
    try:
        return inputs, torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the labels of a batch are no numbers: {str(labels)[:60]}: number the classes") from error


def size_of(inputs: Any) -> int:
    """Return the number of images in a batch's inputs."""
    if isinstance(inputs, Mapping):
        inputs = next(value for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    return len(inputs)


def batches_on(
    loader: Iterable[Any], device: torch.device, labelled: bool = True
) -> Iterator[tuple[Any, Tensor | None]]:
    """Go through a loader, everything moved to the device."""
    for batch in loader:
        yield tree_map_only(Tensor, lambda value: value.to(device, non_blocking=True), split_batch(batch, labelled))
