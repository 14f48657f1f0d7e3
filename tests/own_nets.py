"""A small transformer of one's own, whose blocks tests replace: neither timm nor Hugging Face knows it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.merging.methods import Scope

torch.set_num_threads(1)

DIM, HEADS = 32, 4

EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        if rows is not None:
            q, k = q * rows, k * rows
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.attn, self.two = nn.LayerNorm(DIM), Attention(), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.one(x), rows, mask)
        return x + self.mlp(self.two(x))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, depth: int = 4) -> None:
        super().__init__()
        self.seed, self.blocks = nn.Conv2d(3, DIM, 4, 4), nn.ModuleList(block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)

    def tokens(self, x: Tensor) -> Tensor:
        return self.seed(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def scopes(model: nn.Module, example: object = EXAMPLE) -> set[Scope]:
    return {site.scope for site in ltm.find_sites(model, example)}
