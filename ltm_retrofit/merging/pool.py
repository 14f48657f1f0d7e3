"""Average pooling."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.matching import TINY, kept_at, partition
from ltm_retrofit.merging.methods import SCOPES, Grid, Keys, Method, Place
from ltm_retrofit.merging.tokens import DenseAssignment, GridAssignment, Mask, Merged, Step


def overlaps(size: int, kept: int) -> tuple[Tensor, Tensor]:
    """Return which of ``size`` boxes each of ``kept`` equal boxes overlaps, and by how much of itself.

    Exact, in whole numbers until the last division: ``index (kept, k)`` int64 and ``share (kept, k)`` float64, rows
    summing to one. Where fewer than k overlap, the rest have share 0.
    """
    width = max(ceil((p + 1) * size / kept) - (p * size) // kept for p in range(kept))
    index, share = torch.zeros(kept, width, dtype=torch.int64), torch.zeros(kept, width, dtype=torch.float64)
    for p in range(kept):  # in units of 1/kept: box p is [p·size, (p + 1)·size), box j is [j·kept, (j + 1)·kept)
        for place in range(width):
            j = (p * size) // kept + place
            common = min((p + 1) * size, (j + 1) * kept) - max(p * size, j * kept)
            if j < size and common > 0:
                index[p, place], share[p, place] = j, common / size
    return index, share


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


class PoolGrid(Mask):
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


def gathered(tokens: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """``Gᵀ z`` from its few entries: ``(B, N, D)`` tokens, index ``(P, k)``, mask ``(B, P, k)`` → ``(B, P, D)``."""
    return torch.matmul(mask.unsqueeze(2), tokens[:, index]).squeeze(2)


class PoolMask(Mask):
    """Average pooling to the same counts: each output token is the mean of an equal stretch of the patch tokens."""

    matrix: Tensor

    def __init__(self, tokens_in: int, tokens_out: int, prefix: int) -> None:
        super().__init__()
        self.tokens_in, self.tokens_out, self.prefix = tokens_in, tokens_out, prefix
        self.register_buffer("matrix", _pooling(tokens_in, tokens_out, prefix), persistent=False)

    def forward(
        self,
        inner: Tensor,
        tokens: Tensor,
        sizes: Tensor | None,
        key: tuple[Tensor, Tensor | None] | None = None,
        groups: int = 1,
        padded: bool = False,
    ) -> Merged:
        """Pool; every output token stands for as many as it holds."""
        batch, count = tokens.shape[0], int(tokens.shape[1])
        matrix = self.matrix
        if count != self.tokens_in:
            matrix = _pooling(count, kept_at(count, self.tokens_in, self.tokens_out, self.prefix), self.prefix)
            matrix = matrix.to(tokens.device)
        with full_precision(tokens):
            sizes = matrix.new_ones(batch, count) if sizes is None else sizes.to(matrix.dtype)
            merged_sizes = torch.matmul(sizes, matrix).clamp_min(TINY)
            weighted = (sizes.unsqueeze(-1) * matrix / merged_sizes.unsqueeze(1)).to(tokens.dtype)
            merged = torch.matmul(weighted.transpose(1, 2), tokens)
        kept = matrix.argmax(dim=0).expand(batch, -1)
        return Merged(merged, merged_sizes, Step(DenseAssignment(kept, matrix), None))


def _pooling(tokens_in: int, tokens_out: int, prefix: int) -> Tensor:
    """Return W ``(N, P)`` of average pooling: rows sum to one, prefix tokens stay."""
    index, share = overlaps(tokens_in - prefix, tokens_out - prefix)
    patches = torch.zeros(tokens_out - prefix, tokens_in - prefix, dtype=share.dtype).scatter_add(1, index, share).T
    matrix = torch.zeros(tokens_in, tokens_out)
    matrix[:prefix, :prefix] = torch.eye(prefix)
    matrix[prefix:, prefix:] = patches / patches.sum(dim=1, keepdim=True)
    return matrix


def _build(place: Place, keys: Keys) -> nn.Module:
    if place.grid is not None and place.kept is not None:
        return PoolGrid(place.dim, place.grid, place.kept)
    return PoolMask(place.tokens_in, place.tokens_out, place.prefix)


def _macs(place: Place) -> int:
    if place.grid is not None and place.kept is not None:
        return grid_overlaps(place.grid, place.kept)[0].numel() * place.dim
    partition(place.tokens_in, place.tokens_out, place.prefix)
    return place.groups * place.tokens_in * place.tokens_out * (place.dim + 1)


def _unmerge_macs(place: Place) -> int:
    return place.groups * place.tokens_in * place.tokens_out * (place.width or place.dim)


METHOD = Method("pool", 1, SCOPES, _build, _macs, _unmerge_macs)
