"""Hooks of a user's on a host: where they hand on other tensors, LOCAL works, and FLOW names them."""

from __future__ import annotations

import copy

import pytest
import torch
from own_nets import DIM, EXAMPLE, Block, Net, drawn
from torch import nn

import ltm_retrofit as ltm

torch.set_num_threads(1)


def noticing(module, given, out):
    """Hands on what it is given."""


def detaching(module, given, out):
    return out.detach()


def copying(module, given):
    return tuple(value.clone() for value in given)


def looking_back(module, given, out):
    """Of the gradients."""


#: how a hook is put on a block
PUT = {
    "full backward": (lambda block: block.register_full_backward_hook(looking_back), "looking_back"),
    "full backward pre": (lambda block: block.register_full_backward_pre_hook(lambda module, out: None), "<lambda>"),
    "forward": (lambda block: block.register_forward_hook(detaching), "detaching"),
    "forward pre": (lambda block: block.register_forward_pre_hook(copying), "copying"),
}
SOME = [
    "full backward",
    "forward",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("full backward pre", "forward pre")),
]


def step(model: nn.Module) -> torch.Tensor:
    out = model.train()(EXAMPLE)
    out.sum().backward()
    return out


@pytest.mark.parametrize("kind", SOME)
def test_what_is_there_before_is_named_and_merges_in_local(kind) -> None:
    put, name = PUT[kind]
    model = drawn(Net())
    put(model.blocks[2])
    sites = ltm.find_sites(model, EXAMPLE)
    if "backward" in kind:
        assert [site.block for site in sites if site.scope == "FLOW"] == ["blocks.3"]
        assert name in sites.narrowed["blocks.2.attn"]
    else:
        assert name in sites.narrowed["blocks.1"]
    ltm.retrofit(model, ltm.LTMConfig(flops=0.9, scope="LOCAL"), EXAMPLE)
    plain = drawn(Net())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "ltm" not in k})
    ltm.retrofit(plain, ltm.LTMConfig(flops=0.9, scope="LOCAL"), EXAMPLE)
    assert torch.equal(step(model), step(plain))


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
def test_what_comes_later_is_named_at_the_first_step(kind, scope) -> None:
    put, name = PUT[kind]
    model = ltm.retrofit(drawn(Net()), ltm.LTMConfig(flops=0.8, scope=scope), EXAMPLE)
    plain = copy.deepcopy(model)
    put(model.blocks[1])
    if scope == "LOCAL":
        assert torch.equal(step(model), step(plain))
        return
    with pytest.raises(ltm.CountError, match=rf"hook .*test_hooks\.{name}"):
        step(model)


def test_what_hands_on_what_it_is_given_does_no_harm() -> None:
    model = drawn(Net())
    for block in model.blocks:
        block.register_forward_hook(noticing)
    assert {site.scope for site in ltm.find_sites(model, EXAMPLE)} == {"FLOW"}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8), EXAMPLE)
    step(model)


class Halved(Block):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.mlp = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.one(x))
        return x + self.narrow(self.wide(self.two(x)))


def test_within_a_chain_a_new_tensor_is_named() -> None:
    """One module merges and the next one brings back; between them tokens are few."""
    model = drawn(Net(Halved))
    ltm.retrofit(model, ltm.LTMConfig(flops=0.9, scope="LOCAL"), EXAMPLE)
    assert "forward" in model.blocks[1].wide.__dict__ and "forward" in model.blocks[1].narrow.__dict__
    model.blocks[1].narrow.register_forward_pre_hook(copying)
    with pytest.raises(ltm.CountError, match=r"hook .*test_hooks\.copying"):
        model(EXAMPLE)
