"""Epochs and passes: every batch comes once before any comes again, wherever epochs begin and end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pieces import batches, interrupt, nth
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ltm_retrofit as ltm
from ltm_retrofit.errors import CheckpointError, DataError
from ltm_retrofit.tuning.data import Passes, make_loader
from ltm_retrofit.tuning.loop import Run


class Says:
    """A loader whose length is another than the number of its batches."""

    def __init__(self, said: int, batches: int) -> None:
        self.said, self.batches = said, batches

    def __len__(self) -> int:
        return self.said

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.batches))


def epochs(loader: Any, length: int | None, count: int) -> list[list[int]]:
    passes = Passes(loader, length=length, images=1)
    return [[int(batch) for batch in passes.draw(0)] for _ in range(count)]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (None, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (2, [[0, 1], [2, 3], [4, 0], [1, 2]]),
        (5, [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        (7, [[0, 1, 2, 3, 4, 0, 1], [2, 3, 4, 0, 1, 2, 3]]),
    ],
)
def test_a_pass_goes_on_in_the_next_epoch(length: int | None, expected: list[list[int]]) -> None:
    assert epochs(range(5), length, len(expected)) == expected


@pytest.mark.parametrize("length", [2, 7])
def test_each_pass_of_a_shuffling_loader_has_every_image_once(length: int) -> None:
    drawn = epochs(Flat(DataLoader(TensorDataset(torch.arange(6)), shuffle=True)), length, 12)
    whole = [batch for epoch in drawn for batch in epoch]
    assert all(sorted(whole[at : at + 6]) == list(range(6)) for at in range(0, len(whole) - 5, 6))


class Flat:
    """The only tensor of each batch."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return (batch for (batch,) in self.loader)


def test_a_loader_that_has_fewer_batches_than_it_says_starts_over_and_is_named() -> None:
    with pytest.warns(UserWarning, match=r"says that it has 5 batches, and ends after 3: it starts over"):
        assert epochs(Says(5, 3), None, 2) == [[0, 1, 2, 0, 1], [2, 0, 1, 2, 0]]


def test_a_loader_that_has_more_batches_than_it_says_is_cut_and_is_named() -> None:
    with pytest.warns(UserWarning, match=r"says that it has 3 batches, and goes on after them: the rest .* left out"):
        assert epochs(Says(3, 5), None, 2) == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("loader", "length"), [([], None), (iter(()), 2), (Says(2, 0), None)], ids=["empty", "spent", "says two"]
)
def test_a_loader_without_a_batch_is_refused(loader: Any, length: int | None) -> None:
    with pytest.raises(DataError, match="the training loader has no batch"):
        epochs(loader, length, 1)


def test_the_epochs_of_a_stream_have_other_images(pictures, build) -> None:
    """A stream of one shard is shuffled within a buffer only: its passes would all begin with the same images."""
    stream = pictures(28).to_iterable_dataset()
    loader = make_loader(build("timm-vit"), stream, ltm.TrainConfig(batch_size=7), shuffle=True)
    passes = Passes(loader, length=2, images=7)
    first, second, third = (torch.cat([images for images, _ in passes.draw(0)]) for _ in range(3))
    assert len(torch.unique(torch.cat([first, second]), dim=0)) == 28, "all of them in two epochs"
    assert passes.turn == 1 and not torch.equal(first, third)


class Numbers(IterableDataset):
    """Images of which no length is known."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.full((3, 32, 32), value / 30), value % 7) for value in range(30)])


@pytest.mark.parametrize("stop", [2, 4])
@pytest.mark.parametrize("kind", ["stream", "table", "loader", "shuffling"])
def test_a_pass_over_several_epochs_is_resumed(
    kind: str, stop: int, converted, pictures, tmp_path, monkeypatch
) -> None:
    model = converted("timm-vit")
    fresh, config = copy.deepcopy(model), ltm.TrainConfig(batch_size=7, steps=2, epochs=3, checkpoint_every=1, lr=1e-3)

    def data() -> Any:
        if kind == "loader":
            return DataLoader(Numbers(), batch_size=7)
        if kind == "shuffling":
            images, labels = zip(*Numbers(), strict=True)
            return DataLoader(TensorDataset(torch.stack(images), torch.tensor(labels)), batch_size=7, shuffle=True)
        return pictures(21).to_iterable_dataset() if kind == "stream" else pictures(21)

    expected = ltm.finetune(model, data(), config=config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "step", nth(Run.step, stop, interrupt))
        ltm.finetune(copy.deepcopy(fresh), data(), config=config, checkpoints_to=tmp_path)
    resumed = ltm.finetune(fresh, data(), config=config, checkpoints_to=tmp_path, resume=True)
    assert resumed.losses == expected.losses
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


def test_data_that_end_before_the_checkpoints_place_are_named(converted, tmp_path, monkeypatch) -> None:
    model = converted("timm-vit")
    fresh, config, drawn = copy.deepcopy(model), ltm.TrainConfig(steps=6, checkpoint_every=5), batches(6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "step", nth(Run.step, 6, interrupt))
        ltm.finetune(model, drawn, config=config, checkpoints_to=tmp_path)
    with pytest.raises(CheckpointError, match="had drawn 5 batches of the data, and these end after 3"):
        ltm.finetune(fresh, drawn[:3], config=config, checkpoints_to=tmp_path, resume=True)


def test_an_iterator_that_is_spent_is_named() -> None:
    with pytest.raises(DataError, match=r"gives no batch when it is started over: pass one that does, not an iterator"):
        epochs(iter(range(3)), 5, 1)


def test_a_stream_smaller_than_a_batch_for_each_worker_is_named(pictures, build) -> None:
    config = ltm.TrainConfig(batch_size=16, steps=1)
    with pytest.raises(DataError, match=r"fewer images than the batch of 16 needs.*lower batch_size or workers"):
        ltm.finetune(build("timm-vit"), pictures(14).to_iterable_dataset(), config=config)
