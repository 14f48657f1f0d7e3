"""``"pool"``: average pooling to any count, with nothing to learn; and the boxes that every mask of a map uses.

N equal boxes in a line and P equal boxes over the same line: each output token is the mean of the input tokens whose
boxes its own box overlaps, weighed by how much. On a map the same holds for height and width (``docs/method.md``,
"Grid sites"). PyTorch's adaptive pooling will not do: at 14 → 12 some tokens weigh twice as much as others.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from ltm_retrofit.merging.methods import SCOPES, Grid, Keys, Method, Place
from ltm_retrofit.merging.rounds import check_counts
from ltm_retrofit.merging.tokens import GridAssignment, Mask, Merge, Merged, dense_unmerge_macs, fixed, merge_by


def overlaps(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return which of ``size`` boxes each of ``count`` equal boxes overlaps, and by how much of itself.

    Returns:
        ``index (count, k)`` int64 and ``share (count, k)`` float64, rows summing to one. Where fewer than k overlap,
        the rest have index and share 0.
    """
    # In units of 1/count box p is [p·size, (p + 1)·size) and box j is [j·count, (j + 1)·count): whole numbers, so that
    # nothing is rounded before the last division and two boxes that only touch never overlap by 1e-17.
    width = max(ceil((p + 1) * size / count) - (p * size) // count for p in range(count))
    start = torch.arange(count).unsqueeze(1) * size
    index = start // count + torch.arange(width)
    common = torch.minimum(start + size, (index + 1) * count) - torch.maximum(start, index * count)
    meets = (common > 0) & (index < size)
    return torch.where(meets, index, 0), torch.where(meets, common, 0).double() / size


def grid_overlaps(grid: Grid, grid_out: Grid) -> tuple[Tensor, Tensor]:
    """`overlaps` of height and width: ``index (P, k)`` into the H·W tokens, line by line, and ``share (P, k)``.

    A mask on a grid so has ``P·k`` entries and not ``N·P``: k is 9 where fewer than half of height and width go.
    """
    (lines, line_share), (columns, column_share) = overlaps(grid[0], grid_out[0]), overlaps(grid[1], grid_out[1])
    index = lines[:, None, :, None] * grid[1] + columns[None, :, None, :]
    share = line_share[:, None, :, None] * column_share[None, :, None, :]
    places = grid_out[0] * grid_out[1]
    return index.reshape(places, -1), share.reshape(places, -1)


def grid_at(grid: Grid, planned: Grid, grid_out: Grid) -> Grid:
    """Return the output grid for an input ``grid`` where ``planned`` → ``grid_out`` was planned: the same share."""
    if grid == planned:
        return grid_out
    height, width = (max(1, ceil(size * k / p)) for size, p, k in zip(grid, planned, grid_out, strict=True))
    return height, width


def gathered(tokens: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """``Gᵀ z`` from its few entries: ``(B, N, D)`` tokens, index ``(P, k)``, mask ``(B, P, k)`` → ``(B, P, D)``."""
    return torch.matmul(mask.unsqueeze(2), tokens[:, index]).squeeze(2)


class PoolGrid(Mask):
    """Average pooling of a map, ``G = K``: the exact fractional overlap of the boxes.

    Args:
        dim: width D of the tokens.
        grid: (H, W) as planned; at another size the same shares of height and width are kept.
        grid_out: (H', W').
    """

    index: Tensor
    share: Tensor

    def __init__(self, dim: int, grid: Grid, grid_out: Grid) -> None:
        super().__init__(grid[0] * grid[1], grid_out[0] * grid_out[1])
        self.dim, self.grid, self.grid_out = dim, grid, grid_out
        index, share = grid_overlaps(grid, grid_out)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("share", share.float(), persistent=False)

    def extra_repr(self) -> str:
        """Say what the module does in a printed model."""
        return f"{self.grid[0]}×{self.grid[1]} → {self.grid_out[0]}×{self.grid_out[1]} tokens"

    def boxes(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Grid]:
        """Return index and share ``(P, k)`` for this grid, and the grid that comes out."""
        if grid == self.grid:
            return self.index, self.share, self.grid_out
        grid_out = grid_at(grid, self.grid, self.grid_out)
        index, share = grid_overlaps(grid, grid_out)
        return index.to(tokens.device), share.to(tokens.device, torch.float32), grid_out

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Merge]:
        """Pool ``(B, H·W, D)`` tokens that lie line by line on ``grid``."""
        index, share, grid_out = self.boxes(tokens, grid)
        mask = share.expand(tokens.shape[0], -1, -1)
        merge = Merge(GridAssignment(index, mask, tokens.shape[1]))
        return gathered(tokens, index, mask.to(tokens.dtype)), grid_out, merge


class PoolMask(Mask):
    """Average pooling of a sequence: each output token is the mean of an equal stretch of the patch tokens.

    Args:
        tokens_in: N.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.
    """

    matrix: Tensor

    def __init__(self, tokens_in: int, tokens_out: int, prefix: int) -> None:
        super().__init__(tokens_in, tokens_out, prefix)
        self.register_buffer("matrix", _pooling(tokens_in, tokens_out, prefix), persistent=False)

    def forward(self, inner: Tensor, tokens: Tensor, sizes: Tensor | None, *_: object, **__: object) -> Merged:
        """Pool: every output token stands for as many as it holds. Arguments: see `Mask`."""
        matrix, count = self.matrix, fixed(tokens.shape[1])
        if count != self.tokens_in:
            matrix = _pooling(count, self.kept_at(count), self.prefix).to(tokens.device)
        return merge_by(matrix, tokens, sizes)


def _pooling(tokens_in: int, tokens_out: int, prefix: int) -> Tensor:
    """Return W ``(N, P)`` of average pooling: rows sum to one, prefix tokens stay."""
    index, share = overlaps(tokens_in - prefix, tokens_out - prefix)
    patches = torch.zeros(tokens_out - prefix, tokens_in - prefix, dtype=share.dtype).scatter_add(1, index, share).T
    matrix = torch.eye(tokens_in, tokens_out)
    matrix[prefix:, prefix:] = patches / patches.sum(dim=1, keepdim=True)
    return matrix


def _build(place: Place, keys: Keys) -> nn.Module:
    if place.grid is not None and place.grid_out is not None:
        return PoolGrid(place.dim, place.grid, place.grid_out)
    return PoolMask(place.tokens_in, place.tokens_out, place.prefix)


def _macs(place: Place) -> int:
    """``P·k·D`` on a map, of whose P boxes each meets k others; ``N·P·(D + 1)`` in each cell: tokens and sizes."""
    if place.grid is not None and place.grid_out is not None:
        return grid_overlaps(place.grid, place.grid_out)[0].numel() * place.dim
    check_counts(place.tokens_in, place.tokens_out, place.prefix)
    return place.cells * place.tokens_in * place.tokens_out * (place.dim + 1)


METHOD = Method("pool", 1, SCOPES, _build, _macs, dense_unmerge_macs)
