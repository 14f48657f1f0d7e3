"""trace and bound_loss: for anyone's own training loop."""

from __future__ import annotations

import copy

import pytest
import torch
from conversions import call, converted
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of
from ltm_retrofit.errors import DataError, NotRetrofitted, TrainingError
from ltm_retrofit.finding.example import logits_of
from ltm_retrofit.merging.mask import MaskModule

torch.set_num_threads(1)
CLASSES = 7


@pytest.fixture
def model(build) -> nn.Module:
    return ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7, ib_step=True)).train()


def draw(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def masks(model: nn.Module) -> list[MaskModule]:
    return [module for module in model.modules() if isinstance(module, MaskModule)]


def fit(model: nn.Module) -> None:
    """256 images are four for each of 64 clusters."""
    with ltm.trace(model) as traced, torch.no_grad():
        images, labels = draw(256)
        model(images)
        ltm.bound_loss(traced, labels)


def test_the_trace_holds_the_latest_pass(model):
    with ltm.trace(model) as traced:
        first = model(draw(2)[0])
        old = traced.feature
        second = model(draw(3, 1)[0])
        assert len(first) == 2 and traced.feature.shape == (3, 48) and traced.feature is not old
        torch.testing.assert_close(model.head(traced.feature), second)
    plan = ltm.get_plan(model)
    merges = [row for row in plan.rows if row.action == "merge"]
    assert traced.sites == tuple(row.site for row in merges) and len(traced.merges) == len(merges)
    for index, row in enumerate(merges):
        assert traced.merges[index].descriptor.shape == (3, 48)
        weights = traced.assignment(index)
        assert weights.shape == (3, 65, row.tokens_out)
        torch.testing.assert_close(weights.sum(dim=2), torch.ones(3, 65))
    kept, steps = traced.feature, traced.merges
    model(draw(4, 2)[0])
    same = all(a is b for a, b in zip(traced.merges, steps, strict=True))
    assert same and torch.equal(traced.feature, kept), "the trace ends with its block"


def test_tracing_changes_no_result_and_leaves_no_hook(model):
    model.eval()
    images, _ = draw(2)
    before = model(images)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with ltm.trace(model):
        assert torch.equal(model(images), before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize("name, width", [("timm-deit", 96), ("hf-deit-teacher", 96), ("hf-dinov2", 96), ("hf-vit", 48)])
def test_the_feature_is_what_the_classifier_reads(build, name, width):
    model = ltm.retrofit(build(name))
    with ltm.trace(model) as traced, torch.no_grad():
        logits = logits_of(model(draw(2)[0]))
    assert traced.feature.shape == (2, width)
    features = traced.feature.chunk(len(traced.features), dim=1)
    heads = [model.get_submodule(each)(part) for each, part in zip(ltm.get_plan(model).readouts, features, strict=True)]
    torch.testing.assert_close(torch.stack(heads).mean(dim=0), logits)


def test_before_a_fit_the_bound_is_a_zero_that_can_be_differentiated(model):
    images, labels = draw(3)
    with ltm.trace(model) as traced:
        model(images)
        loss = ltm.bound_loss(traced, labels)
    assert float(loss.detach()) == 0 and loss.ndim == 0
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool((gradient == 0).all()) for gradient in gradients)


def test_after_a_fit_the_bound_is_positive_and_teaches_every_mask(model):
    fit(model)
    assert all(bool(mask.statistics.fitted) for mask in masks(model)) and bool(model.ltm.readout.fitted)
    images, labels = draw(8, 3)
    with ltm.trace(model) as traced:
        model(images)
        loss = ltm.bound_loss(traced, labels)
    assert float(loss.detach()) > 0
    loss.backward()
    for mask in masks(model):
        for name, parameter in mask.named_parameters():
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_without_a_step_only_the_feature_has_statistics_and_the_bound_teaches_every_mask(build):
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7)).train()
    fit(model)
    assert all(mask.statistics is None for mask in masks(model)) and bool(model.ltm.readout.fitted)
    images, labels = draw(8, 3)
    with ltm.trace(model) as traced:
        model(images)
        ltm.bound_loss(traced, labels).backward()
    assert all(merge.descriptor is None for merge in traced.merges)
    assert all(float(mask.weight.grad.abs().max()) > 0 for mask in masks(model))


def test_soft_labels_that_are_hard_count_the_same_and_mixtures_lie_between(model):
    fit(model)
    model.eval()
    images, labels = draw(4, 3)
    with ltm.trace(model) as traced, torch.no_grad():
        model(images)
        hard = ltm.bound_loss(traced, labels)
        soft = ltm.bound_loss(traced, F.one_hot(labels, CLASSES).float())
        other = ltm.bound_loss(traced, labels.roll(1))
        mixed = 0.5 * F.one_hot(labels, CLASSES).float() + 0.5 * F.one_hot(labels.roll(1), CLASSES).float()
        between = ltm.bound_loss(traced, mixed)
    assert torch.equal(hard, soft)
    torch.testing.assert_close(between, (hard + other) / 2)  # CEB_γ is linear in the labels


def test_statistics_learn_in_training_mode_only(model):
    fit(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images, labels = draw(128, 3)

    def once() -> set[str]:
        with ltm.trace(model) as traced, torch.no_grad():
            model(images)
            ltm.bound_loss(traced, labels)
        return {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}

    model.eval()
    assert once() == set()
    model.train()
    changed = once()
    assert {name.rpartition(".")[2] for name in changed} == {"centroids", "counts"}
    assert len([name for name in changed if name.endswith("counts")]) == len(masks(model)) + 1


@pytest.mark.parametrize("soft", [False, True])
def test_statistics_learn_the_same_after_the_backward_pass(model, soft):
    """What gradient checkpointing asks for: the bound without learning, and learning by itself later."""
    fit(model)
    images, labels = draw(128, 3)
    given = F.one_hot(labels, CLASSES).float() if soft else labels
    twin = copy.deepcopy(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with ltm.trace(model) as traced, torch.no_grad():
        model(images)
        ltm.bound_loss(traced, given)
    with ltm.trace(twin) as traced, torch.no_grad():
        twin(images)
        ltm.bound_loss(traced, given, learn=False)
        assert all(torch.equal(buffer, before[name]) for name, buffer in twin.named_buffers())
        ltm.learn_from(traced, given)
    ours, theirs = dict(model.named_buffers()), dict(twin.named_buffers())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(ours[name], before[name]) for name in ours)


@pytest.mark.parametrize("name", ["timm-vit-flow", "timm-swin-local", "timm-efficientvit-grid"])
def test_every_scope_tells_the_trace_in_the_same_way(name):
    model, _, example = converted(name)
    with ltm.trace(model) as traced:
        call(model, example)
    forwards = {forward.name: forward for forward in forwards_of(model) if forward.mask is not None}
    assert set(traced.by_site) == set(traced.sites) == set(forwards)
    assert all(forward.listener is None for forward in forwards.values())


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(torch.tensor([0, 1, CLASSES]), id="beyond"),
        pytest.param(torch.tensor([0, -1, 1]), id="negative"),
        pytest.param(torch.zeros(3, CLASSES + 1), id="width"),
        pytest.param(torch.full((3, CLASSES), 0.5), id="sum"),
        pytest.param(torch.tensor([0, 1]), id="other-batch"),
        pytest.param(torch.tensor([0.0, 1.0, 2.0]), id="dtype"),
    ],
)
def test_labels_that_do_not_fit_are_refused(model, labels):
    with ltm.trace(model) as traced:
        model(draw(3)[0])
        for use in (ltm.bound_loss, ltm.learn_from):
            with pytest.raises(DataError):
                use(traced, labels)
    assert len(model.ltm.readout.memory) == 0


def test_what_cannot_be_traced_says_why(build, model):
    plain = build("timm-vit")
    with pytest.raises(NotRetrofitted), ltm.trace(plain):
        pass
    with ltm.trace(model) as traced, pytest.raises(TrainingError, match="no forward pass"):
        ltm.bound_loss(traced, torch.zeros(3, dtype=torch.int64))
    headless = ltm.retrofit(build("hf-clip"))
    with ltm.trace(headless) as traced:
        headless(draw(2)[0])
        with pytest.raises(TrainingError, match="no linear classifier"):
            ltm.bound_loss(traced, torch.zeros(2, dtype=torch.int64))
    baseline = ltm.retrofit(plain, ltm.LTMConfig(flops=0.7, method="tome"))
    with ltm.trace(baseline) as traced:
        baseline(draw(2)[0])
        with pytest.raises(TrainingError, match="'tome' has no mask to train"):
            ltm.bound_loss(traced, torch.zeros(2, dtype=torch.int64))


def test_disabled_passes_do_not_pretend_to_be_merged(model):
    with ltm.trace(model) as traced:
        with ltm.disabled(model), torch.no_grad():
            model(draw(2)[0])
        with pytest.raises(TrainingError):
            traced.assignment(0)


def test_a_plain_training_loop_learns(build):
    torch.manual_seed(0)
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7)).train()
    images, labels = draw(64)
    images = images * 0.3 + labels[:, None, None, None] / 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    bounds, losses = [], []
    for _ in range(24):
        with ltm.trace(model) as traced:
            loss = F.cross_entropy(model(images), labels)
            bound = ltm.bound_loss(traced, labels)
        optimizer.zero_grad()
        (loss + 0.1 * bound).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        bounds.append(float(bound.detach()))
    assert bounds[:3] == [0, 0, 0] and all(bound > 0 for bound in bounds[4:])
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert any(float(mask.weight.detach().std()) > 0 for mask in masks(model))
