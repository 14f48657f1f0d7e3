"""What validation is for: the best state is kept, training is not disturbed by it, and no image is in two parts."""

from __future__ import annotations

import copy
import signal
from collections import Counter
from typing import Any

import datasets
import pytest
import torch
from pieces import batches, encoded, equal, interrupt, nth, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import was_finetuned
from ltm_retrofit.errors import CheckpointError, DataError
from ltm_retrofit.tuning import checkpoints, settings
from ltm_retrofit.tuning.classes import evaluate, set_classes
from ltm_retrofit.tuning.loop import Run
from ltm_retrofit.tuning.train import decide
from ltm_retrofit.tuning.validation import Validation, held_out, rank

#: what is in its place while a test runs: see conftest.py
RECOMMENDED, PACE = settings.TAUGHT, settings.pace
PLAIN: dict[str, Any] = {"train": "all", "distill": 0.0, "distill_token": 0.0, "bound": "none"}
CONFIG = ltm.TrainConfig(epochs=3, batch_size=7, lr=1e-3, **PLAIN)


def scripted(monkeypatch: pytest.MonkeyPatch, *accuracies: float) -> list[dict[str, torch.Tensor]]:
    """Let validation find these accuracies, one after the other; the states that it is shown are in the list."""
    seen: list[dict[str, torch.Tensor]] = []

    def measure(self: Validation, model: nn.Module, *_: Any) -> dict[str, Any]:
        seen.append(weights(model))
        return {"val_images": 1, "val_accuracy": accuracies[len(seen) - 1], "val_loss": 1.0}

    monkeypatch.setattr(Validation, "measure", measure)
    return seen


# ------------------------------------------------------------------------------------------------ the best is kept


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}, {"train": "masks"}, {"train": "lora"}], ids=str)
def test_the_best_state_is_what_the_model_holds(changes, converted, monkeypatch) -> None:
    model, said = converted("timm-vit"), list[str]()
    seen = scripted(monkeypatch, 50.0, 60.0, 70.0, 65.0)
    config = ltm.TrainConfig(**{**CONFIG.to_dict(), **changes})
    history = ltm.finetune(model, batches(1), batches(1), config=config, say=said.append)
    assert history.kept == 2 and history.before["val_accuracy"] == 50.0
    assert [entry["val_accuracy"] for entry in history.epochs] == [60.0, 70.0, 65.0]
    if changes != {"train": "lora"}:  # whose matrices are merged into the weights
        assert equal(weights(model), seen[2])
    assert not equal(seen[2], seen[3]) and was_finetuned(model)
    assert said[0] == "before    50.00 % of 1 validation images"
    assert said[-1] == "kept      epoch 2, the best one: 70.00 % of 1 validation images"


@pytest.mark.parametrize(
    ("case", "changes"),
    [("converted", {}), ("converted", {"train": "lora"}), ("original", {"ema": 0.5})],
    ids=str,
)
def test_where_no_epoch_is_better_the_model_is_as_it_was_given(
    case: str, changes, converted, build, monkeypatch
) -> None:
    model, said = converted("timm-vit") if case == "converted" else build("timm-vit"), list[str]()
    before = weights(model)
    scripted(monkeypatch, 50.0, 49.0, 50.0, 10.0)
    config = ltm.TrainConfig(**{**CONFIG.to_dict(), **changes})
    history = ltm.finetune(model, batches(1), batches(1), config=config, say=said.append)
    assert history.kept == 0 and equal(weights(model), before) and not was_finetuned(model)
    name = "the converted model" if case == "converted" else "the model as it was given"
    assert said[-1] == f"kept      {name}: no epoch was better, so it is what you get back"


def test_a_rate_that_destroys_does_no_harm(converted) -> None:
    model, val = converted("timm-vit"), batches(6, seed=9)
    ltm.finetune(model, batches(20), val, config=ltm.TrainConfig(lr=2e-3, bound="none"))
    good, before = evaluate(model, val), weights(model)
    history = ltm.finetune(model, batches(4), val, config=ltm.TrainConfig(lr=1.0, bound="none"))
    assert history.epochs[0]["val_accuracy"] < good == evaluate(model, val) == history.before["val_accuracy"]
    assert equal(weights(model), before) and was_finetuned(model), "it was tuned before"


def test_among_equals_the_loss_decides_and_what_is_no_number_never_wins() -> None:
    low, high = ({"val_accuracy": 50.0, "val_loss": loss} for loss in (0.5, 0.6))
    assert rank(low) > rank(high) and rank({"val_accuracy": 50.1, "val_loss": 9.0}) > rank(low)
    assert rank({"val_accuracy": 100.0, "val_loss": float("nan")}) < rank(high)
    assert rank({"val_agreement": 1.0, "val_kl": 0.1}) > rank({"val_agreement": 99.0, "val_kl": 0.2})


def test_without_labels_the_answers_of_the_unconverted_model_decide(converted) -> None:
    model, teacher = converted("timm-vit"), converted("timm-vit")
    data = batches(4)
    config = ltm.TrainConfig(epochs=2, batch_size=7, lr=1e-4, distill=1.0, bound="none")
    images = [images for images, _ in data]
    history = ltm.finetune(model, images, images, config=config)
    with torch.no_grad(), ltm.disabled(teacher):
        wanted = torch.cat([teacher(part) for part in images]).log_softmax(dim=1)
    found = torch.cat([converted("timm-vit").eval()(part) for part in images]).log_softmax(dim=1)
    kl = (wanted.exp() * (wanted - found)).sum(dim=1).mean().item()
    assert history.before["val_kl"] == pytest.approx(kl, rel=1e-4) and history.before["val_images"] == 28
    best = min([history.before, *history.epochs], key=lambda entry: entry["val_kl"])
    assert history.kept == best.get("epoch", 0) and history.epochs[0]["val_accuracy"] is None
    mixed = [(data[0][0], data[0][1]), (data[1][0], None)]
    with pytest.raises(DataError, match="some validation batches have labels and others have none"):
        ltm.finetune(model, images, mixed, config=config)


# ------------------------------------------------------------------------------------------------ what is left open


def test_what_settings_leave_open_is_decided_by_who_knows_the_classes_and_said(converted, build, monkeypatch) -> None:
    monkeypatch.setattr(settings, "TAUGHT", RECOMMENDED)
    new = build("timm-vit")
    set_classes(new, 5)
    cases = (
        (converted("timm-vit"), RECOMMENDED),
        (converted("timm-vit", "tome"), RECOMMENDED),
        (build("timm-vit"), settings.UNTAUGHT),
        (ltm.retrofit(new, ltm.LTMConfig(flops=0.7)), settings.UNTAUGHT),  # a classifier that nobody trained
    )
    for model, expected in cases:
        said: list[str] = []
        found = decide(model, ltm.TrainConfig(lr=1e-3, epochs=5), batches(1), said.append).to_dict()
        assert found == {**ltm.TrainConfig().to_dict(), **expected, "lr": 1e-3, "epochs": 5, "batch_size": 64}
        (line,) = said
        assert all(f"{name} {value}" in line for name, value in expected.items())
        assert "lr " not in line
    whole = ltm.TrainConfig(**{**RECOMMENDED, "lr": 1e-3, "epochs": 1, "batch_size": 7})
    assert decide(cases[0][0], whole, batches(1), said.append) == whole and len(said) == 1


@pytest.mark.parametrize(
    ("images", "epochs", "batch_size", "rate"),
    [
        (1, 4, 16, 3e-6),
        (200, 4, 16, 3e-6),
        (800, 2, 16, 3e-6),
        (1600, 1, 32, 1e-5),
        (3068, 1, 32, 1e-5),
        (6400, 1, 64, 1e-5),
        (10**6, 1, 64, 1e-5),
        (None, 1, 64, 1e-5),
    ],
)
def test_few_images_are_gone_through_several_times_in_small_steps(images, epochs: int, batch_size: int, rate) -> None:
    assert PACE(images, known=True) == {"epochs": epochs, "batch_size": batch_size, "lr": rate}
    assert PACE(images, known=False) == {"epochs": epochs, "batch_size": batch_size, "lr": 3e-4}
    for few in ("masks", "masks+norms", "lora"):  # what there is to unlearn stays as it is
        assert PACE(images, known=True, train=few)["lr"] == 1e-4
    assert images is None or images < 200 or epochs * images >= 48 * batch_size  # enough steps to learn from


def test_a_loader_says_its_own_batch_size(build, monkeypatch) -> None:
    """An unconverted model that knows its classes is not led away from them, either."""
    monkeypatch.setattr(settings, "pace", PACE)
    said: list[str] = []
    loader = DataLoader(TensorDataset(*batches(1, 14)[0]), batch_size=7)
    decided = decide(build("timm-vit"), ltm.TrainConfig(), loader, said.append)
    assert (decided.batch_size, decided.epochs, decided.lr) == (7, 4, 3e-6)
    assert "batch_size" not in said[0] and "distill 0.0" in said[0]


def test_how_many_images_there_are_decides(converted, pictures, monkeypatch) -> None:
    monkeypatch.setattr(settings, "pace", PACE)
    said: list[str] = []
    history = ltm.finetune(converted("timm-vit"), pictures(40), config=ltm.TrainConfig(bound="none"), say=said.append)
    assert len(history.epochs) == 4 and len(history.losses) == 4 * (36 // 16)
    assert "epochs 4, batch_size 16" in said[0]


# ------------------------------------------------------------------------------------------- training is not disturbed


@pytest.mark.parametrize("kind", ["table", "loader"])
def test_training_is_the_same_to_the_bit_with_and_without_validation(kind: str, build, pictures, tmp_path) -> None:
    host = build("timm-vit")
    host.pos_drop.p = 0.2
    model = ltm.retrofit(host, ltm.LTMConfig(flops=0.7))
    shuffled = DataLoader(TensorDataset(*batches(1, 14)[0]), batch_size=7, shuffle=True)  # draws of everyone's numbers
    val = pictures(14, seed=1) if kind == "table" else shuffled
    drawn = {"mixup": 0.4, "cutmix": 0.4, "augment": "crop", "distill": 0.5, "held_out": 0.0}
    config = ltm.TrainConfig(**{**CONFIG.to_dict(), "epochs": 2, **drawn})
    losses, states = [], []
    for name, given in (("with", val), ("without", None)):
        train = pictures(21) if kind == "table" else DataLoader(shuffled.dataset, batch_size=7, shuffle=True)
        history = ltm.finetune(copy.deepcopy(model), train, given, config=config, checkpoints_to=tmp_path / name)
        losses.append(history.losses)
        states.append(checkpoints.read(tmp_path / name)["model"])
        assert (history.kept is None) == (given is None)
    assert losses[0] == losses[1] and equal(*states)


def test_an_interrupted_run_knows_its_best_state(converted, tmp_path, monkeypatch) -> None:
    whole, broken, again = (converted("timm-vit") for _ in range(3))
    with monkeypatch.context() as patch:
        scripted(patch, 50.0, 70.0, 60.0, 65.0)
        expected = ltm.finetune(whole, batches(3), batches(1), config=CONFIG)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        scripted(patch, 50.0, 70.0)
        patch.setattr(Run, "step", nth(Run.step, 5, interrupt))
        ltm.finetune(broken, batches(3), batches(1), config=CONFIG, checkpoints_to=tmp_path)
    with pytest.raises(CheckpointError, match="differs in validation"):
        ltm.finetune(again, batches(3), batches(2), config=CONFIG, checkpoints_to=tmp_path, resume=True)
    scripted(monkeypatch, 60.0, 65.0)  # what it begins with is not validated again
    resumed = ltm.finetune(again, batches(3), batches(1), config=CONFIG, checkpoints_to=tmp_path, resume=True)
    assert resumed.kept == expected.kept == 1 and resumed.losses == expected.losses
    assert resumed.before == expected.before and equal(weights(again), weights(whole))


# -------------------------------------------------------------------------------------------------------------- Ctrl-C


def press(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)  # to this thread: another one would be told of it some time later


def test_ctrl_c_stops_behind_a_checkpoint_and_the_run_goes_on(converted, tmp_path, monkeypatch) -> None:
    config = ltm.TrainConfig(**{**CONFIG.to_dict(), "epochs": 2})
    whole, again, val = converted("timm-vit"), converted("timm-vit"), batches(1)
    expected = ltm.finetune(whole, batches(2), val, config=config)
    before, step, stops = signal.getsignal(signal.SIGINT), Run.step, [0, 1]  # within an epoch, and in its last step

    def pressed(run: Run) -> None:
        if run.progress.step in stops:
            stops.remove(run.progress.step)
            press()
        step(run)

    monkeypatch.setattr(Run, "step", pressed)
    for done in (1, 2):
        said: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            model = converted("timm-vit")
            ltm.finetune(model, batches(2), val, config=config, checkpoints_to=tmp_path, resume=True, say=said.append)
        assert "stopping  once a checkpoint is written; Ctrl-C again stops at once" in said
        assert signal.getsignal(signal.SIGINT) is before
        assert checkpoints.read(tmp_path)["progress"]["step"] == done
    resumed = ltm.finetune(again, batches(2), val, config=config, checkpoints_to=tmp_path, resume=True)
    assert resumed.losses == expected.losses and equal(weights(again), weights(whole))


def test_a_second_ctrl_c_and_one_without_checkpoints_stop_at_once(converted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Run, "step", lambda run: press(2))
    with pytest.raises(KeyboardInterrupt):
        ltm.finetune(converted("timm-vit"), batches(3), batches(1), config=CONFIG, checkpoints_to=tmp_path)
    assert not checkpoints.exists(tmp_path)
    monkeypatch.setattr(Run, "step", lambda run: press())
    with pytest.raises(KeyboardInterrupt):
        ltm.finetune(converted("timm-vit"), batches(3), batches(1), config=CONFIG)


# ----------------------------------------------------------------------------------------------- what is held out


def test_a_share_of_each_class_is_held_out_and_the_same_for_a_seed(pictures) -> None:
    data = pictures(200, classes=7)
    train, val = held_out(data, 0.1, seed=0)
    assert len(val) == 20 and len(train) == 180
    counts = Counter(val["label"][:])
    assert set(counts) == set(range(7)) and set(counts.values()) <= {2, 3}
    again, other = held_out(data, 0.1, seed=0)[1], held_out(data, 0.1, seed=1)[1]
    shown = [[image.tobytes() for image in part["image"]] for part in (train, val, again, other)]
    assert shown[1] == shown[2] != shown[3]
    assert not set(shown[0]) & set(shown[1]) and len(set(shown[0]) | set(shown[1])) == 200


def test_the_last_image_of_a_class_is_never_held_out(pictures) -> None:
    data = pictures(14)
    for seed in range(5):
        train, val = held_out(data, 0.5, seed)
        assert set(train["label"][:]) == set(range(7)) and len(val) == 7
    assert held_out(data, 0.6, 0) is None, "8 of 14 cannot be spared"
    assert held_out(pictures(4), 0.1, 0) is None
    unlabelled = data.select_columns(["image"])
    assert [len(part) for part in held_out(unlabelled, 0.1, 0)] == [13, 1]


def test_damaged_images_among_those_held_out_are_accepted_as_in_training(converted) -> None:
    data = encoded(28, damaged=range(0, 28, 14))
    config = ltm.TrainConfig(batch_size=7, unreadable=0.1, held_out=0.5)
    _, val = held_out(data, 0.5, seed=0)
    stored = [len(row["image"]["bytes"]) for row in val.cast_column("image", datasets.Image(decode=False))]
    assert min(stored) < 0.7 * max(stored), "none of the damaged ones is held out"
    assert ltm.finetune(converted("timm-vit", "slice"), data, config=config).before["val_images"] == 14


def test_without_validation_data_a_tenth_is_held_out_and_it_is_said(converted, pictures) -> None:
    said: list[str] = []
    model, one = converted("timm-vit", "slice"), {**CONFIG.to_dict(), "epochs": 1}
    history = ltm.finetune(model, pictures(30), config=ltm.TrainConfig(**one), say=said.append)
    assert said[0].startswith("no validation data: 3 of the 30 training images are held out for it")
    assert len(history.losses) == 3 and history.before["val_images"] == 3 and history.kept is not None
    history = ltm.finetune(model, pictures(30), config=ltm.TrainConfig(**{**one, "held_out": 0.0}), say=said.append)
    assert len(history.losses) == 4 and history.kept is None and not history.before
    assert said[-1] == "kept      the last state: there was nothing to validate it on"
