"""Vision transformers of neither timm nor Hugging Face: torchvision's, and hand-written ones in the usual styles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

try:
    from einops import rearrange
except ImportError:  # no dependency of ours
    rearrange = None

CLASSES, DIM, HEADS, DEPTH = 7, 48, 3, 4


class Columnar(nn.Module):
    """Patch embedding, class token, blocks (a `Sequential`, or one module), norm, head."""

    def __init__(self, body: nn.Module, pool: str = "cls") -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos = nn.Parameter(torch.zeros(1, 65, DIM))
        self.body = body
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)
        self.pool = pool

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        x = self.norm(self.body(x))
        return self.head(x[:, 0] if self.pool == "cls" else x.mean(dim=1))


class MultiheadBlock(nn.Module):
    """Pre-norm around `nn.MultiheadAttention`."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class Swapped(nn.Module):
    """Within, tokens change places with images (0), as torch's modules want them by default, or with features (2)."""

    def __init__(self, body: nn.Module, place: int) -> None:
        super().__init__()
        self.body, self.place = body, place

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(1, self.place)).transpose(1, self.place)


class FunctionalBlock(nn.Module):
    """softmax(Q K^T) V by hand and the MLP as functions: no attention and no MLP child."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(batch, tokens, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) * (width // HEADS) ** -0.5, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        y = self.norm2(x)
        y = self.fc1(y)
        y = F.gelu(y)
        return x + self.fc2(y)


class LucidFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * DIM, DIM)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LucidAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.attend = nn.Softmax(dim=-1)
        self.scale = (DIM // HEADS) ** -0.5
        self.to_qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.to_out = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        if rearrange is None:
            q, k, v = (t.view(*t.shape[:2], HEADS, -1).permute(0, 2, 1, 3) for t in qkv)
        else:
            q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in qkv)
        out = torch.matmul(self.attend(torch.matmul(q, k.transpose(-1, -2)) * self.scale), v)
        out = out.permute(0, 2, 1, 3).flatten(2) if rearrange is None else rearrange(out, "b h n d -> b n (h d)")
        return self.to_out(out)


class LucidTransformer(nn.Module):
    """No block module: the residuals are in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([LucidAttention(), LucidFeedForward()]) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x


class EinsumBlock(nn.Module):
    """Attention by `torch.einsum`, heads in the weights' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv = nn.Parameter(torch.zeros(3, HEADS, DIM, DIM // HEADS))
        self.out = nn.Parameter(torch.zeros(HEADS, DIM // HEADS, DIM))
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("bnc,shcd->sbhnd", self.norm1(x), self.qkv)
        weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + torch.einsum("bihd,hdc->bic", torch.einsum("bhij,bhjd->bihd", weights, v), self.out)
        return x + self.mlp(self.norm2(x))


class SingleHeadBlock(nn.Module):
    """The textbook's: one head, keys of three dimensions, the MLP as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.out(self.attend(self.q(y), self.k(y), self.v(y)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class FoldedBlock(SingleHeadBlock):
    """Heads beside images in one dimension, as `torch.bmm` wants them, and logits by `torch.baddbmm`."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, tokens, width = q.shape
        folded = (batch * HEADS, tokens, width // HEADS)
        q, k, v = (t.reshape(batch, tokens, HEADS, -1).transpose(1, 2).reshape(folded) for t in (q, k, v))
        bias = q.new_zeros(1, tokens, tokens)
        out = torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=folded[2] ** -0.5).softmax(dim=-1), v)
        return out.view(batch, HEADS, tokens, -1).transpose(1, 2).reshape(batch, tokens, width)


class EinopsBlock(SingleHeadBlock):
    """einops in the block's own forward, which no tracer follows."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class ConvolutionBlock(nn.Module):
    """Tokens last, (B, C, N): 1-dimensional convolutions of one token in place of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, DIM), nn.BatchNorm1d(DIM)
        self.qkv, self.out = nn.Conv1d(DIM, 3 * DIM, 1), nn.Conv1d(DIM, DIM, 1)
        self.fc1, self.fc2 = nn.Conv1d(DIM, 2 * DIM, 1), nn.Conv1d(2 * DIM, DIM, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=1)
        x = x + self.out(v @ torch.softmax(k.transpose(1, 2) @ q * DIM**-0.5, dim=1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ChildrenMlp(nn.Module):
    """Calls whatever children it has, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class PlacedBlock(MultiheadBlock):
    """Is told how its tokens lie, as blocks with positions of their own are."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = ChildrenMlp()

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        assert rows * columns == x.shape[1] - 1, "tokens that do not fill the grid"
        return super().forward(x)


class Placed(nn.Module):
    """Tells its blocks the grid."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlacedBlock() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        side = int((x.shape[1] - 1) ** 0.5)
        for block in self.blocks:
            x = block(x, side, side)
        return x


def _blocks(block: type[nn.Module], pool: str = "cls") -> nn.Module:
    return Columnar(nn.Sequential(*(block() for _ in range(DEPTH))), pool)


def _encoder(norm_first: bool, batch_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, 2 * DIM, activation="gelu", batch_first=batch_first, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
    return Columnar(encoder if batch_first else Swapped(encoder, 0))


def _sequence_first() -> nn.Module:
    return Columnar(Swapped(nn.Sequential(*(MultiheadBlock(batch_first=False) for _ in range(DEPTH))), 0))


_SWIN = {"patch_size": [2, 2], "embed_dim": 16, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 4, 8]}
_SWIN = {**_SWIN, "window_size": [4, 4], "num_classes": CLASSES}

TORCH: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "torchvision-vit": (partial(VisionTransformer, 32, 4, DEPTH, HEADS, DIM, 2 * DIM, num_classes=CLASSES), 32),
    "torchvision-swin": (partial(SwinTransformer, **_SWIN), 64),
    "torchvision-swin-v2": (
        partial(SwinTransformer, **_SWIN, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        64,
    ),
    "plain-multihead": (partial(_blocks, MultiheadBlock), 32),
    "plain-encoder-prenorm": (partial(_encoder, True), 32),
    "plain-encoder-postnorm": (partial(_encoder, False), 32),
    "plain-multihead-sequence-first": (_sequence_first, 32),
    "plain-encoder-prenorm-sequence-first": (partial(_encoder, True, False), 32),
    "plain-encoder-postnorm-sequence-first": (partial(_encoder, False, False), 32),
    "plain-functional": (partial(_blocks, FunctionalBlock, "mean"), 32),
    "plain-lucid": (lambda: Columnar(LucidTransformer()), 32),
    "plain-einsum": (partial(_blocks, EinsumBlock), 32),
    "plain-single-head": (partial(_blocks, SingleHeadBlock), 32),
    "plain-folded-heads": (partial(_blocks, FoldedBlock), 32),
    "plain-tokens-last": (
        lambda: Columnar(Swapped(nn.Sequential(*(ConvolutionBlock() for _ in range(DEPTH))), 2), "mean"),
        32,
    ),
    "plain-placed": (lambda: Columnar(Placed()), 32),
}
if rearrange is not None:
    TORCH["plain-einops"] = (partial(_blocks, EinopsBlock), 32)
