"""What a learnable mask is compared with: published token merging, and a plain slice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.mask import TINY, Merged, SimilarityMask, lifted, pick, take
from ltm_retrofit.merging.overlap import overlaps
from ltm_retrofit.merging.partition import kept_at, split
from ltm_retrofit.merging.tokens import Assignment, DenseAssignment, Step


class ToMeMask(SimilarityMask):
    """The published baseline, parameter-free: hard assignment to the most similar destination, size-weighted mean."""

    wants_key = True
    own_key: Tensor | None

    def __init__(self, dim: int, tokens_in: int, tokens_out: int, prefix: int, own_key: Tensor | None = None) -> None:
        super().__init__(dim, tokens_in, tokens_out, prefix)
        self.register_buffer("own_key", own_key)

    def forward(
        self,
        inner: Tensor,
        tokens: Tensor,
        sizes: Tensor | None,
        key: tuple[Tensor, Tensor | None] | None = None,
        groups: int = 1,
        padded: bool = False,
    ) -> Merged:
        """Merge as `MaskModule` does, by the block's present keys: ``key`` is their ``(weight, bias)``, head mean.

        Without them by a key map of its own, which an MLP's mask has.
        """
        if key is None:
            assert self.own_key is not None
            key = self.own_key, None
        counts = self.counts(tokens)
        with full_precision(tokens):
            weight, bias = key
            keys = F.linear(inner[:, self.prefix :].to(weight.dtype), weight, bias)
            leaving, staying, similarity = self.choose(lifted(keys), counts, self.valid(sizes, padded))
            target = take(similarity, leaving).argmax(dim=-1)
            sizes = similarity.new_ones(tokens.shape[:2]) if sizes is None else sizes
            source, destination = split(tokens[:, self.prefix :], counts)
            source_size, size = split(sizes[:, self.prefix :], counts)
            brought = pick(source_size, leaving)
            new_size = size.scatter_add(1, target, brought)
            summed = (destination * size.unsqueeze(-1).to(tokens.dtype)).scatter_add(
                1,
                target.unsqueeze(-1).expand(-1, -1, self.dim),
                take(source, leaving) * brought.unsqueeze(-1).to(tokens.dtype),
            )
            merged = summed / new_size.clamp_min(TINY).unsqueeze(-1).to(tokens.dtype)
            out = torch.cat([tokens[:, : self.prefix], take(source, staying), merged], dim=1)
            out_sizes = torch.cat([sizes[:, : self.prefix], pick(source_size, staying), new_size], dim=1)
            weights = F.one_hot(target, counts.partition.destinations).to(similarity.dtype)
        return Merged(out, out_sizes, Step(self.assignment(leaving, staying, weights, counts), None))


class SliceMask(nn.Module):
    """Keep the first P tokens: the free lower limit, for measuring."""

    wants_key = False

    def __init__(self, tokens_in: int, tokens_out: int, prefix: int = 0) -> None:
        super().__init__()
        self.tokens_in, self.tokens_out, self.prefix = tokens_in, tokens_out, prefix

    def forward(
        self,
        inner: Tensor,
        tokens: Tensor,
        sizes: Tensor | None,
        key: tuple[Tensor, Tensor | None] | None = None,
        groups: int = 1,
        padded: bool = False,
    ) -> Merged:
        """Keep the first P tokens; unmerging gives every lost token the last kept one."""
        batch, count = tokens.shape[0], int(tokens.shape[1])
        stay = self.tokens_out
        if count != self.tokens_in:
            stay = kept_at(count, self.tokens_in, self.tokens_out, self.prefix)
        kept = tokens[:, :stay]
        places = torch.arange(count, device=tokens.device).expand(batch, -1)
        weights = tokens.new_ones(batch, count - stay, 1)
        assignment = Assignment(places[:, :stay], places[:, stay:], weights)
        return Merged(kept, torch.ones_like(kept[..., 0]), Step(assignment, None))


class PoolMask(nn.Module):
    """Average pooling to the same counts: each output token is the mean of an equal stretch of the patch tokens."""

    wants_key = False
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
