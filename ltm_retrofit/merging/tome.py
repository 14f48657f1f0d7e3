"""``"tome"``: the published baseline, with nothing to learn.

Bolya et al., *Token Merging: Your ViT but faster* (ICLR 2023): each token that leaves joins the one destination that is
most like it, and a merged token is the mean of its original tokens. Equal to the paper to the last digit, given the
conditions at the end of the list in ``docs/method.md``, "The mask module".
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.matching import SimilarityMask, lifted, partition, take, unmerge_macs
from ltm_retrofit.merging.methods import Keys, Method, Place, Scope
from ltm_retrofit.merging.rounds import add_at
from ltm_retrofit.merging.tokens import TINY, Merge, Merged


class ToMeMask(SimilarityMask):
    """Hard assignment to the most similar destination, size-weighted mean.

    Args:
        dim: width D of the tokens.
        tokens_in: N.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.
        own_key: a key map ``(d, D)`` of its own, where no block has one to give.
    """

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
        key: Keys | None = None,
        cells: int = 1,
        padded: bool = False,
    ) -> Merged:
        """Merge by the block's present keys, or by its own where none are given. Arguments: see `Mask`."""
        if key is None:
            assert self.own_key is not None
            key = Keys(self.own_key)
        counts, (weight, bias) = self.counts(tokens), key
        with full_precision(tokens):
            keys = F.linear(inner[:, self.prefix :].to(weight.dtype), weight, bias)
            leaving, staying, similarity = self.select(lifted(keys), counts, sizes if padded else None)
            target = take(similarity, leaving).argmax(dim=-1)  # W is one-hot
            sizes = similarity.new_ones(tokens.shape[:2]) if sizes is None else sizes
            source, destination = self.halves(tokens, counts)
            source_size, size = self.halves(sizes, counts)
            # Rows are added, not multiplied out: that is why merging costs no MAC here.
            brought = take(source_size, leaving)
            new_size = size.scatter_add(1, target, brought)
            weighted = take(source, leaving) * brought.unsqueeze(-1).to(tokens.dtype)
            summed = destination * size.unsqueeze(-1).to(tokens.dtype)
            merged = add_at(summed, target, weighted) / new_size.clamp_min(TINY).unsqueeze(-1).to(tokens.dtype)
            weights = F.one_hot(target, counts.partition.destinations).to(similarity.dtype)
        return Merged(
            self.together(tokens, source, staying, merged),
            self.together(sizes, source_size, staying, new_size),
            Merge(self.assignment(leaving, staying, weights, counts)),
        )


def _build(place: Place, keys: Keys) -> nn.Module:
    # As published, it follows the block's keys while these are fine-tuned. An MLP has none to follow.
    own = keys.weight if place.scope == Scope.LOCAL else None
    return ToMeMask(place.dim, place.tokens_in, place.tokens_out, place.prefix, own)


def _macs(place: Place) -> int:
    """``(N·D + |A|·|B|)·d`` in each cell, N without prefix tokens: keys, and similarities of sources A and B."""
    _, _, sources, destinations = partition(place.tokens_in, place.tokens_out, place.prefix)
    return place.cells * ((sources + destinations) * place.dim + sources * destinations) * place.key_dim


METHOD = Method("tome", 1, (Scope.FLOW, Scope.LOCAL), _build, _macs, unmerge_macs)
