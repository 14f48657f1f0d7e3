"""Models of a user's own: a block by itself, a backbone in a wrapper, code between the blocks."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers as tr
from conversions import call, convert, equal, randomise, scopes
from pieces import snapshot
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import learns, masks_of
from ltm_retrofit.finding.example import tensors_of
from ltm_retrofit.scopes.base import Interceptor

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
    assert masks and all(map(learns, masks.values()))
    assert any(key.startswith("ltm.mask.") for key in model.state_dict()) is itself
    merged = call(model, OTHERS)
    assert [t.shape for t in merged] == [t.shape for t in before] and not equal(merged, before)
    with ltm.disabled(model):
        assert equal(call(model, OTHERS), before)
    with ltm.trace(model) as traced:
        call(model, OTHERS)
    assert len(traced.merges) == sum(row.action == "merge" for row in ltm.get_plan(model).rows)
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


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_a_saved_block_alone_gives_equal_results(root, adapter, tmp_path: Path):
    model, scope, _ = root
    base = copy.deepcopy(model)
    convert(model, TOKENS, 0.9, scope=scope)
    for mask in masks_of(model).values():
        for number, parameter in enumerate(mask.parameters()):
            parameter.data.add_(0.01 * (1 + number))
    expected = call(model, OTHERS)
    ltm.save_pretrained(model, tmp_path, adapter=adapter, allow_unloadable=True)
    again = ltm.from_pretrained(tmp_path, base=base)
    assert again is base and equal(call(again, OTHERS), expected)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_masks_of_a_block_alone_learn(root):
    model, scope, _ = root
    convert(model, TOKENS, 0.9, scope=scope)
    model.train()
    call(model, OTHERS)[0].square().sum().backward()
    weights = [p.grad for mask in masks_of(model).values() for n, p in mask.named_parameters() if n == "weight"]
    assert weights and all(grad is not None and bool(torch.isfinite(grad).all()) for grad in weights)


def test_a_site_without_a_mask_does_not_take_the_models_record_for_one():
    model = convert(randomise(_several()), TOKENS, 0.9, scope="FLOW")
    assert isinstance(model.ltm, nn.Module) and Interceptor(model, "").mask is None


# ------------------------------------------------------------------------------------------ a backbone within a wrapper


VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class Wrapped(nn.Module):
    """A backbone, and a head on whatever ``read`` makes of it."""

    def __init__(self, backbone: nn.Module, width: int, read: Callable[[nn.Module, Tensor], Tensor] | None = None):
        super().__init__()
        self.backbone, self.read, self.head = backbone, read, nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x) if self.read is None else self.read(self.backbone, x))


def _vit(**changes: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, "num_classes": 0, **changes})


def _grids() -> nn.Module:
    widths = {"widths": (8, 8, 16, 32, 32), "depths": (1, 1, 1, 2, 2), "head_dim": 8, "head_widths": (32, 32)}
    return Wrapped(timm.create_model("efficientvit_b0", num_classes=0, **widths), 32)


def _hf() -> nn.Module:
    arguments = {"architecture": "vit_tiny_patch16_224", "model_args": VIT, "num_labels": 7}
    return tr.TimmWrapperForImageClassification(tr.TimmWrapperConfig(**arguments))


def _last_of(backbone: nn.Module, x: Tensor) -> Tensor:
    return backbone.forward_intermediates(x, indices=[3], output_fmt="NLC", intermediates_only=True)[0].mean(dim=1)


#: name → how it is made, the side of its image, its scope, the backbone's name
WRAPPERS: dict[str, tuple[Callable[[], nn.Module], int, str, str]] = {
    "user-flow": (lambda: Wrapped(_vit(), 48), 32, "FLOW", "backbone"),
    "user-local": (lambda: Wrapped(_vit(), 48), 32, "LOCAL", "backbone"),
    "user-grid": (_grids, 128, "GRID", "backbone"),
    "user-twice-flow": (lambda: Wrapped(Wrapped(_vit(), 48), 7), 32, "FLOW", "backbone.backbone"),
    "timm-flow": (lambda: _vit(num_classes=7), 32, "FLOW", ""),
    "transformers-flow": (_hf, 32, "FLOW", "timm_model"),
}


@pytest.fixture(params=WRAPPERS)
def wrapper(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, str, str]:
    make, side, scope, path = WRAPPERS[request.param]
    with torch.random.fork_rng(devices=[]):
        return randomise(make()), torch.randn(1, 3, side, side), scope, path


@torch.no_grad()
@pytest.mark.parametrize("method", ["forward_intermediates", "get_intermediate_layers"])
def test_maps_of_a_backbone_have_the_original_shapes_or_are_refused_by_name(wrapper, method):
    model, example, scope, path = wrapper
    if not hasattr(model.get_submodule(path), method):
        pytest.skip(f"no {method}")

    def ask() -> list[Tensor]:
        return tensors_of(getattr(model.get_submodule(path), method)(example))

    parts, expected = snapshot(model), ask()
    convert(model, example, scope=scope)
    twin = copy.deepcopy(model)
    if scope == "LOCAL":
        given = ask()
        assert [t.shape for t in given] == [t.shape for t in expected] and not equal(given, expected)
    else:
        with pytest.raises(ltm.UnsupportedBlock, match=rf"{method}.*disabled"):
            ask()
    with ltm.disabled(model):
        assert equal(ask(), expected)
    ltm.restore(model)
    assert snapshot(model) == parts and equal(ask(), expected)
    assert scope == "LOCAL" or method in vars(twin.get_submodule(path))


def test_blocks_are_not_pruned_from_under_a_plan(wrapper):
    model, example, scope, path = wrapper
    convert(model, example, scope=scope)
    backbone = model.get_submodule(path)
    with pytest.raises(ltm.UnsupportedBlock, match=r"prune_intermediate_layers.*restore"):
        backbone.prune_intermediate_layers([1])
    with ltm.disabled(model), pytest.raises(ltm.UnsupportedBlock, match=r"prune_intermediate_layers.*restore"):
        backbone.prune_intermediate_layers([1])
    with pytest.raises(ltm.UnsupportedBlock, match="prune_intermediate_layers"):
        FeatureGetterNet(backbone, out_indices=[1])
    ltm.restore(model)
    assert backbone.prune_intermediate_layers([1]) == [1]


@torch.no_grad()
def test_hidden_states_of_transformers_wrapper_of_timm_models_are_refused_by_name():
    model = randomise(_hf())
    expected = tensors_of(model(IMAGES, output_hidden_states=True))
    convert(model, IMAGES[:1], scope="FLOW")
    with pytest.raises(ltm.UnsupportedBlock, match=r"timm_model.forward_intermediates.*output_hidden_states.*disabled"):
        model(IMAGES, output_hidden_states=True)
    with ltm.disabled(model):
        assert equal(tensors_of(model(IMAGES, output_hidden_states=True)), expected)
    assert model(IMAGES).logits.shape == (2, 7)


@torch.no_grad()
def test_a_model_whose_forward_asks_for_maps_runs_merged_and_other_calls_are_refused():
    model = randomise(Wrapped(_vit(), 48, _last_of))
    before = call(model, IMAGES)
    convert(model, IMAGES[:1], scope="FLOW")
    merged = call(model, IMAGES)
    assert [t.shape for t in merged] == [t.shape for t in before] and not equal(merged, before)
    assert equal(call(pickle.loads(pickle.dumps(model)), IMAGES), merged)
    with pytest.raises(ltm.UnsupportedBlock, match=r"backbone\.forward_intermediates"):
        model.backbone.forward_intermediates(IMAGES)


def test_a_method_of_the_users_own_comes_back():
    model = randomise(_vit(num_classes=7))
    model.forward_intermediates = own = lambda x: [x]
    convert(model, IMAGES[:1], scope="FLOW")
    with pytest.raises(ltm.UnsupportedBlock, match="forward_intermediates"):
        model.forward_intermediates(IMAGES)
    with ltm.disabled(model):
        assert model.forward_intermediates(IMAGES) == [IMAGES]
    assert ltm.restore(model).forward_intermediates is own


# ------------------------------------------------------------------------- what happens between blocks in training only


class Stack(nn.Module):
    """Patches, blocks, a head; ``between`` is called after each block with the model and its tokens."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], module: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 48, 4, stride=4), nn.Flatten(2))
        self.blocks = nn.ModuleList([Block(48, 4, 2.0) for _ in range(4)])
        self.between, self.norm, self.head = between, nn.BatchNorm1d(48), nn.Linear(48, 7)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).transpose(1, 2)
        for block in self.blocks:
            x = self.between(self, block(x))
        return self.head(self.norm(x.mean(dim=1)))


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + random.random() * torch.randn_like(x) * np.random.rand() if self.training else x


def _once(model: nn.Module, x: Tensor) -> Tensor:
    """Drop after the second block only."""
    model.calls = getattr(model, "calls", 0) + 1
    return F.dropout(x, 0.1, model.training) if model.calls % 4 == 2 else x


def _needs_targets(model: nn.Module, x: Tensor) -> Tensor:
    if model.training and not hasattr(model, "targets"):
        raise ValueError("targets should not be None while training")
    return x


#: name → what lies between the blocks, a module that it may call, and the blocks that stay in scope FLOW
BETWEEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], nn.Module | None, list[int]]] = {
    "nothing": (lambda model, x: x, None, [0, 1, 2, 3]),
    "dropout": (lambda model, x: F.dropout(x, 0.1, model.training), None, [3]),
    "dropout-in-place": (lambda model, x: F.dropout(x, 0.1, model.training, inplace=True), None, [0, 1, 2, 3]),
    "dropout-of-none": (lambda model, x: F.dropout(x, 0.0, model.training), None, [0, 1, 2, 3]),
    "dropout-once": (_once, None, [2, 3]),
    "noise-if-training": (lambda model, x: x + torch.randn_like(x) if model.training else x, None, [3]),
    "module-of-noise": (lambda model, x: model.module(x), Noise(), [3]),
    "module-of-dropout": (lambda model, x: model.module(x), nn.Dropout(0.1), [3]),
    "another-module-in-training": (lambda model, x: model.module(x) if model.training else x, nn.Dropout(0.1), [3]),
    "needs-targets": (_needs_targets, None, [0, 1, 2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_tokens_stay_merged_only_where_their_sizes_arrive_in_training_too(name):
    between, module, flow = BETWEEN[name]
    model = randomise(Stack(between, module)).train()
    parts, state = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sites = ltm.find_sites(model, IMAGES[:1])
    assert snapshot(model) == parts and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1] and np.random.get_state()[1].tolist() == draws[2]
    assert [site.block for site in sites.found if site.scope == "FLOW"] == [f"blocks.{index}" for index in flow]
    assert len(sites.found) == 4 and not sites.excluded
    for index in set(range(4)) - set(flow):
        assert "makes a new tensor" in sites.narrowed[f"blocks.{index}"]
    convert(model, IMAGES[:1], 0.85)
    model.targets = True
    model(IMAGES).square().sum().backward()
    assert all(p.grad is not None for mask in masks_of(model).values() for p in mask.parameters() if p.ndim > 1)
