"""Models of a user's own: a block by itself, a backbone in a wrapper, code between the blocks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversions import call, convert, equal, randomise, scopes
from pieces import snapshot
from timm.models.vision_transformer import Attention, Block
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.blocks import masks_of
from ltm_retrofit.interception.base import Interceptor
from ltm_retrofit.interception.masks import MASKS

torch.set_num_threads(1)
TOKENS = torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------------------------- a model that is itself a block


def _layer() -> nn.Module:
    return nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)


def _several() -> nn.Module:
    return nn.Sequential(Block(48, 4), Block(48, 4))


#: name → how it is made, its scope, and whether the mask's host is the model itself
ROOTS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    "torch-layer-flow": (_layer, "FLOW", True),
    "torch-layer-local": (_layer, "LOCAL", False),
    "timm-block-flow": (lambda: Block(48, 4), "FLOW", True),
    "timm-block-local": (lambda: Block(48, 4), "LOCAL", False),
    "timm-attention-local": (lambda: Attention(48, 4), "LOCAL", False),
    "sequential-flow": (_several, "FLOW", False),
    "sequential-local": (_several, "LOCAL", False),
}


@pytest.fixture(params=ROOTS)
def root(request: pytest.FixtureRequest) -> tuple[nn.Module, str, bool]:
    make, scope, itself = ROOTS[request.param]
    with torch.random.fork_rng(devices=[]):
        return randomise(make()), scope, itself


def test_a_block_alone_converts_and_comes_back_bit_for_bit(root):
    model, scope, itself = root
    before, parts, state = call(model, OTHERS), snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    convert(model, TOKENS, 0.9, scope=scope)
    assert ltm.is_retrofitted(model) and scopes(model) == {scope}
    masks = masks_of(model)
    assert masks and all(isinstance(mask, MASKS) for mask in masks.values())
    assert any(key.startswith("ltm.mask.") for key in model.state_dict()) is itself
    merged = call(model, OTHERS)
    assert [t.shape for t in merged] == [t.shape for t in before] and not equal(merged, before)
    with ltm.disabled(model):
        assert equal(call(model, OTHERS), before)
    with ltm.trace(model) as traced:
        call(model, OTHERS)
    assert len(traced.steps) == sum(row.action == "merge" for row in ltm.get_plan(model).rows)
    ltm.restore(model)
    assert not ltm.is_retrofitted(model) and snapshot(model) == parts
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], value) for key, value in state.items())
    assert equal(call(model, OTHERS), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_block_alone_has_a_mask_of_its_own(root, way):
    model, scope, _ = root
    convert(model, TOKENS, 0.9, scope=scope)
    merged = call(model, OTHERS)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert equal(call(twin, OTHERS), merged)
    assert not set(masks_of(model).values()) & set(masks_of(twin).values())
    ltm.restore(twin)
    assert ltm.is_retrofitted(model) and equal(call(model, OTHERS), merged)


@pytest.mark.filterwarnings("ignore:the base .* cannot be rebuilt from a file")
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_saved_block_alone_gives_equal_results(root, adapter, tmp_path: Path):
    model, scope, _ = root
    base = copy.deepcopy(model)
    convert(model, TOKENS, 0.9, scope=scope)
    for mask in masks_of(model).values():
        for number, parameter in enumerate(mask.parameters()):
            parameter.data.add_(0.01 * (1 + number))
    expected = call(model, OTHERS)
    ltm.save_pretrained(model, tmp_path, adapter=adapter)
    again = ltm.from_pretrained(tmp_path, base=base)
    assert again is base and equal(call(again, OTHERS), expected)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_masks_of_a_block_alone_learn(root):
    model, scope, _ = root
    convert(model, TOKENS, 0.9, scope=scope)
    model.train()
    call(model, OTHERS)[0].square().sum().backward()
    keys = [p.grad for mask in masks_of(model).values() for n, p in mask.named_parameters() if n == "key.weight"]
    assert keys and all(grad is not None and bool(torch.isfinite(grad).all()) for grad in keys)


def test_a_site_without_a_mask_does_not_take_the_models_record_for_one():
    model = convert(randomise(_several()), TOKENS, 0.9, scope="FLOW")
    assert isinstance(model.ltm, nn.Module) and Interceptor(model, "").mask is None
