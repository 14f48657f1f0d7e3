"""Hosts whose weights are made of others before each call, replaced, averaged, or in int8."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from conversions import call, converted
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


class Other(nn.Module):
    """A linear layer of a user's own, without a weight of that name."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(layer.weight.detach().clone()), layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.T + self.shift


def int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
@pytest.mark.parametrize(
    ("host", "options"),
    [
        ("timm-vit-flow", {"method": "tome"}),
        ("timm-efficientvit-grid", {}),
        pytest.param("timm-vit-flow", {"ib_step": True}, marks=pytest.mark.slow),
        pytest.param("timm-vit-local", {}, marks=pytest.mark.slow),
    ],
)
def test_a_converted_model_runs_in_int8(host, options) -> None:
    model, original, example = converted(host, **options)
    low = int8(copy.deepcopy(model))
    with torch.no_grad():
        given, expected = call(low, example)[0], call(model, example)[0]
        loss = (call(int8(original), example)[0] - call(original, example)[0]).abs().max()
    assert given.shape == expected.shape and (given - expected).abs().max() < 20 * loss + 0.1


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
def test_a_model_in_int8_is_refused_by_name() -> None:
    _, original, example = converted("timm-vit-flow")
    with pytest.raises(ltm.UnsupportedBlock, match=r"blocks.0.attn.qkv .* quantized already.*convert first"):
        ltm.retrofit(int8(original), example=example)


@pytest.mark.parametrize("method", ["ltm", "tome"])
def test_replaced_layers_run_or_are_refused_by_name(method) -> None:
    model, original, example = converted("timm-vit-flow", method=method)
    for each in (model, original):
        for block in each.blocks:
            block.attn.qkv, block.mlp.fc1 = Other(block.attn.qkv), Other(block.mlp.fc1)
    with torch.no_grad():
        if method == "ltm":
            assert call(model, example)[0].shape == call(original, example)[0].shape
            return
        with pytest.raises(ltm.UnsupportedBlock, match=r"attn.qkv.weight is gone"):
            call(model, example)
    assert {site.scope for site in ltm.find_sites(original, example)} == {"LOCAL"}


def test_a_moving_average_takes_all_buffers() -> None:
    model, _, example = converted("timm-vit-flow", ib_step=True)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    average.update_parameters(model)
    with torch.no_grad():
        torch.testing.assert_close(call(average, example), call(model, example))
