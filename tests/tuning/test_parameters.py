"""What trains, how fast, and that everything else stays as it was."""

from __future__ import annotations

import copy
import itertools
import math
import sys

import pytest
import torch
from pieces import batches, equal, weights
from timm.scheduler import CosineLRScheduler
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.errors import RecipeError, TrainingError
from ltm_retrofit.saving.base import is_ours
from ltm_retrofit.tuning.classes import set_classes
from ltm_retrofit.tuning.parameters import chosen, make_optimizer, make_schedule
from ltm_retrofit.tuning.settings import CHOICES, TrainConfig


def changed(before: dict, after: dict) -> set[str]:
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


def is_norm(model: nn.Module, key: str) -> bool:
    return "Norm" in type(model.get_submodule(key.rpartition(".")[0])).__name__


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "hf-dinov2"])
def test_masks_alone_leave_the_host_bit_identical(name, converted) -> None:
    model = converted(name)
    before = weights(model)
    ltm.finetune(model, batches(4), config=TrainConfig(lr=1e-2, train="masks"))
    moved = changed(before, weights(model))
    assert moved and all(is_ours(key) for key in moved)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_masks_and_norms(name, converted) -> None:
    model = converted(name)
    before = weights(model)
    ltm.finetune(model, batches(4), config=TrainConfig(lr=1e-2, train="masks+norms"))
    hosts = {key for key in changed(before, weights(model)) if not is_ours(key)}
    assert hosts and all(is_norm(model, key) for key in hosts)


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "hf-dinov2"])
def test_low_rank_matrices_end_in_the_weights(name, converted) -> None:
    model = converted(name)
    before, kinds = weights(model), [type(module) for module in model.modules()]
    wanted = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    history = ltm.finetune(model, batches(6, 14), config=TrainConfig(lr=1e-2, train="lora", lora_rank=2))
    after = weights(model)
    assert list(after) == list(before) and [type(module) for module in model.modules()] == kinds
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == wanted
    hosts = {key for key in changed(before, after) if not is_ours(key)}
    assert hosts and math.isfinite(history.losses[-1])
    for key in hosts:
        assert before[key].ndim == 2, f"{key} is no linear map"
        singular = torch.linalg.svdvals((after[key] - before[key]).double())
        assert singular[0] > 0 and singular[2] < 1e-4 * singular[0], f"{key} changed by more than rank 2"
    assert history.losses[-1] < history.losses[0]


def test_low_rank_works_on_an_unconverted_model_too(build) -> None:
    model = build("timm-vit")
    before = weights(model)
    ltm.finetune(model, batches(3), config=TrainConfig(lr=1e-2, train="lora"))
    assert changed(before, weights(model)) and "peft_config" not in model.__dict__


def test_low_rank_without_peft_says_what_to_install(converted, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrainingError, match=r"pip install 'ltm-retrofit\[lora\]'"):
        ltm.finetune(converted("timm-vit"), batches(1), config=TrainConfig(train="lora"))


@pytest.mark.parametrize("train", ["masks", "masks+norms", "lora"])
@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_a_new_head_always_trains(name, train, build) -> None:
    model = build(name)
    assert set_classes(model, [str(index) for index in range(5)])
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
    head = {"timm-vit": "head.weight", "hf-vit": "classifier.weight"}[name]
    before, data = weights(model), [(images, labels % 5) for images, labels in batches(3)]
    ltm.finetune(model, data, config=TrainConfig(lr=1e-2, train=train))
    assert head in changed(before, weights(model))


@pytest.mark.parametrize("train", ["masks", "masks+norms"])
def test_masks_that_are_not_there_cannot_train(train, build) -> None:
    with pytest.raises(TrainingError, match="finds no mask"):
        ltm.finetune(build("timm-vit"), batches(1), config=TrainConfig(train=train))


# --------------------------------------------------------------------------------------------------------- how fast


def rates(model: nn.Module, **options: object) -> dict[str, tuple[float, float]]:
    optimizer = make_optimizer(model, TrainConfig(**options))
    of = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: of[parameter] for name, parameter in model.named_parameters() if parameter in of}


def test_masks_have_a_rate_of_their_own(converted) -> None:
    model = converted("timm-vit")
    given = rates(model, lr=1e-4, mask_lr=1e-2, weight_decay=0.1)
    assert {rate for key, (rate, _) in given.items() if is_ours(key)} == {1e-2}
    assert {rate for key, (rate, _) in given.items() if not is_ours(key)} == {1e-4}
    named = dict(model.named_parameters())
    assert all(decay == (0.1 if named[key].ndim > 1 else 0.0) for key, (_, decay) in given.items())


@pytest.mark.parametrize(
    ("train", "mask_rate"), [("all", 3.0), ("masks+norms", 3.0), ("masks", 0.1), ("lora", 0.1)], ids=str
)
def test_masks_are_faster_than_weights_that_are_trained_already(train, mask_rate, converted) -> None:
    given = rates(converted("timm-vit"), lr=0.1, train=train)
    assert {round(rate, 6) for key, (rate, _) in given.items() if is_ours(key)} == {mask_rate}
    assert {rate for key, (rate, _) in given.items() if not is_ours(key)} == {0.1}


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_earlier_blocks_learn_more_slowly(name, converted) -> None:
    model = converted(name)
    given = rates(model, lr=1.0, layer_decay=0.5, train="all")
    keys = sorted(key for key in given if key.endswith(("norm1.weight", "layernorm_before.weight")))
    several = [given[key][0] for key in keys]
    assert len(several) == 6 and all(early == 0.5 * late for early, late in itertools.pairwise(several))
    assert given["head.weight" if name == "timm-vit" else "classifier.weight"][0] == 1.0
    assert {rate for key, (rate, _) in given.items() if is_ours(key)} == {30.0}


@pytest.mark.parametrize("opt", ["sgd", "lamb", "adamw"])
def test_timms_optimizers_train(opt, converted) -> None:
    model = converted("timm-vit")
    history = ltm.finetune(model, batches(12), config=TrainConfig(lr=2e-2 if opt != "adamw" else 2e-3, opt=opt))
    assert sum(history.losses[-3:]) < sum(history.losses[:3])


def test_an_optimizer_that_timm_lacks_is_refused(converted) -> None:
    with pytest.raises(RecipeError, match="opt='adamx'"):
        ltm.finetune(converted("timm-vit"), batches(1), config=TrainConfig(opt="adamx"))


def test_accumulated_batches_are_one_batch(build) -> None:
    one, several = build("timm-vit"), build("timm-vit")
    whole = batches(3, 14)
    halves = [(images[part], labels[part]) for images, labels in whole for part in (slice(0, 7), slice(7, 14))]
    ltm.finetune(one, whole, config=TrainConfig(lr=1e-2, opt="sgd", batch_size=14))
    ltm.finetune(several, halves, config=TrainConfig(lr=1e-2, opt="sgd", batch_size=7, accumulate=2))
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(several)[key], value, rtol=1e-4, atol=1e-6)


def test_what_is_left_of_an_epoch_is_a_step_of_its_own(build) -> None:
    one, several = build("timm-vit"), build("timm-vit")
    data = batches(3, 7)
    pair = (torch.cat([data[0][0], data[1][0]]), torch.cat([data[0][1], data[1][1]]))
    ltm.finetune(one, [pair, data[2]], config=TrainConfig(lr=1e-2, opt="sgd"))
    ltm.finetune(several, data, config=TrainConfig(lr=1e-2, opt="sgd", accumulate=2))
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(several)[key], value, rtol=1e-4, atol=1e-6)


def test_the_moving_average_is_what_stays_and_what_is_validated(converted) -> None:
    plain, averaged = converted("timm-vit"), converted("timm-vit")
    start = weights(plain)
    ltm.finetune(plain, batches(8), config=TrainConfig(lr=1e-2))
    history = ltm.finetune(averaged, batches(8), batches(4, seed=3), config=TrainConfig(lr=1e-2, ema=0.9))
    key = "blocks.0.mlp.fc1.weight"
    moved, less = (float((weights(model)[key] - start[key]).norm()) for model in (plain, averaged))
    assert 0 < less < 0.9 * moved
    assert history.epochs[-1]["val_accuracy"] == ltm.evaluate(averaged, batches(4, seed=3))


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "timm-swin"])
def test_recomputed_activations_give_the_same_training(name, build) -> None:
    model = build(name) if name != "timm-swin" else None
    if model is None:
        from zoo import ZOO

        model, _ = ZOO[name]()
    try:
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8))
    except ltm.BudgetError as error:
        ltm.retrofit(model, ltm.LTMConfig(flops=error.nearest))
    size = 64 if name == "timm-swin" else 32
    data = [
        (torch.nn.functional.interpolate(images, size=(size, size)), labels % 5)
        for images, labels in batches(60 if name == "timm-vit" else 3)
    ]
    other = copy.deepcopy(model)
    plain = ltm.finetune(model, data, config=TrainConfig(lr=1e-3))
    saved = ltm.finetune(other, data, config=TrainConfig(lr=1e-3, checkpointing=True))
    assert plain.losses == pytest.approx(saved.losses, rel=1e-5)
    assert not getattr(other, "grad_checkpointing", False) and not getattr(other, "is_gradient_checkpointing", False)


def test_a_model_without_checkpointing_says_so() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    model.num_classes = 7
    with pytest.raises(TrainingError, match="Sequential has no gradient checkpointing"):
        ltm.finetune(model, batches(1), config=TrainConfig(checkpointing=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_lr": -1}, "mask_lr must be a number from 0"),
        ({"layer_decay": 0}, "layer_decay above 0"),
        ({"ema": 1}, "ema must be below 1"),
        ({"accumulate": 0}, "accumulate must be a whole number from 1 on"),
        ({"lora_rank": 0}, "lora_rank must be a whole number from 1 on"),
        ({"opt": None}, "opt must be a name, got None"),
        ({"checkpointing": 1}, "checkpointing must be true or false"),
    ],
)
def test_impossible_settings_are_refused(values, message) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**values)


def test_the_same_seed_gives_the_same_bits_with_low_rank(converted) -> None:
    runs = [converted("timm-vit") for _ in range(2)]
    for model in runs:
        ltm.finetune(model, batches(3), config=TrainConfig(train="lora", lr=1e-2))
    assert equal(weights(runs[0]), weights(runs[1]))


class NormMlpHead(nn.Sequential):
    """A head whose name says norm, like timm's NormMlpClassifierHead."""


def test_norms_are_not_a_head_with_a_norm_in_its_name(build) -> None:
    model = build("timm-vit")
    model.head = NormMlpHead(nn.LayerNorm(48), nn.Linear(48, 7))
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter] for parameter in chosen(model, "masks+norms")}
    assert {"head.0.weight", "head.0.bias", "blocks.0.norm1.weight", "norm.bias"} <= found
    assert not {"head.1.weight", "head.1.bias", "blocks.0.mlp.fc1.bias"} & found


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_checkpointing_that_was_on_stays_on(name: str, wanted: bool, build) -> None:
    model = build(name)
    if name == "timm-vit":
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()
    ltm.finetune(model, batches(1), config=TrainConfig(checkpointing=wanted))
    assert model.grad_checkpointing if name == "timm-vit" else model.is_gradient_checkpointing


def factors(sched: str, steps: int, **settings: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    schedule = make_schedule(optimizer, TrainConfig(sched=sched, **settings), steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("sched", CHOICES["sched"])
def test_the_rate_rises_and_falls(sched: str) -> None:
    found = factors(sched, 40)
    assert found[:4] == sorted(found[:4]) and found[4:] == sorted(found[4:], reverse=True)
    assert max(found) <= 0.5 and found[3] == pytest.approx(0.4, rel=1e-3) and found[-1] < 0.02


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.25])
def test_the_cosine_is_timms(warmup: float) -> None:
    unit = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    rising = 40 * warmup
    theirs = CosineLRScheduler(unit, 40, warmup_t=int(rising), warmup_lr_init=0.5 / (rising + 1), t_in_epochs=False)
    expected = []
    for step in range(40):
        theirs.step_update(step)
        expected.append(unit.param_groups[0]["lr"])
    assert factors("cosine", 40, warmup=warmup) == pytest.approx(expected)


def test_a_schedule_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RecipeError, match="sched must be one of 'cosine', 'poly', 'tanh', 'step', got 'plateau'"):
        TrainConfig(sched="plateau")


def test_every_schedule_trains(build) -> None:
    for sched in CHOICES["sched"]:
        assert len(ltm.finetune(build("timm-vit"), batches(2), config=TrainConfig(sched=sched)).losses) == 2


def test_an_optimizer_of_second_derivatives_is_refused_by_name(converted) -> None:
    model = converted("timm-vit")
    before = weights(model)
    with pytest.raises(RecipeError, match="opt='adahessian' needs second derivatives"):
        ltm.finetune(model, batches(1), config=ltm.TrainConfig(opt="adahessian"))
    assert equal(weights(model), before)
