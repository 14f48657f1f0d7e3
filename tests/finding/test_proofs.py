"""The proofs hold in half precision, across devices, and of the converted model."""

from __future__ import annotations

import pickle

import pytest
import torch
from own_nets import DIM, EXAMPLE, Attention, Block, Net, drawn, scopes
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import in_mode
from ltm_retrofit.merging.methods import Scope
from ltm_retrofit.scopes.flow import find as flow

torch.set_num_threads(1)


class Neighbours(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.one(x))
        h = self.two(x)
        return x + self.mlp(h + h.roll(1, 1))


class Mixed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).to(self.norm.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_in_half_precision_are_proven_in_full(dtype) -> None:
    model = drawn(Mixed(Neighbours))
    for part in (model.blocks, model.norm, model.head):
        part.to(dtype)
    assert scopes(model) == {Scope.LOCAL}


class Hybrid(nn.Module):
    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.constant, self.seed, self.neck = constant, nn.Conv2d(3, DIM, 4, 4), nn.Conv2d(DIM, DIM, 3, padding=1)
        self.attn, self.head = Attention(), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.constant:
            x = x * torch.tensor([1.0, 2.0, 3.0]).view(1, -1, 1, 1)
        x = self.neck(self.seed(x))
        y = x + self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
        return self.head(self.neck(y).mean(dim=(2, 3)))


def test_a_constant_on_a_device_does_not_hide_a_smaller_grid() -> None:
    plain, constant = (ltm.find_sites(drawn(Hybrid(kind)), EXAMPLE) for kind in (False, True))
    assert [site.scope for site in constant] == [site.scope for site in plain]


def test_with_nothing_merged_it_is_the_original() -> None:
    model = ltm.retrofit(drawn(Net()), ltm.LTMConfig(flops=0.7), EXAMPLE)
    with torch.no_grad(), ltm.disabled(model):
        expected = model(EXAMPLE)
    with torch.no_grad(), in_mode(model, "identity"):
        assert torch.equal(model(EXAMPLE), expected)


@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
def test_a_converted_block_does_not_carry_the_model(scope) -> None:
    model = drawn(Net())
    whole = len(pickle.dumps(model.blocks[-1]))
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8, scope=scope), EXAMPLE)
    assert len(pickle.dumps(model.blocks[-1])) < 2.5 * whole


def test_blocks_before_one_that_drops_out_would_lose_what_they_carry(monkeypatch) -> None:
    """Where proof (c) fails for one block among others, the run behind it is kept, and it alone."""
    model = drawn(Net())
    refuse = flow._refuse_rest

    def refusing(walk, pieces, prefix, restored):
        fails = any(piece.block is walk.model.blocks[1] for piece in pieces)
        return "proof (c): not this one" if fails else refuse(walk, pieces, prefix, restored)

    monkeypatch.setattr(flow, "_refuse_rest", refusing)
    sites = ltm.find_sites(model, EXAMPLE)
    assert [site.block for site in sites if site.scope == "FLOW"] == ["blocks.2", "blocks.3"]
    assert (
        sites.narrowed["blocks.0"] == "blocks.0: proof (c): tokens merged here would reach blocks.1, which is left out"
    )
    ltm.retrofit(model, ltm.LTMConfig(flops=0.9), EXAMPLE)
