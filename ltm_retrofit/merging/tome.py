"""The published baseline."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.matching import TINY, SimilarityMask, lifted, partition, pick, split, take, unmerge_macs
from ltm_retrofit.merging.methods import Keys, Method, Place, Scope
from ltm_retrofit.merging.tokens import Merged, Step


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


def _build(place: Place, keys: Keys) -> nn.Module:
    # in FLOW it reads the block's keys at each forward pass, as published; an MLP has none to read
    own = keys.weight if place.scope == Scope.LOCAL else None
    return ToMeMask(place.dim, place.tokens_in, place.tokens_out, place.prefix, own)


def _macs(place: Place) -> int:
    _, _, sources, destinations = partition(place.tokens_in, place.tokens_out, place.prefix)
    return place.groups * ((sources + destinations) * place.dim + sources * destinations) * place.key_dim


METHOD = Method("tome", 1, (Scope.FLOW, Scope.LOCAL), _build, _macs, unmerge_macs)
