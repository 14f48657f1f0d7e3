"""Another image tells constant tokens; two images tell where images lie. Models that mind either still convert."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import randomise

import ltm_retrofit as ltm

torch.set_num_threads(1)
DIM = 32
IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Takes its tokens with a look at what lies beside them, which leaves LOCAL."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1).mean(-1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seed, self.cls = nn.Conv2d(3, DIM, 4, 4), nn.Parameter(torch.randn(1, 1, DIM))
        self.attentions = nn.ModuleList(Attention() for _ in range(3))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)) for _ in range(3)
        )
        self.head = nn.Linear(DIM, 5)

    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls.expand(len(x), -1, -1), self.seed(x).flatten(2).transpose(1, 2)], dim=1)

    def blocks(self, x: Tensor) -> Tensor:
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + self.mix(mlp, x)
        return x

    def mix(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x))[:, 0])


class InRange(Net):
    """Checks its images, as many preprocessings do."""

    def tokens(self, x: Tensor) -> Tensor:
        if x.min() < 0 or x.max() > 1:
            raise ValueError("images must lie in [0, 1]")
        return super().tokens(x)


class Dropping(Net):
    """How many tokens there are depends on the image."""

    def tokens(self, x: Tensor) -> Tensor:
        x = super().tokens(x)
        return x[:, : 40 + int(x[0, 1, 0].abs() * 1e6) % 20]


class Early(Net):
    """Is done early with some images."""

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0, 0, 0] != IMAGES[0, 0, 0, 0]:
            return self.head(self.tokens(x)[:, 0])
        return super().forward(x)


@pytest.mark.parametrize("kind", [Net, InRange, Dropping, Early])
def test_a_model_that_minds_its_images_converts(kind: type[Net]) -> None:
    model, example = randomise(kind()), IMAGES[:1]
    with torch.no_grad():
        before = model(example)
        ltm.retrofit(model, ltm.LTMConfig(flops=0.85), example)
        assert {row.scope for row in ltm.get_plan(model).rows} == {"LOCAL"}
        assert not torch.equal(model(example), before)
        assert torch.equal(ltm.restore(model)(example), before)


class Folded(Net):
    """Hands its MLP all images in one: (1, B·N, C), or (N, H, W, C) with the batch further in."""

    def __init__(self, fold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fold = fold

    def mix(self, mlp: nn.Module, x: Tensor) -> Tensor:
        return mlp(self.fold(x)).reshape(x.shape)


def rows(x: Tensor) -> Tensor:
    return x.reshape(1, -1, x.shape[-1])


def further_in(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unflatten(0, (5, 13))


def in_windows(x: Tensor) -> Tensor:
    return x.unflatten(1, (5, 13)).flatten(0, 1)


@pytest.mark.parametrize("fold", [rows, further_in])
def test_images_that_lie_among_the_tokens_are_never_mixed(fold) -> None:
    with pytest.raises(ltm.UnsupportedBlock, match="no block of this model can be cut"):
        ltm.retrofit(randomise(Folded(fold)), ltm.LTMConfig(flops=0.85), IMAGES[:1])


def test_windows_beside_images_are_merged() -> None:
    model = randomise(Folded(in_windows))
    ltm.retrofit(model, ltm.LTMConfig(flops=0.9, scope="LOCAL"), IMAGES[:1])
    with torch.no_grad():
        alone = torch.cat([model(image) for image in IMAGES.split(1)])
        assert torch.allclose(model(IMAGES), alone, atol=1e-5)
