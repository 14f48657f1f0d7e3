"""The cut: back(front(x)) is the block, in eval and training mode; code pickles; other calls are refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.call import Signature
from ltm_retrofit.scopes.flow.site import Code

torch.set_num_threads(1)
_CACHE: dict[str, tuple] = {}


@pytest.fixture
def found(family: str, build: Callable[..., nn.Module]):
    if family not in _CACHE:
        model = build(family)
        _CACHE[family] = model, ltm.find_sites(model)
    return _CACHE[family]


def tokens_of(site, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, site.layout.tokens, site.dim, generator=generator)


def whole(site, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x, **dict(site.signature.others))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_halves_are_the_block_bit_for_bit(found, training):
    model, sites = copy.deepcopy(found[0]).train(training), found[1]
    for site in sites:
        block, x = model.get_submodule(site.block), tokens_of(site)
        halves = site.halves[training, False]
        torch.manual_seed(0)
        stream, _ = halves.front(block, x, None, ())
        ours = halves.back(block, stream)
        torch.manual_seed(0)
        assert torch.equal(ours, whole(site, block, x))


def test_in_training_mode_dropout_and_drop_path_draw_the_same_numbers(build):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=7,
        proj_drop_rate=0.3,
        attn_drop_rate=0.3,
        drop_path_rate=0.5,
        init_values=0.5,
    )
    sites = ltm.find_sites(model.eval())
    model.train()
    for site in sites:
        block, x = model.get_submodule(site.block), tokens_of(site, 8)
        halves = site.halves[True, False]
        torch.manual_seed(0)
        ours = halves.back(block, halves.front(block, x, None, ())[0])
        torch.manual_seed(0)
        theirs = block(x)
        assert torch.equal(ours, theirs)
        torch.manual_seed(1)
        assert not torch.equal(theirs, block(x))


def test_the_back_half_treats_each_token_alone(found):
    model, sites = found
    site = sites[3]
    block, x = model.get_submodule(site.block), tokens_of(site)
    chosen = torch.tensor([0, 7, 3, 30, 4])
    with torch.no_grad():
        back = site.halves[False, False].back
        torch.testing.assert_close(back(block, x[:, chosen]), back(block, x)[:, chosen], rtol=1e-5, atol=1e-5)


def test_halves_look_everything_up_on_the_block_they_are_given(found):
    """They hold no parameter: a changed block changes them, and a copy's own weights count."""
    model, sites = found
    site = sites[0]
    other = copy.deepcopy(model.get_submodule(site.block))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        x = tokens_of(site)
        halves = site.halves[False, False]
        assert torch.equal(halves.back(other, halves.front(other, x, None, ())[0]), whole(site, other, x))


def test_halves_pickle_and_copy(found):
    model, sites = found
    site = sites[0]
    again = pickle.loads(pickle.dumps(site.halves))
    assert copy.deepcopy(site.halves) == site.halves == again
    block, x = model.get_submodule(site.block), tokens_of(site)
    with torch.no_grad():
        for key, halves in site.halves.items():
            bias = torch.zeros(1, 1, 1, x.shape[1]) if key[1] else None
            ours = [half for half in halves.front(block, x, bias, ())]
            theirs = again[key].front(block, x, bias, ())
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert torch.equal(halves.back(block, ours[0]), again[key].back(block, ours[0]))


def test_code_is_equal_by_what_it_runs():
    one = Code("def forward(self, x):\n    return x + 1\n", {})
    same = Code("def forward(self, x):\n    return x + 1\n", {})
    other = Code("def forward(self, x):\n    return x + 2\n", {})
    assert one == same and hash(one) == hash(same) and one != other and one(None, 2) == 3 == same(None, 2)
    loaded = pickle.loads(pickle.dumps(Code("def forward(self, x):\n    return torch.relu(x)\n", {"torch": torch})))
    assert torch.equal(loaded(None, torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


# ----------------------------------------------------------------------------------------------------------- signature


def converted_block(build, family: str) -> nn.Module:
    model = ltm.retrofit(build(family), ltm.LTMConfig(flops=0.7))
    return model.get_submodule(ltm.get_plan(model).rows[0].site)


CAUSAL = torch.ones(1, 1, 65, 65, dtype=torch.bool).tril()  # no padding: tokens see different others


@pytest.mark.parametrize(
    "family, given, shown",
    [
        pytest.param("timm-vit", {"attn_mask": CAUSAL}, "see different others", id="timm-mask"),
        pytest.param("timm-vit", {"is_causal": True}, "is_causal=True", id="timm-causal"),
        pytest.param("hf-vit", {"attention_mask": CAUSAL}, "see different others", id="hf-mask"),
        pytest.param("hf-clip", {"attention_mask": CAUSAL}, "see different others", id="clip-mask"),
    ],
)
def test_other_arguments_than_in_the_proven_call_are_refused_by_name(build, family, given, shown):
    block = converted_block(build, family)
    with pytest.raises(UnsupportedBlock, match=shown), torch.no_grad():
        block(torch.randn(1, 65, 48), **given)


def test_the_proven_arguments_may_be_said_aloud(build):
    block, x = converted_block(build, "timm-vit"), torch.randn(1, 65, 48)
    with torch.no_grad():
        plain = block(x)
        assert torch.equal(plain, block(x, None)) and torch.equal(plain, block(x, attn_mask=None, is_causal=False))
        assert torch.equal(plain, block(x=x))


class Takes(nn.Module):
    def forward(self, x, flag=False, table=None, *rest):
        return x


@pytest.mark.parametrize(
    "args, kwargs, match",
    [
        pytest.param(
            (torch.zeros(1, 3, 4), False, torch.zeros(2)), {}, "also receives 'table' of type Tensor", id="tensor"
        ),
        pytest.param((torch.zeros(1, 3, 4),), {"table": [torch.zeros(2)]}, "'table' of type list", id="list"),
        pytest.param((torch.zeros(1, 3, 4), False, None, 1), {}, "variable positional", id="varargs"),
        pytest.param((torch.zeros(3, 4),), {}, "not called with", id="two-dimensional"),
        pytest.param((3,), {}, "not called with", id="no-tensor"),
    ],
)
def test_calls_that_cannot_be_bound_are_refused_by_name(args, kwargs, match):
    with pytest.raises(UnsupportedBlock, match=match):
        Signature.of(Takes(), "b", args, kwargs)


def test_a_signature_remembers_defaults_and_recorded_values():
    x = torch.zeros(1, 3, 4)
    signature = Signature.of(Takes(), "b", (x,), {"flag": True})
    assert signature.tokens == "x" and dict(signature.others) == {"flag": True, "table": None}
    for args, kwargs in (((x, True), {}), ((), {"x": x, "flag": True})):
        tokens, followers, _ = signature.split("b", args, kwargs)
        assert tokens is x and followers == ()
    with pytest.raises(UnsupportedBlock, match="flag=False; the cut was proven for flag=True"):
        signature.split("b", (x, False), {})
    with pytest.raises(UnsupportedBlock, match="flag=False; the cut was proven for flag=True"):
        signature.split("b", (x,), {})  # left out, it has its default
