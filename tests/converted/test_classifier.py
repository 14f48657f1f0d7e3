"""Another head after conversion: what the conversion knows follows, or the head is refused and nothing changes."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from conversions import batch, call, convert, converted, equal
from pieces import Own, snapshot
from torch import nn
from zoo import ZOO

import ltm_retrofit as ltm
from ltm_retrofit.converted.classifier import RESET, Reset
from ltm_retrofit.converted.record import has_step, in_mode
from ltm_retrofit.reporting.report import measure

torch.set_num_threads(1)


_WRAPPED: list[nn.Module] = []


def sliced(how: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Return a converted model that slices, the module in it that has the method, and an example."""
    if how == "model":
        model, _, example = converted("timm-vit-flow")
        return model, model, example
    original, example = ZOO["timm-vit"]()
    if not _WRAPPED:
        _WRAPPED.append(convert(Own(original), example))
    model = copy.deepcopy(_WRAPPED[0])
    return model, model.inner, example


# ------------------------------------------------------------------------------------- a head that reads what is gone


@pytest.mark.parametrize("how", ["model", "wrapped"])
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", ""])
def test_a_head_that_reads_sliced_tokens_is_refused_and_nothing_changes(pool, how):
    model, owner, example = sliced(how)
    assert ltm.get_plan(model).rows[-1].action == "slice"
    parts, plan, expected = snapshot(model), ltm.get_plan(model), call(model, example)
    with pytest.raises(ltm.UnsupportedBlock, match=r"restore\(model\).*output_tokens='full'"):
        owner.reset_classifier(5, pool)
    assert snapshot(model) == parts and ltm.get_plan(model) == plan and owner.num_classes == 7
    assert equal(call(model, example), expected)
    with ltm.disabled(model), pytest.raises(ltm.UnsupportedBlock):  # merging goes on after it
        owner.reset_classifier(5, pool)
    owner.reset_classifier(5, "token")
    assert call(model, example)[0].shape == (1, 5)


@pytest.mark.parametrize("how", ["model", "wrapped"])
def test_pooling_that_is_changed_by_hand_is_refused_where_it_reads_sliced_tokens(how):
    model, owner, example = sliced(how)
    expected = call(model, example)
    owner.global_pool = "avg"
    with pytest.raises(ltm.UnsupportedBlock, match="'global_pool' of a VisionTransformer was 'token'"):
        model(example)
    with pytest.raises(ltm.UnsupportedBlock, match="slices off"):
        owner.reset_classifier(5)
    with pytest.raises(ltm.UnsupportedBlock, match="'global_pool'"):
        model(example)
    owner.global_pool = "token"
    assert equal(call(model, example), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(example), expected[0], rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_tokens_that_all_come_back_may_be_pooled_as_one_likes():
    original, example = ZOO["timm-vit"]()
    model = convert(original, example, output_tokens="full")
    model.reset_classifier(5, "avg")
    assert bool(torch.isfinite(model(example)).all())


@pytest.mark.parametrize("how", ["model", "wrapped"])
def test_the_stand_in_looks_like_the_method_and_goes_with_restoring(how):
    model, owner, example = sliced(how)
    method = getattr(type(owner), RESET)
    assert isinstance(owner.__dict__[RESET], Reset)
    assert inspect.signature(owner.reset_classifier) == inspect.signature(method.__get__(owner))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        inner = other if how == "model" else other.inner
        inner.reset_classifier(11)
        assert other(example).shape == (1, 11) and ltm.get_plan(other).classes == 11
        assert model(example).shape == (1, 7) and ltm.get_plan(model).classes == 7
    ltm.restore(model)
    assert RESET not in owner.__dict__
    owner.reset_classifier(3, "avg")
    assert bool(torch.isfinite(model(example)).all())


# ----------------------------------------------------------------------------------------- what is known of the classes


@pytest.mark.parametrize("name", ["timm-vit-flow", "timm-swin-local", "timm-efficientvit-grid"])
def test_plan_and_statistics_follow_another_head(name):
    model, _, example = converted(name, ib_step=True)
    before = ltm.get_plan(model)
    for classes in (11, 0, 7):
        model.reset_classifier(classes)
        plan = ltm.get_plan(model)
        if classes:
            assert plan.classes == classes and model.ltm.readout.counts.shape == (64, classes)
            known = [module.statistics for module in model.modules() if has_step(module)]
            assert known and all(statistics.counts.shape[1] == classes for statistics in known)
        report = measure(model, example, batches=())  # refuses where the plan's MACs are not those counted
        assert report.macs == {"original": plan.macs_original, "converted": plan.macs}
    assert ltm.get_plan(model) == before


def test_statistics_of_as_many_classes_stay():
    model, _, _ = converted("timm-vit-flow")
    kept = model.ltm.readout
    model.reset_classifier(7)
    assert model.ltm.readout is kept


@pytest.mark.parametrize(
    "name, how", [("timm-vit-flow", "method"), ("hf-vit-flow", "linear"), ("hf-vit-flow", "sequential")]
)
def test_the_bound_is_of_the_classes_of_a_head_that_was_replaced(name, how):
    model, _, example = converted(name)
    if how == "method":
        model.reset_classifier(11)
    else:
        linear = nn.Linear(model.classifier.in_features, 11)
        model.classifier = linear if how == "linear" else nn.Sequential(nn.Dropout(0.1), linear)
    model.train()
    images, labels = batch(example, 256), torch.arange(256) % 11
    for _ in range(2):
        with ltm.trace(model) as traced:
            model(images)
        loss = ltm.bound_loss(traced, labels)
    assert float(loss.detach()) > 0 and ltm.get_plan(model).classes == 11
    loss.backward()


def test_a_head_is_followed_in_the_mode_that_merges():
    model, _, example = converted("timm-vit-flow")
    with ltm.disabled(model):
        model.reset_classifier(11)
    plan = ltm.get_plan(model)
    assert plan.macs < plan.macs_original
    with in_mode(model, "original"):
        assert model(example).shape == (1, 11)
    assert measure(model, example, batches=()).macs["converted"] == plan.macs


def test_another_head_under_inference_mode_is_refused_by_name() -> None:
    model, _, example = converted("timm-vit-flow")
    before = snapshot(model)
    with torch.inference_mode(), pytest.raises(ltm.UnsupportedBlock, match=r"outside of inference_mode"):
        model.reset_classifier(5)
    assert snapshot(model) == before
    assert call(model, example)[0].shape[-1] == 7
