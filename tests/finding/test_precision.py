"""Looked at and proven in the precision of the weights, whatever autocast is on around or within a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from zoo import ZOO, randomise

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of

torch.set_num_threads(1)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}


def vit() -> nn.Module:
    return randomise(timm.create_model("vit_tiny_patch16_224", **SIZES))


def eva() -> nn.Module:
    return ZOO["timm-eva02"]()[0]


class Mixed(nn.Module):
    """Asks for autocast by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def prepared(model: nn.Module) -> nn.Module:
    AcceleratorState._reset_state(reset_partial_state=True)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    return model


@pytest.mark.parametrize("build", [vit, pytest.param(eva, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("wrap", "around"),
    [
        (lambda model: model, lambda: torch.autocast("cpu", torch.bfloat16)),
        (prepared, nullcontext),
        pytest.param(lambda model: Mixed(model).eval(), nullcontext, marks=pytest.mark.slow),
    ],
    ids=["around", "accelerate", "within"],
)
def test_under_autocast_the_conversion_is_the_same(
    build: Callable[[], nn.Module],
    wrap: Callable[[nn.Module], nn.Module],
    around: Callable[[], AbstractContextManager[object]],
) -> None:
    plain = build()
    mixed = wrap(copy.deepcopy(plain))
    ltm.retrofit(plain, ltm.LTMConfig(flops=0.7), IMAGES[:1])
    with around():
        before = torch.is_autocast_enabled("cpu")
        ltm.retrofit(mixed, ltm.LTMConfig(flops=0.7), IMAGES[:1])
        assert torch.is_autocast_enabled("cpu") is before
    ours, theirs = list(forwards_of(plain)), list(forwards_of(mixed))
    assert [type(one) for one in ours] == [type(one) for one in theirs]
    assert [one.bias for one in ours] == [one.bias for one in theirs] and all(one.bias for one in ours)
    assert ltm.get_plan(plain).tokens == ltm.get_plan(mixed).tokens
    inner = mixed.inner if isinstance(mixed, Mixed) else mixed
    inner.__dict__.pop("forward", None)  # accelerate's, which computes in half precision
    with torch.no_grad():
        assert torch.equal(plain(IMAGES), inner(IMAGES))


def test_autocast_is_as_it_was_after_an_error() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ltm.NoAttentionError):
            ltm.find_sites(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), IMAGES)
        assert torch.is_autocast_enabled("cpu") and torch.mm(IMAGES[0, 0], IMAGES[0, 0]).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(IMAGES[0, 0], IMAGES[0, 0]).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_a_plan_says_that_no_attention_takes_sizes() -> None:
    model = ltm.retrofit(vit())
    aware = ltm.get_plan(model)
    assert aware.size_aware and "no attention takes sizes" not in str(aware)
    model, example = ZOO["plain-functional"]()
    plan = ltm.make_plan(ltm.find_sites(model, example), ltm.LTMConfig(flops=0.8))
    assert {row.scope for row in plan.rows} == {"FLOW"}
    assert not plan.size_aware and "no attention takes sizes" in str(plan)
    assert ltm.MergePlan.from_dict(plan.to_dict()) == plan
    old = {key: value for key, value in aware.to_dict().items() if key != "size_aware"}
    assert ltm.MergePlan.from_dict(old) == aware
