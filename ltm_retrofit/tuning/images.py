"""Loaders whose images, and what augmentation makes of them, follow from seed, epoch and place alone.

So a run that was interrupted goes on with the images that were next, whatever the number of workers, and none of the
earlier ones has to be read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ltm_retrofit.errors import DataError
from ltm_retrofit.finding.example import home
from ltm_retrofit.tuning.data import UNLABELLED, Data, is_stream, is_table
from ltm_retrofit.tuning.preprocessing import make_transform, preprocessing_of

#: images of a stream that are shuffled among each other
BUFFER = 1000
Transform = Callable[[Any], Tensor]


class Order(Sampler[tuple[int, int]]):
    """Which image comes when in an epoch, and the seed of its augmentation."""

    def __init__(self, count: int, shuffle: bool, seed: int) -> None:
        self.count, self.shuffle, self.seed = count, shuffle, seed
        self.begin(0)

    def begin(self, epoch: int, first: int = 0) -> None:
        """Let the next pass be that of an epoch, without its ``first`` images."""
        self.epoch_number, self.first = epoch, first

    def __len__(self) -> int:
        """Count the images of an epoch."""
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield index and seed."""
        places = torch.arange(self.count)
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch_number))
            places = torch.randperm(self.count, generator=generator)
        for index in places[self.first :].tolist():
            yield index, seed_of(self.seed, self.epoch_number, index)


def seed_of(*numbers: int) -> int:
    """Return a seed that depends on all of these numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


class Images(Dataset[tuple[Tensor, int]]):
    """Rows of a `datasets` data set as (image, label), by index and seed.

    Args:
        rows: the data set.
        transform: of an image.
        limit: share of the images that may be unreadable; in place of each comes the next one in the data set.
        places: the model's class of each label, where they differ.

    Raises:
        DataError: where a transform of the data set's own leaves no image.
    """

    def __init__(self, rows: Any, transform: Transform, limit: float, places: Sequence[int] | None = None) -> None:
        self.rows, self.decode = undecoded(rows)
        if self.rows.format["type"] is not None and "image" not in (first := self.rows[0]):
            raise DataError(
                f"the data set's own transform gives {', '.join(map(str, first))}, no image: call reset_format() on "
                "it, or pass a DataLoader of its batches"
            )
        self.transform, self.limit, self.places = transform, limit, places
        # shared with the loader's workers, which write into it
        self.unreadable = torch.zeros(len(rows), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """Return image and label.

        Raises:
            DataError: where more than the accepted share of images cannot be read.
        """
        index, seed = key
        while True:
            row = self.rows[index]
            try:
                image = self.decode(row["image"])
                break
            except Exception as error:  # whatever a decoder makes of damaged bytes
                self._count(index, error)
                index = (index + 1) % len(self)
        return seeded(self.transform, image, seed), label_of(row, self.places)

    def digest(self) -> str:
        """Return a digest of the first, the middle and the last row, as they are stored."""
        found = hashlib.blake2b(digest_size=8)
        stored, _ = undecoded(self.rows.with_format(None))  # without the user's transform, which may be random
        for index in sorted({0, len(self) // 2, len(self) - 1}):
            row = stored[index]
            image = row["image"]
            if isinstance(image, dict) and image["bytes"] is None:
                path = Path(image["path"] or "")  # may be missing, within an archive, or on a server
                image = path.read_bytes() if path.is_file() else path.name
            elif isinstance(image, dict):
                image = image["bytes"]
            found.update(image if isinstance(image, bytes) else repr(image).encode())
            found.update(repr(row.get("label")).encode())
        return found.hexdigest()

    def _count(self, index: int, error: Exception) -> None:
        self.unreadable[index] = True
        if (found := int(self.unreadable.sum())) > self.limit * len(self) or found == len(self):
            raise DataError(
                f"{found} of {len(self)} images cannot be read, the last one found is row {index} "
                f"({type(error).__name__}: {error}); accepted is a share of {self.limit:g}: remove them, or raise "
                "TrainConfig.unreadable for training"
            ) from error


class Stream(IterableDataset[tuple[Tensor, int]]):
    """A streamed `datasets` data set as (image, label), shuffled within a buffer.

    Args:
        rows: the data set.
        transform: of an image.
        shuffle: whether to.
        seed: of order and augmentation.
        workers: of the loader, each of which counts what it cannot read.
        limit: share of the images so far, or of as many as the buffer holds, that may be unreadable; they are left out.
        places: the model's class of each label, where they differ.
    """

    def __init__(
        self,
        rows: Any,
        transform: Transform,
        shuffle: bool,
        seed: int,
        *,
        workers: int = 0,
        limit: float = 0.0,
        places: Sequence[int] | None = None,
    ) -> None:
        self.rows, self.decode = undecoded(rows.shuffle(seed=seed, buffer_size=BUFFER) if shuffle else rows)
        self.transform, self.seed, self.limit, self.places = transform, seed, limit, places
        self.unreadable = torch.zeros(max(1, workers), dtype=torch.long).share_memory_()  # type: ignore[no-untyped-call]
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Let the next pass be that of an epoch."""
        self.epoch_number = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Yield images and labels; `datasets` shares its files out among the loader's workers.

        Raises:
            DataError: where more than the accepted share of images cannot be read.
        """
        worker, found = getattr(get_worker_info(), "id", 0), 0
        for place, row in enumerate(self.rows):
            try:
                image = self.decode(row["image"])
            except Exception as error:  # whatever a decoder makes of damaged bytes
                found += 1
                self.unreadable[worker] = max(
                    found, int(self.unreadable[worker])
                )  # the most of a pass, also of the last
                if found > self.limit * max(place + 1, BUFFER):
                    raise DataError(
                        f"{found} of the stream's first {place + 1} images cannot be read, the last one found is image "
                        f"{place} ({type(error).__name__}: {error}); accepted is a share of {self.limit:g}: remove "
                        "them, or raise TrainConfig.unreadable"
                    ) from error
                continue
            seed = seed_of(self.seed, self.epoch_number, worker, place)
            yield seeded(self.transform, image, seed), label_of(row, self.places)


def label_of(row: Mapping[str, Any], places: Sequence[int] | None) -> int:
    """Return the model's class of a row; `UNLABELLED` where the data has none.

    Raises:
        DataError: where it is no whole number.
    """
    label = row.get("label", UNLABELLED)
    label = label.item() if hasattr(label, "item") else label
    if type(label) is not int or label < UNLABELLED or (places is not None and label >= len(places)):
        raise DataError(
            f"an image has the label {label!r}, and labels are whole numbers from 0 on: drop rows without one, or "
            "leave the column out and set distill"
        )
    return label if places is None or label == UNLABELLED else places[label]


def undecoded(rows: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return rows whose images come as bytes, and what decodes one; as they are where they come otherwise."""
    from datasets import Image

    feature = (rows.features or {}).get("image")
    custom = getattr(rows, "format", {"type": None})["type"] is not None
    if not isinstance(feature, Image) or not feature.decode or custom:
        return rows, lambda image: image
    return rows.cast_column("image", Image(mode=feature.mode, decode=False)), feature.decode_example


def seeded(transform: Transform, image: Any, seed: int) -> Tensor:
    """Transform an image with random numbers that follow from a seed; the process's own stay where they are."""
    source = torch.default_generator
    before = source.get_state()
    source.manual_seed(seed)
    try:
        return transform(image)
    finally:
        source.set_state(before)


def make_loader(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int,
    shuffle: bool,
    augment: str = "none",
    seed: int = 0,
    workers: int = 0,
    unreadable: float = 0.0,
    places: Sequence[int] | None = None,
) -> Iterable[Any]:
    """Return batches ``(images, labels)`` of a data set as the model wants them; a loader is returned as it is.

    A data set's loader has a ``begin(epoch, batches)``: the next pass is that of this epoch, without its first batches
    where it is no stream.
    """
    if not is_table(data):
        return data  # type: ignore[no-any-return]
    transform = make_transform(preprocessing_of(model), augment, home(model)[1])
    dataset: Any
    if is_stream(data):
        dataset = Stream(data, transform, shuffle, seed, workers=workers, limit=unreadable, places=places)
        order = None
    else:
        dataset, order = Images(data, transform, unreadable, places), Order(len(data), shuffle, seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        # its own: workers' base seeds would come out of the random numbers of dropout otherwise
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=shuffle and (order is None or len(order) >= batch_size),
    )
