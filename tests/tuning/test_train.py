"""finetune: it learns, deterministically; it leaves everything else as it was; it stops on the last good weights."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import warnings

import conversions
import datasets
import numpy as np
import pytest
import timm
import torch
from pieces import Own, batches, equal, weights
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import was_finetuned
from ltm_retrofit.errors import (
    DataError,
    RecipeError,
    TrainingError,
)
from ltm_retrofit.tuning import processes
from ltm_retrofit.tuning.classes import count_classes, evaluate, predictions
from ltm_retrofit.tuning.loop import SKIPPED, Run
from ltm_retrofit.tuning.settings import TrainConfig

METHODS = ("ltm", "tome", "pool", "slice")


# ------------------------------------------------------------------------------------------------------ the settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number from 1 on, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"epochs": True}, "epochs must be a whole number from 1 on, got True"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on"),
        ({"workers": -1}, "workers must be a whole number from 0 on, got -1"),
        ({"lr": -1e-4}, "lr must be a number from 0"),
        ({"lr": "1e-4"}, "lr must be a number from 0 to inf, got '1e-4'"),
        ({"lr": math.nan}, "lr must be a number"),
        ({"warmup": 1.5}, "warmup must be a number from 0 to 1, got 1.5"),
        ({"bound_warmup": -0.1}, "bound_warmup must be a number from 0 to 1"),
        ({"label_smoothing": 2}, "label_smoothing must be a number from 0 to 1"),
        ({"bound_weight": True}, "bound_weight must be a number"),
        ({"weight_decay": "no"}, "weight_decay must be a number"),
        ({"clip": -1}, "clip must be a number"),
        ({"train": "mask"}, "train must be one of 'all', 'masks', 'masks+norms', 'lora', got 'mask'"),
        ({"augment": "flip"}, "augment must be one of 'none', 'crop', got 'flip'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of 'no', 'bf16', 'fp16', got 'fp8'"),
        ({"learning_rate": 1}, "TrainConfig: unknown key 'learning_rate'"),
        ({"epoch": 2}, "unknown key 'epoch'; did you mean 'epochs'?"),
        *(({name: 1}, f"TrainConfig: unknown key '{name}'") for name in ("gate", "anneal", "bound_sites")),
        ({"bound_weigth": 2}, "unknown key 'bound_weigth'; did you mean 'bound_weight'?"),
    ],
)
def test_impossible_settings_are_refused(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize("seed", ["zero", 1.5, None, -1])
def test_the_seed_is_a_whole_number(seed) -> None:
    with pytest.raises(RecipeError, match="seed"):
        TrainConfig(seed=seed)


def test_infinite_rate_is_refused() -> None:
    with pytest.raises(RecipeError, match="lr"):
        TrainConfig(lr=math.inf)


def test_settings_are_frozen_and_go_through_json() -> None:
    config = TrainConfig(epochs=3, lr=1e-3, train="masks")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.lr = 1.0  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("method", METHODS)
def test_converted_model_learns_by_every_method(method: str, converted) -> None:
    model = converted("timm-vit", method)
    before = evaluate(model, batches(6, seed=9))
    history = ltm.finetune(model, batches(20), batches(6, seed=9), config=TrainConfig(lr=2e-3, bound_weight=0.1))
    assert len(history.losses) == 20 and all(math.isfinite(loss) for loss in history.losses)
    assert sum(history.losses[-3:]) < 0.5 * sum(history.losses[:3])
    assert history.epochs[-1]["val_accuracy"] == evaluate(model, batches(6, seed=9)) > max(before, 70)
    assert was_finetuned(model) and ltm.is_retrofitted(model)


def test_unconverted_model_learns(build) -> None:
    model = build("timm-vit")
    history = ltm.finetune(model, batches(20), batches(6, seed=9), config=TrainConfig(lr=2e-3))
    assert sum(history.losses[-3:]) < 0.5 * sum(history.losses[:3])
    assert history.epochs[0]["val_accuracy"] > 70 and history.epochs[0]["bound"] == 0
    assert history.epochs[0]["sites"] == {} and was_finetuned(model)


def test_history_says_what_happened_in_each_epoch(converted) -> None:
    model = converted("timm-vit")
    history = ltm.finetune(model, batches(4), batches(2, seed=3), config=TrainConfig(epochs=2))
    assert [entry["epoch"] for entry in history.epochs] == [1, 2] and len(history.losses) == 8
    for index, entry in enumerate(history.epochs):
        assert entry["loss"] == pytest.approx(sum(history.losses[4 * index : 4 * index + 4]) / 4)
        assert 0 <= entry["val_accuracy"] <= 100
        assert entry["images_per_second"] == pytest.approx(28 / entry["seconds"])
    assert history.epochs[0]["lr"] > history.epochs[1]["lr"] == pytest.approx(0, abs=1e-12)
    assert json.loads(json.dumps(history.to_dict())) == history.to_dict()


def test_what_every_mask_has_learned_is_reported(converted) -> None:
    model = converted("timm-vit")
    sites = [row.site for row in ltm.get_plan(model).rows if row.action == "merge"]
    reported = ltm.finetune(model, batches(3), config=TrainConfig(lr=1e-2)).epochs[-1]["sites"]
    assert list(reported) == sites
    for name, values in reported.items():
        mask = model.get_submodule(name).ltm
        assert values == {"weight_std": mask.weight.std().item()}
        assert values["weight_std"] > 0
    assert ltm.finetune(converted("timm-vit", "tome"), batches(1)).epochs[-1]["sites"] == {}


def test_without_validation_there_is_no_accuracy(converted) -> None:
    assert ltm.finetune(converted("timm-vit", "slice"), batches(1)).epochs[0]["val_accuracy"] is None


def test_dict_batches_train_a_hugging_face_model(converted, build) -> None:
    for model in (converted("hf-vit"), build("hf-vit")):
        dicts = [{"pixel_values": images, "labels": labels} for images, labels in batches(12, 7)]
        history = ltm.finetune(model, dicts, dicts[:2], config=TrainConfig(lr=2e-3))
        assert sum(history.losses[-3:]) < 0.7 * sum(history.losses[:3])
        assert history.epochs[0]["val_accuracy"] == evaluate(model, batches(12, 7)[:2])


def test_soft_labels_train_and_are_evaluated(converted) -> None:
    soft = [(images, torch.nn.functional.one_hot(labels, 7).float()) for images, labels in batches(2)]
    hard, smooth = converted("timm-vit"), converted("timm-vit")
    assert ltm.finetune(smooth, soft).losses == ltm.finetune(hard, batches(2)).losses
    assert evaluate(smooth, soft) == evaluate(hard, batches(2))


def test_tables_are_loaded_as_the_model_wants_them(converted, pictures) -> None:
    model = converted("timm-vit")
    config = TrainConfig(epochs=3, batch_size=14, lr=2e-3, augment="crop")
    history = ltm.finetune(model, pictures(70), pictures(14, seed=1), config=config)
    assert len(history.losses) == 15
    assert history.losses[-1] < history.losses[0]
    assert 0 <= history.epochs[-1]["val_accuracy"] <= 100


@pytest.mark.parametrize("name", ["timm-deit", "timm-dinov2", "hf-deit-teacher", "hf-dinov2"])
def test_every_kind_of_head_trains(name: str, converted) -> None:
    model = converted(name)
    before = weights(model)
    history = ltm.finetune(model, batches(4, 14), config=TrainConfig(lr=1e-3))
    assert all(math.isfinite(loss) for loss in history.losses)
    assert not equal(before, weights(model))


# --------------------------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("case", ["converted", "original"])
def test_flags_gradients_device_and_random_state_stay(case: str, converted, build) -> None:
    model = converted("timm-vit") if case == "converted" else build("timm-vit")
    model.train()
    model.blocks[2].eval()
    model.patch_embed.proj.weight.requires_grad_(False)
    frozen = model.patch_embed.proj.weight.clone()
    flags = {name: module.training for name, module in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ltm.finetune(model, batches(2), batches(1), config=TrainConfig(lr=1e-3))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())
    assert torch.equal(frozen, model.patch_embed.proj.weight), "a frozen parameter was trained"


def test_the_model_is_still_plain_afterwards(build) -> None:
    """No wrapper of Accelerate's stays: the copy is independent, and pickles."""
    model = build("timm-vit")
    attributes = set(model.__dict__)
    ltm.finetune(model, batches(1))
    assert set(model.__dict__) - attributes <= {"ltm_finetuned"}
    assert equal(weights(pickle.loads(pickle.dumps(model))), weights(model))


def test_same_seed_same_bits_other_seed_other_bits(converted, pictures) -> None:
    def one(seed: int) -> tuple[list[float], dict[str, Tensor]]:
        model = converted("timm-vit")
        config = TrainConfig(epochs=2, batch_size=14, seed=seed, augment="crop", bound_weight=0.5, bound_warmup=0.0)
        torch.manual_seed(seed + 17)  # the caller's random state is of no account
        return ltm.finetune(model, pictures(42), config=config).losses, weights(model)

    (losses, trained), (again, retrained), (other, _) = one(0), one(0), one(1)
    assert losses == again and equal(trained, retrained)
    assert losses != other


def test_dropout_too_depends_on_the_seed_only(build) -> None:
    def losses(seed: int, outside: int) -> list[float]:
        model = build("timm-vit")
        model.head_drop.p = 0.5
        torch.manual_seed(outside)
        return ltm.finetune(model, batches(2), config=TrainConfig(seed=seed)).losses

    assert losses(0, 1) == losses(0, 2) != losses(1, 1)


def test_masks_only(converted) -> None:
    model = converted("timm-vit")
    before = weights(model)
    ltm.finetune(model, batches(3), config=TrainConfig(lr=1e-2, train="masks"))
    parameters = dict(model.named_parameters())
    changed = {key for key, value in weights(model).items() if not torch.equal(before[key], value)}
    trained = {key for key in changed if key in parameters}
    assert trained and all(".ltm." in key for key in trained)
    assert all("ltm" in key.split(".") for key in changed), "buffers of the statistics at most"
    assert all(parameter.requires_grad for parameter in parameters.values())


@pytest.mark.parametrize("case", ["original", "tome", "slice"])
def test_masks_only_needs_masks(case: str, converted, build) -> None:
    model = build("timm-vit") if case == "original" else converted("timm-vit", case)
    before = weights(model)
    with pytest.raises(TrainingError, match="train='masks' finds no mask"):
        ltm.finetune(model, batches(1), config=TrainConfig(train="masks"))
    assert equal(before, weights(model)) and not was_finetuned(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_nothing_to_train(build) -> None:
    model = build("timm-vit").requires_grad_(False)
    with pytest.raises(TrainingError):
        ltm.finetune(model, batches(1))


def test_a_finetuned_model_is_marked_through_restore_and_conversion(build, converted) -> None:
    assert not was_finetuned(build("timm-vit")) and not was_finetuned(converted("timm-vit"))
    model = converted("timm-vit")
    ltm.finetune(model, batches(1))
    assert was_finetuned(model) and was_finetuned(copy.deepcopy(model))
    assert was_finetuned(ltm.restore(model))
    assert was_finetuned(ltm.retrofit(model, ltm.LTMConfig(flops=0.8)))


# ------------------------------------------------------------------------------------------------- what is not finite


def poisoned(count: int, at: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose ``at``-th, from 1 on, has a NaN."""
    drawn = batches(count)
    drawn[at - 1][0][0, 0, 3, 3] = math.nan
    return drawn


@pytest.mark.parametrize("case", ["converted", "original"])
def test_nan_in_the_first_batch_leaves_the_model_untouched(case: str, converted, build) -> None:
    model = converted("timm-vit") if case == "converted" else build("timm-vit")
    model.train()
    before = weights(model)
    with pytest.raises(TrainingError, match=r"not finite at step 1 of 3 \(loss nan\).*from before step 1"):
        ltm.finetune(model, poisoned(3, 1))
    assert equal(before, weights(model)) and not was_finetuned(model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


class Interruption(Exception):
    pass


def stopped_at(model: nn.Module, drawn: list, steps: int, config: TrainConfig) -> dict[str, Tensor]:
    """The weights of the same run, interrupted after so many steps."""

    class Interrupted(list):
        def __iter__(self):
            for index, batch in enumerate(list.__iter__(self)):
                if index == steps:
                    raise Interruption
                yield batch

    with pytest.raises(Interruption):
        ltm.finetune(model, Interrupted(drawn), config=config)
    return weights(model)


@pytest.mark.parametrize("case", ["converted", "original"])
def test_nan_later_falls_back_to_good_weights_of_the_same_run(case: str, converted, build) -> None:
    def fresh() -> nn.Module:
        return converted("timm-vit") if case == "converted" else build("timm-vit")

    model, config = fresh(), TrainConfig(lr=1e-3)
    with pytest.raises(TrainingError, match=r"at step 30 of 32 .*from before step 21\. Lower lr \(0\.001\)"):
        ltm.finetune(model, poisoned(32, 30), config=config)
    held = weights(model)
    expected = stopped_at(fresh(), poisoned(32, 30), 20, config)
    parameters = [name for name, _ in model.named_parameters()]
    assert all(torch.equal(held[name], expected[name]) for name in parameters)
    assert all(bool(torch.isfinite(value).all()) for value in held.values() if value.is_floating_point())
    assert was_finetuned(model), "twenty steps were taken: these are not the pretrained weights any more"


def test_an_interrupted_run_marks_the_model_it_has_changed(build) -> None:
    model = build("timm-vit")
    before = weights(model)
    assert not equal(before, stopped_at(model, batches(3), 2, TrainConfig(lr=1e-3)))
    assert was_finetuned(model), "never 'original' off fine-tuned weights"


@pytest.mark.parametrize("case", ["converted", "original"])
def test_divergence_leaves_finite_weights(case: str, converted, build) -> None:
    model = converted("timm-vit") if case == "converted" else build("timm-vit")
    with pytest.raises(TrainingError, match=r"Lower lr \(1e\+30\)"):
        ltm.finetune(model, batches(30), config=TrainConfig(lr=1e30))
    assert all(bool(torch.isfinite(value).all()) for value in weights(model).values() if value.is_floating_point())
    assert math.isfinite(sum(evaluate(model, [batch]) for batch in batches(2)))


# -------------------------------------------------------------------------------------------------- what does not fit


def test_labels_outside_the_classes(converted, build, pictures) -> None:
    for model in (converted("timm-vit"), build("timm-vit")):
        before = weights(model)
        with pytest.raises(DataError, match=r"training split has labels \[7, 8\] outside the model's 7 classes"):
            ltm.finetune(model, pictures(18, classes=9))
        with pytest.raises(DataError, match="labels run from 7 to 7"):
            ltm.finetune(model, [(torch.zeros(2, 3, 32, 32), torch.tensor([7, 7]))])
        assert equal(before, weights(model))


def test_a_class_without_images(build, pictures) -> None:
    lacking = pictures(14).filter(lambda row: row["label"] != 2)
    with pytest.raises(DataError, match="no image of the training split has class colour2"):
        ltm.finetune(build("timm-vit"), lacking)
    with pytest.raises(DataError, match="no image of the validation split has class colour2"):
        ltm.finetune(build("timm-vit"), pictures(14), lacking)


def test_a_tower_without_a_classifier(build, converted) -> None:
    for model in (build("hf-clip"), converted("hf-clip")):
        with pytest.raises(TrainingError, match="CLIPVisionModel puts out no class logits"):
            ltm.finetune(model, batches(1))


def test_a_loader_without_length(build) -> None:
    with pytest.raises(DataError, match="pass a loader that has a length"):
        ltm.finetune(build("timm-vit"), iter(batches(1)))


def test_an_empty_loader(build) -> None:
    model = build("timm-vit")
    with pytest.raises(DataError):
        ltm.finetune(model, [])
    assert not was_finetuned(model), "nothing was trained"


def test_batches_of_another_kind(build) -> None:
    with pytest.raises(DataError, match="a batch is"):
        ltm.finetune(build("timm-vit"), [torch.zeros(2, 3, 32, 32)])


# ---------------------------------------------------------------------------------------------------------- the bound


def test_the_bound_joins_the_loss_after_its_warm_up(converted) -> None:
    """Statistics need 256 images, which the first half of the run gives them: then the loss has the bound in it."""

    def losses(bound: float) -> tuple[list[float], dict]:
        config = TrainConfig(bound_weight=bound, bound_warmup=0.5, lr=1e-4)
        history = ltm.finetune(converted("timm-vit"), batches(8, 70), config=config)
        return history.losses, history.epochs[0]

    (without, plain), (with_bound, bounded) = losses(0.0), losses(10.0)
    assert without[:4] == with_bound[:4]
    assert all(abs(one - other) > 1e-3 for one, other in zip(without[4:], with_bound[4:], strict=True))
    assert bounded["bound"] != 0 and bounded["loss"] != pytest.approx(bounded["task"], abs=1e-3)
    assert plain["loss"] == pytest.approx(plain["task"])


def test_no_bound_where_there_is_no_mask(converted, build) -> None:
    for make in (lambda: converted("timm-vit", "tome"), lambda: build("timm-vit")):
        runs = [
            ltm.finetune(make(), batches(3), config=TrainConfig(bound_weight=bound, bound_warmup=0.0))
            for bound in (0.0, 10.0)
        ]
        assert runs[0].losses == runs[1].losses and runs[1].epochs[0]["bound"] == 0


# ---------------------------------------------------------------------------------------------------- mixed precision


def test_bf16_trains_on_cpu(converted) -> None:
    model, exact = converted("timm-vit"), converted("timm-vit")
    history = ltm.finetune(model, batches(8, 14), config=TrainConfig(lr=2e-3, mixed_precision="bf16"))
    assert all(math.isfinite(loss) for loss in history.losses) and history.losses[-1] < history.losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    full = ltm.finetune(exact, batches(8, 14), config=TrainConfig(lr=2e-3))
    assert history.losses[0] != full.losses[0], "nothing was computed in bf16"
    assert history.losses[0] == pytest.approx(full.losses[0], rel=0.05)


def test_bf16_does_not_stay_on_the_model(build) -> None:
    model = build("timm-vit")
    ltm.finetune(model, batches(1), config=TrainConfig(mixed_precision="bf16"))
    assert "forward" not in model.__dict__ and "_original_forward" not in model.__dict__
    plain = build("timm-vit")
    plain.load_state_dict(model.state_dict())
    images = batches(1)[0][0]
    with torch.no_grad():
        assert torch.equal(model(images), plain(images)), "evaluation goes on in bf16"
    pickle.dumps(model)


def test_two_runs_of_different_precision_in_one_process(build) -> None:
    for precision in ("no", "bf16", "no"):
        history = ltm.finetune(build("timm-vit"), batches(1), config=TrainConfig(mixed_precision=precision))
        assert math.isfinite(history.losses[0])


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_is_the_share_of_right_guesses_in_order(build, pictures) -> None:
    model = build("timm-vit")
    data = pictures(20)
    guesses, truths = predictions(model, data, batch_size=6)
    assert truths.tolist() == data["label"][:]
    assert evaluate(model, data, batch_size=6) == pytest.approx(100 * (guesses == truths).float().mean().item())
    assert torch.equal(predictions(model, data, batch_size=20)[0], guesses)


def test_evaluation_leaves_training_flags_even_where_it_fails(build) -> None:
    model = build("timm-vit").train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    evaluate(model, batches(1))
    with pytest.raises(DataError, match="a batch is"):
        evaluate(model, [torch.zeros(1)])
    with pytest.raises(DataError, match="no image to evaluate on"):
        evaluate(model, [])
    assert [module.training for module in model.modules()] == flags


def test_classes_are_counted_whatever_the_head(family: str, build) -> None:
    model = build(family)
    if family == "hf-clip":
        with pytest.raises(TrainingError, match="puts out no class logits"):
            count_classes(model)
    else:
        assert count_classes(model) == 7


def test_nan_in_the_first_batch_does_not_reach_the_averages_of_batch_norms() -> None:
    model = timm.create_model("resnet10t", num_classes=7).train()
    before = weights(model)
    drawn = [(images * torch.nan, labels) for images, labels in batches(1)]
    with pytest.raises(TrainingError, match="not finite at step 1") as raised:
        ltm.finetune(model, drawn, config=TrainConfig(batch_size=7))
    assert equal(weights(model), before) and "checkpoint" not in str(raised.value)


def test_sixteen_bits_whose_gradient_is_never_finite_stop(build, monkeypatch) -> None:
    """A GPU's scaler leaves such steps out; here nothing is scaled, and the steps are left out by hand."""

    def left_out(run: Run) -> None:
        run.progress.step += 1
        run.optimizer.zero_grad()

    monkeypatch.setattr(processes, "check_kind", lambda accelerator, config: None)
    monkeypatch.setattr(Run, "step", left_out)
    model = build("timm-vit")
    handle = model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    config = TrainConfig(batch_size=7, mixed_precision="fp16")
    with pytest.raises(TrainingError, match=rf"not finite at step {SKIPPED + 1} of {SKIPPED + 5}"):
        ltm.finetune(model, batches(SKIPPED + 5), config=config)
    handle.remove()
    assert len(ltm.finetune(model, batches(SKIPPED + 5), config=config).losses) == SKIPPED + 5


# ------------------------------------------------------------------------------------------------------ what is logged


def test_the_logged_bound_is_the_mean_over_batches_that_have_one(converted, monkeypatch) -> None:
    seen: list[float] = []

    def noted(run: Run, inputs: Tensor, labels: Tensor) -> dict[str, float]:
        losses = train_batch(run, inputs, labels)
        seen.append(losses["bound"])
        return losses

    train_batch = Run.train_batch
    monkeypatch.setattr(Run, "train_batch", noted)
    history = ltm.finetune(converted("timm-vit"), batches(8, 70), config=TrainConfig(batch_size=70))
    there = [value for value in seen if value]
    assert len(there) == 4 and history.epochs[0]["bound"] == pytest.approx(sum(there) / 4)


def test_the_perplexity_is_that_of_training_and_its_target_a_setting(converted) -> None:
    model = converted("timm-vit")
    history = ltm.finetune(model, batches(20, 70), config=TrainConfig(batch_size=70, lr=1e-3, perplexity=3.0))
    statistics = model.ltm.readout
    fitted = statistics.perplexity(statistics.memory.latest()[0]).item()
    assert fitted == pytest.approx(3.0, rel=0.02), "what the refresh at the end of the epoch fitted it to"
    assert history.epochs[0]["perplexity"] != pytest.approx(fitted, rel=1e-3), "features move between two fits"
    with pytest.raises(RecipeError, match="perplexity is an effective number of clusters, above 1"):
        TrainConfig(perplexity=1.0)


@pytest.mark.parametrize("size", [64, 256])
def test_statistics_are_fitted_anew_once_the_memory_is_full(size: int, converted, monkeypatch) -> None:
    """However many images a loader's batches have, whatever ``batch_size`` says."""
    full: list[int] = []
    refresh = Run.refresh

    def noted(run: Run) -> None:
        full.append(run.progress.images)
        refresh(run)

    monkeypatch.setattr(Run, "refresh", noted)
    ltm.finetune(converted("timm-vit"), batches(1280 // size, size), config=TrainConfig())
    assert full == [1024, 1280]


def test_what_validation_sees_of_an_average_has_the_statistics_that_are_saved(converted, pictures, monkeypatch) -> None:
    model, seen = converted("timm-vit"), []

    def noted(run: Run) -> dict[str, float]:
        seen.append(weights(run.ema.module))
        return {"val_images": 7, "val_accuracy": float(len(seen)), "val_loss": 1.0}

    monkeypatch.setattr(Run, "validate", noted)
    ltm.finetune(model, batches(10, 70), pictures(7), config=TrainConfig(batch_size=70, ema=0.5))
    assert equal(seen[-1], weights(model))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_labels_are_taken_by_the_names_of_their_classes(precision: str, build, pictures) -> None:
    """The same images under a model's own order of the classes, and under another one."""
    own, other = build("hf-vit"), build("hf-vit")
    names = [f"colour{index}" for index in range(7)]
    for model in (own, other):
        model.config.id2label = dict(enumerate(names))
    data, moved = pictures(28), names[3:] + names[:3]
    renamed = data.cast_column("label", datasets.Value("string")).map(
        lambda row: {"label": moved.index(names[int(row["label"])])}
    )
    renamed = renamed.cast_column("label", datasets.ClassLabel(names=moved))
    config = TrainConfig(batch_size=7, lr=1e-3, mixed_precision=precision)
    histories = [ltm.finetune(model, rows, rows, config=config) for model, rows in ((own, data), (other, renamed))]
    assert histories[0].losses == histories[1].losses and equal(weights(own), weights(other))
    assert evaluate(own, data) == evaluate(own, renamed) == histories[1].epochs[0]["val_accuracy"] > 50
    wrong = renamed.cast_column("label", datasets.ClassLabel(names=["grey", *moved[1:]]))
    with pytest.raises(DataError, match="which ViTForImageClassification knows as its class 4"):
        ltm.finetune(own, wrong, config=config)


def test_a_bound_that_never_joins_is_said(converted) -> None:
    model = converted("timm-vit")
    with pytest.warns(UserWarning, match="the bound never joined the loss: it waits for 256 images .* has seen 70 in"):
        ltm.finetune(model, batches(10), config=TrainConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ltm.finetune(model, batches(10), config=TrainConfig(bound="none"))
        ltm.finetune(model, batches(6, 70), config=TrainConfig())


@pytest.mark.parametrize(
    ("settings", "joins"),
    [({"bound_warmup": 1.0}, False), ({"bound_warmup": 0.9}, True), ({"epochs": 1}, False)],
    ids=str,
)
def test_a_bound_that_is_fitted_when_no_step_is_left_never_joins(settings, joins: bool, converted) -> None:
    config = TrainConfig(**{"batch_size": 32, "bound_warmup": 0.0, "epochs": 2, **settings})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ltm.finetune(converted("timm-vit"), batches(8, 32), config=config)
    assert joins != any("the bound never joined the loss" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("train", ["masks", "lora", "all"])
def test_averages_of_batch_norms_stay_where_only_additions_train(train: str) -> None:
    """An adapter holds what changed, and a mask changes no average that it never asked for."""
    model, _, example = conversions.converted("timm-mobilevit-local")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    drawn = [(torch.randn(8, *example.shape[1:]), torch.arange(8) % ltm.get_plan(model).classes) for _ in range(2)]
    ltm.finetune(model, drawn, config=TrainConfig(batch_size=8, train=train))
    moved = [not torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True)]
    assert moved and all(moved) == any(moved) == (train == "all")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 9, 3, 4, 5, 6]), "labels run from 0 to 9; expected class indices"),
        (torch.tensor([0, 1, -1, 3, 4, 5, 6]), "labels run from -1 to 6"),
        (torch.eye(9)[:7], r"labels have shape \(7, 9\)"),
        (torch.arange(7).float(), r"labels have shape \(7,\) and dtype torch.float32"),
    ],
    ids=["too-high", "negative", "too-wide", "no-index"],
)
def test_labels_of_a_loader_are_checked_where_it_is_evaluated(labels: Tensor, message: str, build) -> None:
    data = [(batches(1)[0][0], labels)]
    for judge in (evaluate, lambda model, data: ltm.finetune(model, batches(1), data)):
        with pytest.raises(DataError, match=message):
            judge(build("timm-vit"), data)


@pytest.mark.parametrize("converts", [False, True], ids=["original", "converted"])
def test_a_network_without_a_classifier_is_not_trained_on_its_features(converts: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=0)
    model = ltm.retrofit(model, ltm.LTMConfig(flops=0.9)) if converts else model
    for judge in (ltm.finetune, evaluate):
        with pytest.raises(TrainingError, match="puts out no class logits"):
            judge(model, batches(1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows.to_iterable_dataset(), "cannot be a stream: load it whole"),
        (lambda rows: [], "the validation loader has no batch"),
        (lambda rows: rows.select([]), "the validation split is empty"),
    ],
    ids=["stream", "no-batch", "no-row"],
)
def test_validation_data_is_looked_at_before_the_training(spoil, message: str, build, pictures, monkeypatch) -> None:
    monkeypatch.setattr(Run, "train_batch", None)
    with pytest.raises(DataError, match=message):
        ltm.finetune(build("timm-vit"), pictures(14), spoil(pictures(14)), config=TrainConfig(batch_size=7))


def test_settings_may_be_numpy_numbers() -> None:
    config = TrainConfig(lr=np.logspace(-4, -3, 2)[0], epochs=np.int64(2), ema=np.float32(0.5))
    assert config == TrainConfig(lr=1e-4, epochs=2, ema=0.5)
    assert json.dumps(config.to_dict())


def test_a_network_that_says_nothing_is_evaluated_on_a_loader() -> None:
    own = Own(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7)))
    data = batches(3)
    assert 0 <= evaluate(own, data) <= 100
    assert ltm.measure(own, data=data, batches=(), example=torch.randn(1, 3, 32, 32)).accuracy["original"] is not None


@pytest.mark.parametrize("family", ["timm-vit", "hf-vit", "timm-headless"])
@pytest.mark.parametrize("classes", [5, 9])
def test_a_head_replaced_by_hand_counts_whatever_the_model_says(family: str, classes: int, build, pictures) -> None:
    model = build("timm-vit" if family == "timm-headless" else family)
    if family == "timm-headless":
        model.reset_classifier(0)
    setattr(model, "classifier" if family == "hf-vit" else "head", nn.Linear(48, classes))
    assert count_classes(model) == classes
    drawn = [(images, torch.arange(7) % classes) for images, _ in batches(2)]
    assert 0 <= evaluate(model, drawn) <= 100
    config = TrainConfig(batch_size=classes, held_out=0.0)
    assert len(ltm.finetune(model, pictures(2 * classes, classes), config=config).losses) == 2
    if classes == 5:
        with pytest.raises(DataError, match=r"labels run from 0 to 6; expected class indices .* from 0 to 4"):
            ltm.finetune(model, batches(1), config=TrainConfig())


def test_a_validation_iterator_is_refused_at_once(build, monkeypatch) -> None:
    monkeypatch.setattr(Run, "train_batch", None)
    with pytest.raises(DataError, match="cannot be an iterator: pass a loader or a list"):
        ltm.finetune(build("timm-vit"), batches(1), iter(batches(1)))


CONFIG = ltm.LTMConfig(flops=0.7)


def test_a_headless_model_has_no_classes(build) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=6, num_heads=3, num_classes=0
    )
    ltm.retrofit(model, CONFIG)
    assert ltm.get_plan(model).classes == 0
    with pytest.raises(TrainingError, match="no class logits"):
        ltm.finetune(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])
    with pytest.raises(TrainingError, match="no class logits"):
        ltm.measure(build("hf-clip"), data=[(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))], batches=())
