"""However a user's model says which tokens are padding: in LOCAL, where no merge could mind them, it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import ltm_retrofit as ltm

torch.set_num_threads(1)
DIM, HEADS, TOKENS = 32, 4, 64
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
VALID = torch.ones(2, TOKENS, dtype=torch.bool)
VALID[1, 40:] = False
#: what the model is given, from which tokens there are, and what it makes a boolean mask (B, N) of again
KINDS = {
    "bool": (lambda valid: valid, lambda mask, _: mask),
    "integers": (lambda valid: valid.long(), lambda mask, _: mask == 1),
    "zeros-and-ones": (lambda valid: valid.float(), lambda mask, _: mask > 0.5),
    "minus-100": (lambda valid: torch.where(valid, 0.0, -100.0), lambda mask, _: mask > -50),
    "column": (lambda valid: valid[..., None], lambda mask, _: mask[..., 0]),
    "lengths": (lambda valid: valid.sum(1), lambda mask, count: torch.arange(count)[None] < mask[:, None]),
    "in-a-tuple": (lambda valid: (valid,), lambda mask, _: mask[0]),
    "in-a-dict": (lambda valid: {"valid": valid}, lambda mask, _: mask["valid"]),
}


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.proj = kind, nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, mask: object = None) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = None if mask is None else KINDS[self.kind][1](mask, count)[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.attn, self.two = nn.LayerNorm(DIM), Attention(kind), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, mask: object = None) -> Tensor:
        x = x + self.attn(self.one(x), mask)
        return x + self.mlp(self.two(x))


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.seed, self.blocks = nn.Conv2d(3, DIM, 4, 4), nn.ModuleList(Block(kind) for _ in range(3))
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor, mask: object = None) -> Tensor:
        x = self.seed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x[:, :8].mean(1))


@pytest.fixture(params=["image", "mask"])
def example(request):
    """Made of a kind: with a mask that hides nothing, or without one."""
    whole = torch.ones(1, TOKENS, dtype=torch.bool)
    return lambda kind: {"x": IMAGES[:1], **({"mask": KINDS[kind][0](whole)} if request.param == "mask" else {})}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_hides_tokens_is_refused(kind, example) -> None:
    model, make = randomise(Net(kind)), KINDS[kind][0]
    with torch.no_grad():
        before = model(IMAGES, make(VALID))
        ltm.retrofit(model, ltm.LTMConfig(flops=0.85, scope="LOCAL"), example(kind))
        with pytest.raises(ltm.UnsupportedBlock, match=r"attention 'blocks.0.attn' was called with mask"):
            model(IMAGES, make(VALID))
        with ltm.disabled(model):
            assert torch.equal(model(IMAGES, make(VALID)), before)
        assert torch.equal(ltm.restore(model)(IMAGES, make(VALID)), before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lengths"])
def test_a_mask_that_hides_nothing_is_none(kind, example) -> None:
    model, make = randomise(Net(kind)), KINDS[kind][0]
    ltm.retrofit(model, ltm.LTMConfig(flops=0.85, scope="LOCAL"), example(kind))
    with torch.no_grad():
        assert torch.allclose(model(IMAGES, make(torch.ones_like(VALID))), model(IMAGES), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_that_hides_tokens_is_refused(kind) -> None:
    model, make = randomise(Net(kind)), KINDS[kind][0]
    with pytest.raises(ltm.UnsupportedBlock, match="some tokens of the example are padding"):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.85), {"x": IMAGES[1:], "mask": make(VALID[1:])})


@pytest.mark.parametrize("kind", ["bool", "minus-100"])
def test_a_compiled_model_refuses_it_too(kind, example) -> None:
    model, make = randomise(Net(kind)), KINDS[kind][0]
    ltm.retrofit(model, ltm.LTMConfig(flops=0.85, scope="LOCAL"), example(kind))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(IMAGES, make(torch.ones_like(VALID))), model(IMAGES), atol=1e-5)
        with pytest.raises(RuntimeError, match="which may hide tokens"):
            compiled(IMAGES, make(VALID))
