"""What a learnable mask is compared with: published token merging, and a plain slice."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.mask import Merged, SimilarityMask, check_count, lifted, pick, take
from ltm_retrofit.merging.tokens import Assignment, Step


class ToMeMask(SimilarityMask):
    """The published baseline, parameter-free: hard assignment to the most similar destination, size-weighted mean."""

    wants_key = True

    def forward(
        self, inner: Tensor, tokens: Tensor, sizes: Tensor | None, key: tuple[Tensor, Tensor | None] | None = None
    ) -> Merged:
        """Merge as `MaskModule` does, by the block's present keys: ``key`` is their ``(weight, bias)``, head mean."""
        assert key is not None
        check_count(tokens, self.tokens_in)
        with full_precision(tokens):
            weight, bias = key
            keys = F.linear(inner[:, self.prefix :].to(weight.dtype), weight, bias)
            leaving, staying, similarity = self.choose(lifted(keys))
            target = similarity.argmax(dim=-1)
            sizes = similarity.new_ones(tokens.shape[:2]) if sizes is None else sizes
            source, destination = self.split(tokens[:, self.prefix :])
            source_size, size = self.split(sizes[:, self.prefix :])
            brought = pick(source_size, leaving)
            new_size = size.scatter_add(1, target, brought)
            summed = (destination * size.unsqueeze(-1).to(tokens.dtype)).scatter_add(
                1,
                target.unsqueeze(-1).expand(-1, -1, self.dim),
                take(source, leaving) * brought.unsqueeze(-1).to(tokens.dtype),
            )
            merged = summed / new_size.unsqueeze(-1).to(tokens.dtype)
            out = torch.cat([tokens[:, : self.prefix], take(source, staying), merged], dim=1)
            out_sizes = torch.cat([sizes[:, : self.prefix], pick(source_size, staying), new_size], dim=1)
            weights = F.one_hot(target, self.partition.destinations).to(similarity.dtype)
        return Merged(out, out_sizes, Step(self.assignment(leaving, staying, weights), None))


class SliceMask(nn.Module):
    """Keep the first P tokens: the free lower limit, for measuring."""

    wants_key = False

    def __init__(self, tokens_in: int, tokens_out: int) -> None:
        super().__init__()
        self.tokens_in, self.tokens_out = tokens_in, tokens_out

    def forward(
        self, inner: Tensor, tokens: Tensor, sizes: Tensor | None, key: tuple[Tensor, Tensor | None] | None = None
    ) -> Merged:
        """Keep the first P tokens; unmerging gives every lost token the last kept one."""
        check_count(tokens, self.tokens_in)
        kept, batch = tokens[:, : self.tokens_out], tokens.shape[0]
        places = torch.arange(self.tokens_in, device=tokens.device).expand(batch, -1)
        weights = tokens.new_ones(batch, self.tokens_in - self.tokens_out, 1)
        assignment = Assignment(places[:, : self.tokens_out], places[:, self.tokens_out :], weights)
        return Merged(kept, torch.ones_like(kept[..., 0]), Step(assignment, None))
