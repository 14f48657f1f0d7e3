"""Which blocks follow each other, and what between or in them ends a run of blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from own_nets import DIM, EXAMPLE, Attention, Block, Net, drawn, scopes
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.macs import count_macs
from ltm_retrofit.merging.methods import Scope

torch.set_num_threads(1)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(DIM), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Alternating(Net):
    def __init__(self) -> None:
        super().__init__(depth=0)
        mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        for _ in range(3):
            self.blocks.extend([Residual(Attention()), Residual(copy.deepcopy(mlp))])


def test_residual_modules_in_turn_are_local() -> None:
    model = drawn(Alternating())
    assert scopes(model) == {Scope.LOCAL}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8), EXAMPLE)
    assert count_macs(model, EXAMPLE).total == ltm.get_plan(model).macs


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = self.drop(block(x))
        return self.head(self.norm(x).mean(1))


def test_what_is_an_identity_only_while_nothing_is_trained_ends_a_run() -> None:
    model = ltm.retrofit(drawn(Dropping()), ltm.LTMConfig(flops=0.8), EXAMPLE)
    model.train()(EXAMPLE).sum().backward()


class Ending(Block):
    """Its last step is a dropout: still the block's own output."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


def test_a_dropout_within_a_block_ends_no_run() -> None:
    model = drawn(Net(Ending))
    assert scopes(model) == {Scope.FLOW}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7), EXAMPLE)
    model.train()(EXAMPLE).sum().backward()


class Inside(nn.Module):
    """Attention that adds its input, then lays it out or normalises it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attn, self.kind = Attention(), kind

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2) if self.kind == "map" else x
        y = y + self.attn(y)
        if self.kind == "norm":
            return F.layer_norm(y, (DIM,))
        return y.transpose(1, 2).reshape(x.shape) if self.kind == "map" else y * 1.0


class Around(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.seed, self.inside, self.kind = nn.Conv2d(3, DIM, 4, 4), Inside(kind), kind
        self.head = nn.Linear(64 * DIM, 5)  # reads places: neither FLOW nor GRID

    def forward(self, x: Tensor) -> Tensor:
        x = self.seed(x)
        return self.head(self.inside(x if self.kind == "map" else x.flatten(2).transpose(1, 2)).flatten(1))


@pytest.mark.parametrize("kind", ["map", "norm", "scale"])
def test_tokens_are_not_lost_where_an_attention_adds_its_input(kind) -> None:
    sites = ltm.find_sites(drawn(Around(kind)), EXAMPLE)
    assert "inside" not in [site.block for site in sites.of("LOCAL") if site.mixes]


class Constant(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.one(x)) * torch.tensor(0.5)
        return x + self.mlp(self.two(x))


class Computed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.one(x)) * self.scale.exp()
        return x + self.mlp(self.two(x))


@pytest.mark.parametrize("block", [Constant, Computed])
def test_a_constant_of_the_forward_leaves_local(block) -> None:
    model = drawn(Net(block))
    assert scopes(model) == {Scope.LOCAL}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.85), EXAMPLE)


class Bottleneck(nn.Module):
    """Narrows and widens again before its MLP of functions, in a block that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.down, self.up, self.fc1, self.fc2 = (
            nn.Linear(*sizes) for sizes in ((DIM, 8), (8, DIM), (DIM, 4 * DIM), (4 * DIM, DIM))
        )

    def forward(self, x: Tensor) -> Tensor:
        assert x.abs().max() < 1e9, "too large"
        x = x + torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), dim=-1) @ self.v(x)
        x = x + self.up(F.gelu(self.down(x)))
        return x + self.fc2(F.gelu(self.fc1(x)))


def test_an_adapter_is_not_taken_for_the_mlp() -> None:
    model = ltm.retrofit(drawn(Net(Bottleneck)), ltm.LTMConfig(flops=0.85), EXAMPLE)
    assert {name for row in ltm.get_plan(model).rows for name in [row.site] if "down" in name or "up" in name} == set()
