"""Vision transformers of neither library: each converts, for at least 15 % fewer MACs."""

from __future__ import annotations

import pytest
import torch
from conversions import batch, call, equal, near
from zoo import ZOO
from zoo_torch import TORCH

import ltm_retrofit as ltm
from ltm_retrofit.macs import count_macs

torch.set_num_threads(1)
ASKED = {
    "torchvision-vit", "torchvision-swin", "torchvision-swin-v2", "plain-multihead", "plain-encoder-prenorm",
    "plain-encoder-postnorm", "plain-multihead-sequence-first", "plain-encoder-prenorm-sequence-first",
    "plain-encoder-postnorm-sequence-first", "plain-functional", "plain-lucid", "plain-einsum",
    "plain-single-head", "plain-folded-heads", "plain-tokens-last", "plain-placed",
}  # fmt: skip


def test_the_zoo_has_all_that_was_asked_for():
    assert set(TORCH) >= ASKED


@pytest.mark.parametrize("name", TORCH)
def test_a_model_of_plain_torch_converts(name):
    model, example = ZOO[name]()
    original = count_macs(model, example).total
    with torch.no_grad():
        before = call(model, example)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.85), example)
    plan = ltm.get_plan(model)
    counted = count_macs(model, example).total
    assert counted == plan.macs and plan.macs_original == original
    assert counted <= 0.85 * original
    with torch.no_grad():
        after = call(model, example)
        assert [t.shape for t in after] == [t.shape for t in before] and bool(torch.isfinite(after[0]).all())
        assert not equal(after, before)
        both = batch(example)
        near(call(model, both), [torch.cat([call(model, one)[0] for one in both.split(1)])])  # images do not mix
        ltm.restore(model)
        assert equal(call(model, example), before)
