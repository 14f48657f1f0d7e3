"""Converted models of the zoo, for the tests of hosts and scopes: found once, copied for each test."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Example, randomise

import ltm_retrofit as ltm
from ltm_retrofit.finding.example import tensors_of

#: readable name → (zoo name, options of `LTMConfig` beside the budget); each scope in both libraries
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "timm-vit-flow": ("timm-vit", {}),
    "timm-dinov3-flow": ("timm-eva-dinov3", {}),
    "timm-vit-local": ("timm-vit", {"scope": "LOCAL"}),
    "timm-swin-local": ("timm-swin", {}),
    "timm-efficientvit-grid": ("timm-efficientvit-mit-b", {"scope": "GRID"}),
    "hf-vit-flow": ("hf-vit", {}),
    "hf-dinov3-flow": ("hf-dinov3", {}),
    "hf-swin-local": ("hf-swin", {}),
    "timm-beit-local": ("timm-beit", {}),
    "timm-eva-rope-flow": ("timm-eva-rope-mixed", {}),
    "timm-levit-local": ("timm-levit", {}),
    "timm-maxvit-local": ("timm-maxvit-tf", {}),
    "timm-mobilevit-local": ("timm-mobilevit", {}),
    "timm-pvt-local": ("timm-pvt-v2", {}),
    "timm-xcit-local": ("timm-xcit", {}),
    "hf-beit-local": ("hf-beit", {}),
    "hf-clip-flow": ("hf-clip", {}),
    "hf-dinov2-flow": ("hf-dinov2-registers", {}),
    "hf-mobilevit-grid": ("hf-mobilevit", {}),
    "hf-segformer-local": ("hf-segformer", {}),
}


def slow_but(fast: Collection[str], names: Iterable[str] = HOSTS) -> list[Any]:
    """Return names for a parametrised test of which CI runs the fast ones."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


#: those that CI runs, each scope and each library; the others are slow
FAST = ("timm-vit-flow", "timm-swin-local", "timm-efficientvit-grid", "hf-vit-flow", "hf-swin-local")
EVERY = slow_but(FAST)
_KEPT: dict[str, tuple[nn.Module, Example]] = {}

__all__ = [
    "EVERY",
    "FAST",
    "HOSTS",
    "batch",
    "call",
    "convert",
    "converted",
    "equal",
    "gradients",
    "near",
    "randomise",
    "scopes",
    "slow_but",
    "trainable",
]


def convert(model: nn.Module, example: Example | None = None, flops: float = 0.8, **options: Any) -> nn.Module:
    """Convert to a share of MACs, or to the nearest one that can be had."""
    try:
        return ltm.retrofit(model, ltm.LTMConfig(flops=flops, **options), example)
    except ltm.BudgetError as error:
        return ltm.retrofit(model, ltm.LTMConfig(flops=error.nearest, **options), example)


def converted(name: str, **more: Any) -> tuple[nn.Module, nn.Module, Example]:
    """Return a converted model of `HOSTS`, its original, and an example; ``more`` are further options."""
    row, options = HOSTS[name]
    original, example = ZOO[row]()
    key = f"{name} {more}"
    if key not in _KEPT:
        _KEPT[key] = convert(copy.deepcopy(original), example, **options, **more), example
    return copy.deepcopy(_KEPT[key][0]), original, example


def scopes(model: nn.Module) -> set[str]:
    """Return the scopes that a converted model merges in."""
    return {row.scope for row in ltm.get_plan(model).rows}


def batch(example: Example, count: int = 2, seed: int = 5) -> Example:
    """Return other inputs of the example's shapes, more of them; whole numbers are repeated."""
    generator = torch.Generator().manual_seed(seed)

    def more(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.repeat(count, *[1] * (value.ndim - 1))
        return torch.randn(count, *value.shape[1:], generator=generator)

    return more(example) if isinstance(example, Tensor) else {key: more(value) for key, value in example.items()}


def call(model: Any, inputs: Example, **options: Any) -> list[Tensor]:
    """Return the tensors of a call."""
    return tensors_of(model(inputs, **options) if isinstance(inputs, Tensor) else model(**inputs, **options))


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Say whether two calls gave the same, bit for bit."""
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def near(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Check that two calls gave the same but for rounding."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def gradients(model: nn.Module, inputs: Example) -> dict[str, Tensor]:
    """Return the gradients of a sum of squares, of those parameters that have one."""
    model.zero_grad()
    torch.manual_seed(0)
    call(model, inputs)[0].square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainable(model: nn.Module) -> nn.Module:
    """Put a model into training mode but for BatchNorm, whose statistics would be other ones at the next pass."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model
