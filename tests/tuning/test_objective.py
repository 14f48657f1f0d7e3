"""What a step minimises: labels hard, soft, mixed or none at all, a teacher, and either bound."""

from __future__ import annotations

import math
import textwrap
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pieces import batches, equal, weights
from torch import Tensor
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import get_retrofit
from ltm_retrofit.errors import DataError, RecipeError, TrainingError
from ltm_retrofit.merging import ib
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.tuning import objective as room
from ltm_retrofit.tuning.objective import Objective, Term, teacher_of, terms_of
from ltm_retrofit.tuning.settings import TrainConfig


def losses_of(model: torch.nn.Module, inputs: Tensor, labels: Tensor | None, **options: object) -> dict[str, Tensor]:
    objective = Objective(model, TrainConfig(**options), 7)
    return objective(model, inputs, labels)


# ------------------------------------------------------------------------------------------------------------ the task


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_is_that_of_each_class(build, smoothing) -> None:
    model = build("timm-vit")
    images, labels = batches(1)[0]
    given = losses_of(model, images, labels, loss="bce", label_smoothing=smoothing)["task"]
    logits, wanted = model(images), F.one_hot(labels, 7) * (1 - smoothing) + smoothing / 7
    expected = -(wanted * logits.sigmoid().log() + (1 - wanted) * (-logits).sigmoid().log()).mean()
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_mixed_images_have_mixed_labels(kind, name, build) -> None:
    images, labels = batches(1, 14)[0]
    inputs = {"pixel_values": images} if name == "hf-vit" else images
    objective = Objective(build(name), TrainConfig(**{kind: 1.0}), 7)
    torch.manual_seed(0)
    mixed, targets = objective.mix(inputs, labels)
    mixed = mixed["pixel_values"] if name == "hf-vit" else mixed
    assert mixed.shape == images.shape and not torch.equal(mixed, images)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(14))
    share = targets.gather(1, labels[:, None])[:, 0].min()  # λ, or more where the two had the same class
    if kind == "mixup":
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    else:
        kept = (mixed == images).all(dim=1).float().mean()
        assert float(kept) == pytest.approx(float(share), abs=1e-6)
    plain, hard = Objective(build(name), TrainConfig(), 7).mix(inputs, labels)
    assert plain is inputs and torch.equal(hard, F.one_hot(labels, 7).float())


def test_mixing_what_is_no_image_is_refused(build) -> None:
    with pytest.raises(DataError, match="this batch holds none"):
        Objective(build("timm-vit"), TrainConfig(mixup=0.5), 7).mix(torch.randn(4, 9), torch.zeros(4, dtype=torch.long))


# ------------------------------------------------------------------------------------------------------ a further term


@pytest.fixture
def certainty(monkeypatch) -> Term:
    """The example of the docstring, as one writes it: a function, and an entry in the list."""
    code = textwrap.dedent(str(room.__doc__).partition("under its name:\n\n")[2])
    names = dict(vars(room))
    exec(code.replace("\nTerm(", "\nterm = Term("), names)
    monkeypatch.setattr(room, "terms_of", lambda config: [*terms_of(config), names["term"]])
    return names["term"]


def test_a_further_term_joins_the_loss_after_its_share_of_the_steps(certainty: Term, build) -> None:
    objective, (images, labels) = Objective(build("timm-vit"), TrainConfig(), 7), batches(1)[0]
    for step, joins in ((0, False), (1, False), (2, True), (10, True)):
        losses = objective(objective.model, images, labels, step, 10)
        p = objective.model(images).softmax(dim=-1)
        torch.testing.assert_close(losses["certainty"], (p * p.log()).sum(-1).mean())
        torch.testing.assert_close(losses["loss"], losses["task"] + joins * 0.1 * losses["certainty"])


def test_a_further_term_is_logged_under_its_name(certainty: Term, build) -> None:
    (epoch,) = ltm.finetune(build("timm-vit"), batches(5), config=TrainConfig()).epochs
    assert -math.log(7) <= epoch["certainty"] < 0


# --------------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_the_teacher_is_the_network_before_conversion(name, build, converted) -> None:
    original, model = build(name), converted(name)
    teacher = teacher_of(model)
    assert not ltm.is_retrofitted(teacher) and ltm.is_retrofitted(model)
    assert set(teacher.state_dict()) == set(original.state_dict())
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_divergence_from_the_teacher(temperature, build, converted) -> None:
    model, (images, labels) = converted("timm-vit"), batches(1)[0]
    given = losses_of(model, images, labels, distill=2.0, distill_temperature=temperature)
    with torch.no_grad():
        p, q = ((m(images) / temperature).softmax(-1) for m in (build("timm-vit"), model))
    expected = 2 * temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(given["distill"], expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(given["loss"], given["task"] + given["distill"] + 0.1 * given["bound"])


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "timm-dinov2"])
def test_an_unconverted_model_is_its_own_teacher(name, build) -> None:
    images, labels = batches(1)[0]
    inputs = {"pixel_values": images} if name == "hf-vit" else images
    given = losses_of(build(name), inputs, labels, distill=1.0, distill_token=1.0)
    assert given["distill"].item() == pytest.approx(0, abs=1e-5)


def test_the_distance_of_the_feature_is_that_of_what_the_classifier_reads(build, converted) -> None:
    model, (images, labels) = converted("timm-vit"), batches(1)[0]
    both, logits_only = (
        losses_of(model, images, labels, distill=1.0, distill_token=weight)["distill"] for weight in (1.0, 0.0)
    )
    with torch.no_grad():
        one, other = (m.forward_head(m.forward_features(images), pre_logits=True) for m in (model, build("timm-vit")))
    torch.testing.assert_close(both - logits_only, (1 - F.cosine_similarity(one, other)).mean(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", ["images", "tuple", "dict", "table"])
def test_images_without_labels_teach_what_the_teacher_says(shape, build, pictures) -> None:
    name = "hf-vit" if shape == "dict" else "timm-vit"
    model, teacher = build(name), build(name)
    for network in (model, teacher):  # else any model of this size says the same of every image
        network.load_state_dict({key: 2.5 * value for key, value in network.state_dict().items()})
    ltm.retrofit(model, ltm.LTMConfig(flops=0.5))
    drawn = [images for images, _ in batches(12, 14)]
    data = {
        "images": drawn,
        "tuple": [(images,) for images in drawn],
        "dict": [{"pixel_values": images} for images in drawn],
        "table": pictures(168).remove_columns("label") if shape == "table" else None,
    }[shape]

    held = weights(teacher)
    config = TrainConfig(epochs=4, batch_size=14, lr=5e-4, distill=1.0, bound="none", weight_decay=0.0)
    history = ltm.finetune(model, data, config=config)
    assert history.epochs[0]["task"] == 0 and history.epochs[-1]["distill"] < 0.8 * history.epochs[0]["distill"]
    assert equal(weights(teacher), held)


def test_images_without_labels_need_a_teacher(converted, pictures) -> None:
    with pytest.raises(DataError, match=r"a batch is \(images, labels\)"):
        ltm.finetune(converted("timm-vit"), [torch.randn(4, 3, 32, 32)])
    with pytest.raises(DataError, match="expected image and label"):
        ltm.finetune(converted("timm-vit"), pictures(14).remove_columns("label"))


def test_the_bound_takes_the_teachers_word_where_there_are_no_labels(converted) -> None:
    model = converted("timm-vit")
    images = torch.cat([images for images, _ in batches(40)])
    objective = Objective(model.train(), TrainConfig(distill=1.0), 7)
    with torch.no_grad():
        objective(model, images, None)
        objective.learn()
        losses = objective(model, images, None)
        counts = get_retrofit(model).readout.counts
        taught = teacher_of(model)(images).softmax(-1)
    assert float(losses["bound"]) > 0
    torch.testing.assert_close(counts.sum(0) / counts.sum(), taught.mean(0), rtol=2e-2, atol=2e-3)


# ----------------------------------------------------------------------------------------------------------- the bound


def test_the_papers_bound_is_cebs_without_the_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    statistics = Statistics(6, 3, 8)
    x, targets = torch.randn(64, 6, generator=generator), F.one_hot(torch.arange(64) % 3, 3).float()
    statistics.fit(x, targets)
    phi = ib.log_assign(x, statistics.centroids, statistics.beta).exp()
    difference = statistics.bound(x, targets, "ibb") - statistics.bound(x, targets, "ceb", 0.0)
    torch.testing.assert_close(difference, ib.entropy(phi).mean())
    with pytest.raises(RecipeError, match="kind must be one of 'ceb', 'ibb', got 'iib'"):
        statistics.bound(x, targets, "iib")


@pytest.mark.parametrize("options", [{"bound": "ibb"}, {"gamma": 0.0}, {"bound": "none"}], ids=str)
def test_another_bound_is_another_loss(options, converted) -> None:
    def last(**changed: object) -> dict:
        config = TrainConfig(bound_weight=1.0, bound_warmup=0.0, **changed)
        return ltm.finetune(converted("timm-vit"), batches(6, 70), config=config).epochs[-1]

    plain, other = last(), last(**options)
    assert plain["bound"] != other["bound"] and math.isfinite(other["loss"])
    assert (other["bound"] == 0) == (options == {"bound": "none"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "mse"}, "loss must be one of 'ce', 'bce'"),
        ({"bound": 0.1}, "bound must be one of 'ceb', 'ibb', 'none', got 0.1"),
        ({"mixup": -1}, "mixup must be a number from 0"),
        ({"distill_temperature": 0}, "distill_temperature must be above 0"),
        ({"gamma": None}, "gamma must be a number"),
    ],
)
def test_impossible_objectives_are_refused(values, message) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**values)


def test_a_tower_has_no_feature_to_compare(build) -> None:
    with pytest.raises(TrainingError):
        ltm.finetune(build("hf-clip"), batches(1), config=TrainConfig(distill=1.0, distill_token=1.0))


def test_the_teacher_computes_where_the_run_does(build) -> None:
    """A model may begin on the CPU of a machine with a GPU; meta tensors stand for the GPU here."""
    there = SimpleNamespace(device=torch.device("meta"), autocast=nullcontext)
    objective = Objective(build("timm-vit"), TrainConfig(distill=1.0), 7, there)
    assert {tensor.device.type for tensor in objective.teacher.state_dict().values()} == {"meta"}


def test_the_teacher_computes_as_precisely_as_the_run(build) -> None:
    model, (images, _) = build("timm-vit"), batches(1)[0]
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    there = SimpleNamespace(device=torch.device("cpu"), autocast=half)
    with half():
        expected = model(images).float()
    for accelerator, equal_to_half in ((there, True), (None, False)):
        taught, _ = Objective(model, TrainConfig(distill=1.0), 7, accelerator).teach(images)
        assert torch.equal(taught, expected) == equal_to_half and taught.dtype == torch.float32


def test_mixing_finds_the_images_among_other_entries(build) -> None:
    model = build("hf-vit")
    drawn = [{"names": ["a"] * 7, "pixel_values": images, "labels": labels} for images, labels in batches(2)]
    objective = Objective(model, TrainConfig(mixup=0.5), 7)
    batch = {key: value for key, value in drawn[0].items() if key != "labels"}
    mixed, targets = objective.mix(batch, drawn[0]["labels"])
    assert mixed["names"] == batch["names"] and not torch.equal(mixed["pixel_values"], batch["pixel_values"])
    assert targets.shape == (7, 7)


@pytest.mark.parametrize("name", ["task", "loss", "images"])
def test_a_term_has_a_name_of_its_own(name: str, build, monkeypatch) -> None:
    """A second one of a name, or one that the history logs anyway, would take the other's place without a word."""
    monkeypatch.setattr(
        room, "terms_of", lambda config: [*terms_of(config), Term(name, lambda seen: seen.logits.sum())]
    )
    with pytest.raises(RecipeError, match=f"{name} is taken twice"):
        Objective(build("timm-vit"), TrainConfig(), 7)
