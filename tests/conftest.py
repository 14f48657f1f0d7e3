"""Tiny models of every supported family, with every parameter and buffer table randomised."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network

import pytest
import timm
import torch
import transformers as tr
from conversions import EVERY
from kept import KEPT
from torch import nn

torch.set_num_threads(1)

CLASSES = 7
SIZE = {"hidden_size": 48, "num_attention_heads": 3, "image_size": 32, "patch_size": 4, "num_hidden_layers": 6}
WIDE = {**SIZE, "intermediate_size": 96}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew: LayerScale of 1e-5 and zero biases would make proofs vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(centre + 0.08 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _timm(name: str, **changes: object) -> Callable[[], nn.Module]:
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": CLASSES}
    return lambda: timm.create_model(name, **{**arguments, **changes})


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm-vit": _timm("vit_tiny_patch16_224"),
    "timm-vit-avg-qknorm": _timm("vit_tiny_patch16_224", qk_norm=True, qkv_bias=False, global_pool="avg"),
    "timm-deit": _timm("deit_tiny_distilled_patch16_224"),
    "timm-dinov2": _timm("vit_small_patch14_reg4_dinov2"),
    "timm-clip": _timm("vit_base_patch16_clip_224"),
    "hf-vit": lambda: tr.ViTForImageClassification(tr.ViTConfig(num_labels=CLASSES, **WIDE)),
    "hf-deit": lambda: tr.DeiTForImageClassification(tr.DeiTConfig(num_labels=CLASSES, **WIDE)),
    "hf-deit-teacher": lambda: tr.DeiTForImageClassificationWithTeacher(tr.DeiTConfig(num_labels=CLASSES, **WIDE)),
    "hf-dinov2": lambda: tr.Dinov2WithRegistersForImageClassification(
        tr.Dinov2WithRegistersConfig(num_labels=CLASSES, num_register_tokens=4, mlp_ratio=2, **SIZE)
    ),
    "hf-clip": lambda: tr.CLIPVisionModel(tr.CLIPVisionConfig(**WIDE)),
}


def make(family: str, seed: int = 0) -> nn.Module:
    """Build one family's tiny model, randomised, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        return randomise(FAMILIES[family](), seed)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Go through all families."""
    return str(request.param)


@pytest.fixture(params=EVERY)
def host(request: pytest.FixtureRequest) -> str:
    """Go through all hosts."""
    return str(request.param)


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Build a family's model by name."""
    return make


@pytest.fixture
def images() -> torch.Tensor:
    """Return three images that are not the example."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


_CONVERTED: dict[tuple[str, str], nn.Module] = {}


@pytest.fixture
def converted() -> Callable[..., nn.Module]:
    """Return a family's converted tiny model, found once and copied: ``converted("timm-vit", "tome")``."""
    import copy

    import ltm_retrofit as ltm

    def get(family: str, method: str = "ltm") -> nn.Module:
        if (family, method) not in _CONVERTED:
            _CONVERTED[family, method] = ltm.retrofit(make(family), ltm.LTMConfig(flops=0.7, method=method))
        return copy.deepcopy(_CONVERTED[family, method])

    return get


@pytest.fixture
def pictures() -> Callable[..., object]:
    """Return a factory of `datasets` data sets: plain colours, one for each class, with a little noise."""
    import datasets
    import numpy as np
    from PIL import Image

    def get(count: int = 14, classes: int = CLASSES, size: int = 32, seed: int = 0) -> datasets.Dataset:
        rng = np.random.default_rng(seed)
        labels = [index % classes for index in range(count)]
        colours = np.random.default_rng(1).integers(0, 256, (classes, 3))
        arrays = [np.clip(colours[y] + rng.normal(0, 8, (size, size, 3)), 0, 255).astype(np.uint8) for y in labels]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"colour{y}" for y in range(classes)])}
        )
        return datasets.Dataset.from_dict(
            {"image": [Image.fromarray(array) for array in arrays], "label": labels}, features=features
        )

    return get


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow whatever a long test is parametrised with beside what CI runs of it."""
    seen: dict[str, set[str]] = {}
    for item in items:
        name, call = getattr(item, "originalname", ""), getattr(item, "callspec", None)
        if name in KEPT and call is not None:
            seen.setdefault(name, set()).add(call.id)
            if call.id not in KEPT[name]:
                item.add_marker(pytest.mark.slow)
    if not any("::" in str(argument) for argument in config.args):
        for name, ids in seen.items():
            if gone := set(KEPT[name]) - ids:
                raise pytest.UsageError(f"tests/kept.py: {name} has no parameters {sorted(gone)}")
