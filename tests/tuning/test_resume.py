"""Interrupted at any step, or while it is writing: a run goes on to the same losses and the same bits."""

from __future__ import annotations

import argparse
import copy
import errno
import json
import random
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from pieces import batches, encoded, equal, interrupt, nth, weights
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import ltm_retrofit as ltm
from ltm_retrofit.cli import _be_quiet
from ltm_retrofit.converted.record import was_finetuned
from ltm_retrofit.errors import CheckpointError, TrainingError
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.tuning import checkpoints, loop, objective
from ltm_retrofit.tuning.data import Images, Order
from ltm_retrofit.tuning.loop import Run

#: all that has a state of its own: dropout, mixing, an average of weights, gradients over two batches, a teacher
CONFIG = ltm.TrainConfig(
    **{"epochs": 2, "batch_size": 8, "accumulate": 2, "lr": 1e-3, "ema": 0.9, "mixup": 0.4, "cutmix": 0.4},
    **{"distill": 0.5, "distill_token": 0.1, "augment": "crop", "workers": 2, "bound_warmup": 0.3},
    train="all",  # what other processes are told, too
    checkpoint_every=2,
    held_out=0.0,  # test_validation.py goes on with a run that is validated
)
STEPS = 2 * 3  # six batches an epoch
TIMES = ("seconds", "waiting", "images_per_second")


@pytest.fixture
def model(build) -> nn.Module:
    """A converted model with dropout."""
    host = build("timm-vit")
    host.pos_drop.p = 0.2
    return ltm.retrofit(host, ltm.LTMConfig(flops=0.7))


def outcome(model: nn.Module, history: ltm.History) -> tuple[Any, ...]:
    told = [{key: value for key, value in entry.items() if key not in TIMES} for entry in history.epochs]
    return history.losses, told, weights(model)


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[:2] == other[:2] and equal(one[2], other[2])


#: forks from a process that has trained nothing yet: autograd's threads do not survive a fork
KILLER = textwrap.dedent(
    """
    import os, signal, sys, torch
    import ltm_retrofit as ltm
    from ltm_retrofit.tuning import checkpoints
    from ltm_retrofit.tuning.loop import Run

    torch.set_num_threads(1)
    model, data, config, cases = torch.load(f"{sys.argv[1]}/given.pt", weights_only=False)

    def kill_at(function, count):
        calls = iter(range(1, 10_000))
        return lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == count else function(*a, **k)

    for where, at in cases.items():
        child = os.fork()
        if child == 0:
            if where == "step":
                Run.step = kill_at(Run.step, at)
            elif where == "rename":
                os.replace = kill_at(os.replace, at)
            else:
                checkpoints._to_disk = kill_at(checkpoints._to_disk, at)
            ltm.finetune(model, data, config=config, checkpoints_to=f"{sys.argv[1]}/{where}")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (where, status)
    """
)


def test_killed_and_resumed_gives_the_same_bits(model, pictures, tmp_path) -> None:
    data, fresh = pictures(52), copy.deepcopy(model)
    cases = {"step": random.SystemRandom().randrange(1, STEPS + 1), "rename": 3, "write": 3}
    torch.save((fresh, data, CONFIG, cases), tmp_path / "given.pt")
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = outcome(model, ltm.finetune(model, data, config=CONFIG))
    for where, at in cases.items():
        folder, again = tmp_path / where, copy.deepcopy(fresh)
        assert where != "rename" or (folder / f"{checkpoints.NAME}.unfinished").exists()
        seen = checkpoints.read(folder)
        assert (seen is None) == (where == "step" and at <= 2), "a checkpoint every two steps"
        for source in (random.seed, np.random.seed, torch.manual_seed):
            source(11)
        drawn = random.random(), np.random.random(), torch.rand(1)
        for source in (random.seed, np.random.seed, torch.manual_seed):
            source(11)
        resumed = ltm.finetune(again, data, config=CONFIG, checkpoints_to=folder, resume=True)
        assert same(outcome(again, resumed), expected), f"killed at {where} {at}"
        assert (random.random(), np.random.random(), torch.rand(1)) == drawn, "random numbers of others stay"


def test_a_finished_run_is_not_run_again(model, pictures, tmp_path, monkeypatch) -> None:
    data, fresh = pictures(52), copy.deepcopy(model)
    expected = outcome(model, ltm.finetune(model, data, config=CONFIG, checkpoints_to=tmp_path))
    monkeypatch.setattr(Run, "train_batch", None)
    resumed = ltm.finetune(fresh, data, config=CONFIG, checkpoints_to=tmp_path, resume=True)
    assert same(outcome(fresh, resumed), expected) and ltm.is_retrofitted(fresh)


@pytest.mark.parametrize("stop", [7, 11], ids=["between-epochs", "within-an-epoch"])
@pytest.mark.parametrize("kind", ["global", "own-generator", "samplers-generator"])
def test_anyones_loader_is_drawn_from_up_to_the_place(kind: str, stop: int, model, tmp_path, monkeypatch) -> None:
    images, labels = (torch.cat(parts) for parts in zip(*batches(6), strict=True))
    config = ltm.TrainConfig(epochs=2, lr=1e-3, checkpoint_every=2)

    def loader() -> DataLoader:
        data, source = TensorDataset(images, labels), torch.Generator().manual_seed(3)
        if kind == "samplers-generator":
            return DataLoader(data, batch_size=7, sampler=RandomSampler(data, generator=source))
        return DataLoader(data, batch_size=7, shuffle=True, generator=source if kind == "own-generator" else None)

    fresh = copy.deepcopy(model)
    expected = outcome(model, ltm.finetune(model, loader(), config=config))
    broken = copy.deepcopy(fresh)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "step", nth(Run.step, stop, interrupt))
        ltm.finetune(broken, loader(), config=config, checkpoints_to=tmp_path)
    resumed = ltm.finetune(fresh, loader(), config=config, checkpoints_to=tmp_path, resume=True)
    assert same(outcome(fresh, resumed), expected)


@pytest.mark.parametrize("keeps", [True, False], ids=["checkpoints", "none"])
def test_persistent_workers_keep_what_no_checkpoint_holds(keeps: bool, model, tmp_path) -> None:
    images, labels = batches(1)[0]
    loader = DataLoader(TensorDataset(images, labels), batch_size=7, num_workers=1, persistent_workers=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ltm.finetune(model, loader, config=ltm.TrainConfig(), checkpoints_to=tmp_path if keeps else None)
    assert keeps == any("persistent workers keep random numbers" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    "settings",
    # kron takes minutes for the four dimensions of a convolution
    [{"train": "lora"}, {"train": "masks"}, {"opt": "kron", "train": "masks"}, {"opt": "adafactorbv"}],
    ids=lambda settings: next(iter(settings.values())),
)
def test_whatever_trains_by_whatever_optimizer(settings, model, pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("timm.optim.kron.has_dynamo", False)  # compiles every shape
    data, fresh = pictures(24), copy.deepcopy(model)
    config = ltm.TrainConfig(epochs=2, batch_size=8, mask_lr=1e-2, checkpoint_every=1, held_out=0.0, **settings)
    expected = outcome(model, ltm.finetune(model, data, config=config))
    broken = copy.deepcopy(fresh)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "step", nth(Run.step, 5, interrupt))
        ltm.finetune(broken, data, config=config, checkpoints_to=tmp_path)
    resumed = ltm.finetune(fresh, data, config=config, checkpoints_to=tmp_path, resume=True)
    assert same(outcome(fresh, resumed), expected)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_an_earlier_runs_checkpoint_is_not_overwritten(model, tmp_path) -> None:
    config = ltm.TrainConfig(batch_size=7)
    ltm.finetune(model, batches(2), config=config, checkpoints_to=tmp_path)
    with pytest.raises(CheckpointError, match="holds a checkpoint of an earlier run"):
        ltm.finetune(model, batches(2), config=config, checkpoints_to=tmp_path)


def test_an_image_that_is_not_there_is_data_too(pictures) -> None:
    data = pictures(3).cast_column("image", datasets.Image(decode=False))
    kinds = [{"bytes": b"", "path": None}, {"bytes": None, "path": "gone.png"}, None]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    odd = datasets.Dataset.from_dict({"image": kinds, "label": [0, 1, 2]}, features=features)
    digests = [Images(rows, lambda image: image, 1.0).digest() for rows in (data, odd, odd.select([0, 2, 1]))]
    assert len(set(digests)) == 3


def test_other_images_are_another_run(model, pictures, tmp_path) -> None:
    fresh, config = copy.deepcopy(model), ltm.TrainConfig(batch_size=8)
    ltm.finetune(model, pictures(16), config=config, checkpoints_to=tmp_path)
    with pytest.raises(CheckpointError, match=r"which differs in data \("):
        ltm.finetune(fresh, pictures(16, seed=1), config=config, checkpoints_to=tmp_path, resume=True)
    assert not ltm.finetune(fresh, pictures(16), config=config, checkpoints_to=tmp_path, resume=True).losses[2:]


def test_images_that_a_transform_makes_anew_are_the_same_images(model, pictures, tmp_path) -> None:
    def noisy(rows: dict[str, Any]) -> dict[str, Any]:
        arrays = [np.asarray(image).astype(int) + np.random.randint(0, 9) for image in rows["image"]]
        return {**rows, "image": [Image.fromarray(array.clip(0, 255).astype(np.uint8)) for array in arrays]}

    data, fresh, config = pictures(16), copy.deepcopy(model), ltm.TrainConfig(batch_size=8, held_out=0.0)
    data.set_transform(noisy)
    ltm.finetune(model, data, config=config, checkpoints_to=tmp_path)
    assert len(ltm.finetune(fresh, data, config=config, checkpoints_to=tmp_path, resume=True).losses) == 2


@pytest.mark.parametrize("what", ["lr", "weights", "images"])
def test_another_runs_checkpoint_is_refused(what: str, model, tmp_path) -> None:
    fresh = copy.deepcopy(model)
    ltm.finetune(model, batches(2), config=ltm.TrainConfig(batch_size=7), checkpoints_to=tmp_path)
    if what == "weights":
        with torch.no_grad():
            fresh.head.weight.add_(1)
    before = weights(fresh)
    config = ltm.TrainConfig(batch_size=7, lr=1e-5 if what == "lr" else 3e-4)
    with pytest.raises(CheckpointError, match=rf"of another run, which differs in {what} \("):
        ltm.finetune(fresh, batches(3 if what == "images" else 2), config=config, checkpoints_to=tmp_path, resume=True)
    assert equal(weights(fresh), before)


@pytest.mark.parametrize("other", [{"flops": 0.6}, {"flops": 0.7, "method": "tome"}, None], ids=str)
def test_another_plan_is_another_run(other: dict[str, Any] | None, build, tmp_path) -> None:
    config = ltm.TrainConfig(batch_size=7)
    first, second = (build("timm-vit") for _ in range(2))
    ltm.retrofit(first, ltm.LTMConfig(flops=0.7, method="pool"))
    if other is not None:
        ltm.retrofit(second, ltm.LTMConfig(**other))
    ltm.finetune(first, batches(2), config=config, checkpoints_to=tmp_path)
    before = weights(second)
    with pytest.raises(CheckpointError, match=r"of another run, which differs in (weights \(.*)?plan \("):
        ltm.finetune(second, batches(2), config=config, checkpoints_to=tmp_path, resume=True)
    assert equal(weights(second), before)


def test_a_smaller_batch_is_another_run(model, pictures, tmp_path) -> None:
    fresh, data = copy.deepcopy(model), pictures(16)
    ltm.finetune(model, data, config=ltm.TrainConfig(batch_size=8), checkpoints_to=tmp_path)
    with pytest.raises(CheckpointError, match="which differs in batch_size"):
        ltm.finetune(fresh, data, config=ltm.TrainConfig(batch_size=4), checkpoints_to=tmp_path, resume=True)


def test_a_folder_that_is_a_file_is_named(model, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        ltm.finetune(model, batches(1), config=ltm.TrainConfig(batch_size=7), checkpoints_to=tmp_path / "file")


def test_workers_may_differ(model, pictures, tmp_path) -> None:
    fresh, data = copy.deepcopy(model), pictures(16)
    ltm.finetune(model, data, config=ltm.TrainConfig(batch_size=8), checkpoints_to=tmp_path)
    config = ltm.TrainConfig(batch_size=8, workers=1, checkpoint_every=7)
    ltm.finetune(fresh, data, config=config, checkpoints_to=tmp_path, resume=True)


def test_resume_needs_a_folder(model) -> None:
    with pytest.raises(CheckpointError, match="set checkpoints_to"):
        ltm.finetune(model, batches(2), resume=True)


@pytest.mark.parametrize("content", [b"", b"not ours", (8).to_bytes(8, "little") + b"{}      "])
def test_a_file_that_is_no_checkpoint_is_named(content: bytes, model, tmp_path) -> None:
    (tmp_path / checkpoints.NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="is no checkpoint of a fine-tune"):
        ltm.finetune(model, batches(2), checkpoints_to=tmp_path, resume=True)


def test_a_checkpoint_of_another_format_is_refused_by_name(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 3)
        checkpoints.write(tmp_path, {"progress": {}})
    with pytest.raises(CheckpointError, match=f"has format 3, this version reads {checkpoints.FORMAT}"):
        checkpoints.read(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(model, tmp_path, monkeypatch) -> None:
    fresh, config = copy.deepcopy(model), ltm.TrainConfig(batch_size=7, checkpoint_every=1)
    expected = outcome(fresh, ltm.finetune(fresh, batches(4), config=config))

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    again = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", nth(checkpoints.save_file, 3, full))
        with pytest.raises(CheckpointError, match=r"No space left on device.*the last good one is still there"):
            ltm.finetune(model, batches(4), config=config, checkpoints_to=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [checkpoints.NAME]
    assert checkpoints.read(tmp_path)["progress"]["step"] == 2
    history = ltm.finetune(again, batches(4), config=config, checkpoints_to=tmp_path, resume=True)
    assert same(outcome(again, history), expected)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(model, tmp_path) -> None:
    drawn = batches(6)
    drawn[4] = (drawn[4][0] * torch.nan, drawn[4][1])
    config = ltm.TrainConfig(batch_size=7, checkpoint_every=2)
    with pytest.raises(TrainingError, match=r"not finite at step 5 of 6.*The last checkpoint in .* begin anew"):
        ltm.finetune(model, drawn, config=config, checkpoints_to=tmp_path)
    kept = checkpoints.read(tmp_path)
    assert kept["progress"]["step"] == 2, "nobody knows whether those of step 4 are good"
    assert all(torch.isfinite(value).all() for value in kept["model"].values() if value.is_floating_point())


def test_the_first_checkpoint_is_taken_back_where_the_next_loss_is_not_finite(model, tmp_path) -> None:
    """The loss tells only a step later whether weights are good."""
    drawn = batches(3)
    drawn[1] = (drawn[1][0] * torch.nan, drawn[1][1])
    config = ltm.TrainConfig(batch_size=7, checkpoint_every=1)
    with pytest.raises(TrainingError, match="not finite at step 2 of 3") as raised:
        ltm.finetune(model, drawn, config=config, checkpoints_to=tmp_path)
    assert not checkpoints.exists(tmp_path) and not list(tmp_path.iterdir())
    assert "last checkpoint" not in str(raised.value)


def test_a_resumed_run_takes_back_weights_whose_loss_was_never_seen(model, tmp_path, monkeypatch) -> None:
    """Killed behind a checkpoint whose weights are bad: going on shows it, and the one before takes its place."""
    fresh, config, drawn = copy.deepcopy(model), ltm.TrainConfig(batch_size=7, checkpoint_every=2), batches(6)
    drawn[4] = (drawn[4][0] * torch.nan, drawn[4][1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "train_batch", nth(Run.train_batch, 5, interrupt))
        ltm.finetune(model, drawn, config=config, checkpoints_to=tmp_path)
    assert checkpoints.read(tmp_path)["progress"]["step"] == 4
    with pytest.raises(TrainingError, match="not finite at step 5 of 6"):
        ltm.finetune(fresh, drawn, config=config, checkpoints_to=tmp_path, resume=True)
    assert checkpoints.read(tmp_path)["progress"]["step"] == 2


def test_between_the_two_renames_the_checkpoint_before_is_read(model, tmp_path) -> None:
    ltm.finetune(model, batches(2), config=ltm.TrainConfig(batch_size=7), checkpoints_to=tmp_path)
    (tmp_path / checkpoints.NAME).rename(tmp_path / checkpoints.BEFORE)
    assert checkpoints.exists(tmp_path) and checkpoints.read(tmp_path)["progress"]["step"] == 2


@pytest.mark.slow
def test_a_stream_goes_on_with_as_many_workers(model, tmp_path) -> None:
    stream, fresh = encoded(32, damaged=()).to_iterable_dataset(num_shards=2), copy.deepcopy(model)
    config = ltm.TrainConfig(batch_size=8, steps=2, workers=1)
    ltm.finetune(model, stream, config=config, checkpoints_to=tmp_path)
    with pytest.raises(CheckpointError, match=r"which differs in workers \(1 there, 2 here\)"):
        ltm.finetune(fresh, stream, config=replace(config, workers=2), checkpoints_to=tmp_path, resume=True)


def test_a_checkpoint_holds_no_pickles(model, tmp_path) -> None:
    ltm.finetune(model, batches(2), config=ltm.TrainConfig(batch_size=7, ema=0.5), checkpoints_to=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    json.loads(header.pop("__metadata__")["ltm_retrofit"])
    assert {entry["dtype"] for entry in header.values()} <= {"F32", "I64", "U8", "BOOL"}


def test_many_losses_take_no_room_in_the_header() -> None:
    losses, tensors = [0.1 * index for index in range(1000)], dict[str, torch.Tensor]()
    packed = checkpoints.pack({"losses": losses, "few": [0.5, 1.5], "mixed": [1, 2.0] * 100}, tensors)
    assert len(tensors) == 1 and len(json.dumps(packed)) < 2500
    found = checkpoints.unpack(packed, tensors)
    assert found == {"losses": losses, "few": [0.5, 1.5], "mixed": [1, 2.0] * 100}
    assert all(type(entry) is float for entry in found["losses"])


def test_damaged_images_stay_counted(model, tmp_path, monkeypatch) -> None:
    damaged = sorted(index for index, _ in islice(Order(24, shuffle=True, seed=0), 2))  # seen in the first batch only
    data = encoded(24, damaged)
    fresh, config = (
        copy.deepcopy(model),
        ltm.TrainConfig(batch_size=8, unreadable=0.1, checkpoint_every=1, held_out=0.0),
    )
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", nth(Run.step, 3, interrupt))
        with pytest.raises(KeyboardInterrupt):
            ltm.finetune(model, data, config=config, checkpoints_to=tmp_path)
    assert checkpoints.read(tmp_path)["random"][0]["unreadable"] == damaged
    history = ltm.finetune(fresh, data, config=config, checkpoints_to=tmp_path, resume=True)
    assert [entry["unreadable"] for entry in history.epochs] == [2]


def test_only_plain_values_are_packed() -> None:
    with pytest.raises(CheckpointError, match=r"cannot keep a \w*Path"):
        checkpoints.pack({"folder": [Path()]}, {})


# -------------------------------------------------------------------------------------------------------- out of memory


class Hungry(nn.Module):
    """A host whose batches have to be small, always or when it is evaluated."""

    def __init__(self, most: int, trains: bool = False) -> None:
        super().__init__()
        self.most, self.trains = most, trains

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most and not (self.trains and self.training):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")
        return x


def test_a_batch_too_large_is_halved_and_learns_the_same(model, pictures) -> None:
    data, fresh = pictures(48), copy.deepcopy(model)
    fresh.pos_drop.p = model.pos_drop.p = 0.0
    config = ltm.TrainConfig(batch_size=16, bound="none", held_out=0.0)
    whole = ltm.finetune(model, data, config=config)
    fresh.patch_embed.norm = Hungry(4)
    with pytest.warns(UserWarning, match="starting over with 4 images at once, 4 times a step"):
        parts = ltm.finetune(fresh, data, config=config)
    assert len(whole.losses) == 3 and len(parts.losses) == 12
    means = torch.tensor(parts.losses).view(3, 4).mean(dim=1)
    assert torch.allclose(means, torch.tensor(whole.losses), atol=1e-4)
    assert all(
        torch.allclose(value, fresh.state_dict()[key], atol=1e-4)
        for key, value in model.state_dict().items()
        if "ltm" not in key
    )


class Tiring(nn.Module):
    """A host whose memory ends after some batches."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= self.training
        return x if self.calls >= 0 else Hungry(0)(x)


@pytest.mark.parametrize("calls", [0, 2], ids=["at once", "half way"])
@pytest.mark.parametrize("case", ["loader", "odd"])
def test_a_batch_that_cannot_be_halved_is_named(case: str, calls: int, model, pictures) -> None:
    before = weights(model)
    model.patch_embed.norm = Tiring(calls)
    data = batches(4) if case == "loader" else pictures(42)
    message = (
        "batch of the training loader does not fit" if case == "loader" else "batch of 7 images .* cannot be halved"
    )
    with pytest.raises(TrainingError, match=message):
        ltm.finetune(model, data, config=ltm.TrainConfig(batch_size=7))
    assert equal(weights(model), before) and not was_finetuned(model)


def test_a_checkpoint_is_not_thrown_away_where_memory_is_short(model, pictures, tmp_path, monkeypatch) -> None:
    data, fresh = pictures(48), copy.deepcopy(model)
    config = ltm.TrainConfig(batch_size=16, bound="none", checkpoint_every=1, held_out=0.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "step", nth(Run.step, 3, interrupt))
        ltm.finetune(copy.deepcopy(model), data, config=config, checkpoints_to=tmp_path)
    again = copy.deepcopy(fresh)
    again.patch_embed.norm = Hungry(4)
    with pytest.raises(TrainingError, match="the checkpoint's run had 16 images at once, which do not fit"):
        ltm.finetune(again, data, config=config, checkpoints_to=tmp_path, resume=True)
    assert equal(weights(again), weights(fresh))
    expected = outcome(model, ltm.finetune(model, data, config=config))
    resumed = ltm.finetune(fresh, data, config=config, checkpoints_to=tmp_path, resume=True)
    assert same(outcome(fresh, resumed), expected)


def test_starting_over_is_said_on_the_command_line_too(model, pictures, capsys) -> None:
    model.patch_embed.norm = Hungry(4)
    with warnings.catch_warnings():
        _be_quiet(argparse.Namespace())
        ltm.finetune(model, pictures(16), config=ltm.TrainConfig(batch_size=8))
    assert "starting over with 4 images at once" in capsys.readouterr().err


@pytest.mark.slow
def test_validation_in_smaller_batches_starts_nothing_over(model, pictures) -> None:
    data, fresh = pictures(32), copy.deepcopy(model)
    config = ltm.TrainConfig(batch_size=16, epochs=2)
    expected = ltm.finetune(model, data, pictures(14), config=config)
    fresh.patch_embed.norm = Hungry(3, trains=True)
    given = ltm.finetune(fresh, data, pictures(14), config=config)
    assert given.losses == expected.losses
    assert [entry["val_accuracy"] for entry in given.epochs] == [entry["val_accuracy"] for entry in expected.epochs]


def test_a_validation_batch_that_cannot_be_halved_is_named(model, pictures) -> None:
    model.patch_embed.norm = Hungry(3, trains=True)
    with pytest.raises(TrainingError, match="validation loader does not fit into memory: pass one of smaller batches"):
        ltm.finetune(model, pictures(16), batches(1), config=ltm.TrainConfig(batch_size=8))


@pytest.mark.parametrize("ends", [False, True], ids=["restarted", "given up"])
def test_what_was_known_before_memory_ended_is_still_known(ends: bool, model, pictures) -> None:
    ltm.finetune(model, pictures(21), config=ltm.TrainConfig(batch_size=7, perplexity=4.0, held_out=0.0))
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    memories = [module for module in parts.modules() if isinstance(module, Statistics)]
    before = [(len(module.memory), module.target_perplexity) for module in memories]
    parts.patch_embed.norm = Hungry(0 if ends else 4)
    config = ltm.TrainConfig(batch_size=7 if ends else 8, held_out=0.0)
    if ends:
        with pytest.raises(TrainingError, match="cannot be halved"):
            ltm.finetune(parts, pictures(28), config=config)
        assert [(len(module.memory), module.target_perplexity) for module in memories] == before
    else:
        ltm.finetune(whole, pictures(32), config=config)
        ltm.finetune(parts, pictures(32), config=config)
        expected = [len(module.memory) for module in whole.modules() if isinstance(module, Statistics)]
        assert [len(module.memory) for module in memories] == expected and min(expected) > 32


def test_other_terms_of_the_loss_are_another_run(model, monkeypatch, tmp_path) -> None:
    """Whoever adds a term between two halves of a run would log half a sum, and minimise two things."""
    fresh, config = copy.deepcopy(model), ltm.TrainConfig(checkpoint_every=1)
    ltm.finetune(model, batches(2), config=config, checkpoints_to=tmp_path)
    further = objective.Term("certainty", lambda seen: seen.logits.mean())
    monkeypatch.setattr(loop, "terms_of", lambda config: [*objective.terms_of(config), further])
    with pytest.raises(CheckpointError, match=r"which differs in terms \("):
        ltm.finetune(fresh, batches(2), config=config, checkpoints_to=tmp_path, resume=True)
