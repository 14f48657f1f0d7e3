"""Converted models: the plan's prediction, fvcore and torch's counter agree, with attention fused or not."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of
from ltm_retrofit.finding.example import prepare_example
from ltm_retrofit.macs import count_macs


def unfuse(model: nn.Module) -> None:
    """Switch fused attention off, as each library does it."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def manual(family: str, build) -> nn.Module:
    """Convert a model whose attention multiplies out."""
    model = build(family)
    unfuse(model)
    return ltm.retrofit(model, ltm.LTMConfig(flops=0.7))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "manual"])
def test_counted_macs_are_the_predicted_ones(family: str, build, converted, fused: bool) -> None:
    model, host = converted(family) if fused else manual(family, build), build(family)
    if not fused:
        unfuse(host)
    original, plan = count_macs(host, prepare_example(host, None)).total, ltm.get_plan(model)
    assert plan.macs_original == original
    # count_macs itself raises where fvcore and FlopCounterMode differ by one
    assert count_macs(model, prepare_example(model, None)).total == plan.macs <= 0.7 * original


def test_size_aware_attention_is_found_and_works_fused_or_not(family: str, build, converted, images) -> None:
    model, other = (one.double() for one in (manual(family, build), converted(family)))
    assert all(forward.bias is not None for one in (model, other) for forward in forwards_of(one))
    with torch.no_grad():
        ours, theirs = (
            next(iter(out.values())) if isinstance(out, dict) else out
            for out in (model(images.double()), other(images.double()))
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_vit_small_at_its_native_size() -> None:
    model = timm.create_model("vit_small_patch16_224").eval()
    plan = ltm.get_plan(ltm.retrofit(model, ltm.LTMConfig(flops=0.65)))
    assert plan.macs_original == 4_598_882_304  # checked against the closed form in test_macs.py
    assert count_macs(model, torch.randn(1, 3, 224, 224)).total == plan.macs
    assert 0.63 <= plan.share <= 0.65
