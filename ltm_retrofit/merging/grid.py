"""Masks on a grid: H×W tokens in, H'×W' out (METHOD, "Grid sites").

Each output token gathers the few input tokens whose boxes its own box overlaps, so a mask has ``P·k`` entries, not
``N·P``: ``k`` is 9 where fewer than half of rows and columns go.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.mask import lifted
from ltm_retrofit.merging.overlap import overlaps
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import GridAssignment, Step

Grid = tuple[int, int]


def grid_overlaps(grid: Grid, kept: Grid) -> tuple[Tensor, Tensor]:
    """`overlaps` of both dimensions: ``index (P, k)`` into the H·W tokens, row by row, and ``share (P, k)``."""
    (rows, row_share), (columns, column_share) = overlaps(grid[0], kept[0]), overlaps(grid[1], kept[1])
    index = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    share = row_share[:, None, :, None] * column_share[None, :, None, :]
    places = kept[0] * kept[1]
    return index.reshape(places, -1), share.reshape(places, -1)


def grid_at(grid: Grid, planned: Grid, kept: Grid) -> Grid:
    """Return the output grid for an input ``grid`` where ``planned`` → ``kept`` was planned: the same share."""
    if grid == planned:
        return kept
    return tuple(max(1, ceil(size * k / p)) for size, p, k in zip(grid, planned, kept, strict=True))  # type: ignore[return-value]


def grid_macs(method: str, dim: int, key_dim: int, grid: Grid, kept: Grid, classes: int, clusters: int) -> int:
    """Return the multiply-adds of one grid mask for one image."""
    places, width = grid_overlaps(grid, kept)[0].shape
    if method == "slice":
        return 0
    if method == "pool":
        return int(places * width * dim)
    tokens = grid[0] * grid[1]
    keys = tokens * dim * key_dim + places * width * key_dim
    return int(keys + places * width * dim + 2 * tokens * dim + 2 * clusters * (dim + classes))


class PoolGrid(nn.Module):
    """Average pooling to the same counts: the exact fractional overlap of the boxes, nothing learned."""

    index: Tensor
    share: Tensor

    def __init__(self, dim: int, grid: Grid, kept: Grid) -> None:
        super().__init__()
        self.dim, self.grid, self.kept = dim, grid, kept
        index, share = grid_overlaps(grid, kept)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("share", share.float(), persistent=False)

    def extra_repr(self) -> str:
        """Say what the module does in a printed model."""
        return f"{self.grid[0]}×{self.grid[1]} → {self.kept[0]}×{self.kept[1]} tokens"

    def boxes(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
        """Return index and share ``(P, k)`` for this grid, and the grid that comes out."""
        if grid == self.grid:
            return self.index, self.share, self.kept
        kept = grid_at(grid, self.grid, self.kept)
        index, share = grid_overlaps(grid, kept)
        return index.to(tokens.device), share.to(tokens.device, torch.float32), kept

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Step]:
        """Pool ``(B, H·W, D)`` tokens that lie row by row on ``grid``."""
        index, share, kept = self.boxes(tokens, grid)
        merged = gathered(tokens, index, share.to(tokens.dtype).expand(tokens.shape[0], -1, -1))
        return merged, kept, Step(GridAssignment(index, share.expand(tokens.shape[0], -1, -1), tokens.shape[1]), None)


class CropGrid(PoolGrid):
    """Keep the upper left H'×W' tokens: the free lower limit, for measuring."""

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Step]:
        """Crop ``(B, H·W, D)`` tokens that lie row by row on ``grid``."""
        index, share, kept = self.boxes(tokens, grid)
        cropped = tokens.view(tokens.shape[0], *grid, self.dim)[:, : kept[0], : kept[1]].flatten(1, 2)
        return cropped, kept, Step(GridAssignment(index, share.expand(tokens.shape[0], -1, -1), tokens.shape[1]), None)


class GridMask(PoolGrid):
    """A learnable mask on a grid: ``G_jp ∝ K_jp exp(α cos(k_j, Σ_l K_lp k_l) + ε_j)``, columns summing to one.

    K is the exact fractional overlap of the boxes; α starts from 0, where the mask is K itself.

    Args:
        dim: width D of the tokens.
        key_dim: width d of the keys.
        grid: (H, W) as planned; at another size the same shares of rows and columns are kept.
        kept: (H', W').
        classes: C, of the statistics that the information-bottleneck step uses.
        clusters: A, likewise.
    """

    def __init__(self, dim: int, key_dim: int, grid: Grid, kept: Grid, classes: int, clusters: int = 64) -> None:
        super().__init__(dim, grid, kept)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.eta = nn.Parameter(torch.zeros(()))
        self.statistics = Statistics(dim, classes, clusters)

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Step]:
        """Merge ``(B, H·W, D)`` tokens that lie row by row on ``grid``."""
        index, share, kept = self.boxes(tokens, grid)
        batch, count = tokens.shape[:2]
        with full_precision(tokens):
            z = lifted(tokens)
            keys = lifted(self.key(tokens.to(self.key.weight.dtype)))
            near = keys[:, index]  # (B, P, k, d)
            share = share.to(z.dtype)
            centre = torch.matmul(share.unsqueeze(1), near)  # (B, P, 1, d)
            alike = F.cosine_similarity(near, centre, dim=-1)
            logits = share.log() + self.alpha.to(z.dtype) * alike  # −∞ where boxes do not overlap
            start = logits.softmax(dim=-1)
            weight = z.new_zeros(batch, count).scatter_add(1, index.flatten().expand(batch, -1), start.flatten(1))
            descriptor, tilt = self.descend(z, weight / len(index))
            mask = (logits + tilt[:, index]).softmax(dim=-1)
            merged = gathered(tokens, index, mask.to(tokens.dtype))
        return merged, kept, Step(GridAssignment(index, mask, count), descriptor)

    def descend(self, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One exponentiated-gradient step on the bound: the descriptor ``(B, D)`` and ε ``(B, N)`` (METHOD, item 5)."""
        v = F.layer_norm(z, z.shape[-1:])
        descriptor = torch.matmul(weight.unsqueeze(1), v).squeeze(1)
        gradient = self.statistics.step_direction(descriptor).to(z.dtype)
        zeta = torch.matmul(v, gradient.unsqueeze(-1)).squeeze(-1)
        deviation = zeta.detach().std(dim=1, keepdim=True, correction=0)
        return descriptor, self.eta.to(z.dtype) * (zeta.mean(dim=1, keepdim=True) - zeta) / (deviation + 1e-6)


def gathered(tokens: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """``Gᵀ z`` from its few entries: ``(B, N, D)`` tokens, index ``(P, k)``, mask ``(B, P, k)`` → ``(B, P, D)``."""
    return torch.matmul(mask.unsqueeze(2), tokens[:, index]).squeeze(2)
