"""Hosts whose weights are made of others before each call: pruned, or normalised."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from pieces import snapshot
from torch import nn
from torch.nn.utils import parametrizations, prune
from zoo import randomise

import ltm_retrofit as ltm

torch.set_num_threads(1)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


def normed(layer: nn.Module) -> None:
    torch.nn.utils.weight_norm(layer)


MAKES = {"pruned": pruned, "weight_norm of old": normed, "parametrized": parametrizations.weight_norm}


def made(make: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    model = randomise(timm.create_model("vit_tiny_patch16_224", **sizes))
    for block in model.blocks:
        for layer in (block.attn.qkv, block.mlp.fc1):
            MAKES[make](layer)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("method", ["ltm", "tome"])
@pytest.mark.parametrize("make", ["pruned", *(pytest.param(name, marks=pytest.mark.slow) for name in [*MAKES][1:])])
def test_weights_that_are_made_before_each_call(make, method) -> None:
    model = made(make)
    before = snapshot(model)
    sites = ltm.find_sites(model)
    assert {site.scope for site in sites} == {"FLOW"} and snapshot(model) == before
    with torch.no_grad():
        expected = model(IMAGES)
    held = snapshot(model)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7, method=method))
    with torch.no_grad():
        merged, twin = model(IMAGES), copy.deepcopy(model)
        assert torch.equal(twin(IMAGES), merged) and not torch.equal(merged, expected)
        with ltm.disabled(model):
            assert torch.equal(model(IMAGES), expected)
    model.train()(IMAGES).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    ltm.restore(model).eval()
    assert snapshot(model).keys() == held.keys()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected)
