"""``"tome"``: the published baseline, with nothing to learn.

Bolya et al., *Token Merging: Your ViT but faster* (ICLR 2023), here for any number of prefix tokens and any keep ratio.
Patch tokens split into *sources*, which may leave, and *destinations*, which never do. The r = N − P sources that are
most like a destination leave; each joins the one that is most like it, and a merged token is the mean of its original
tokens. Comparing two halves costs a quarter of comparing all with all, and no token can both leave and be joined, so
one pass suffices. Equal to the paper to the last digit, given the conditions in ``docs/method.md``, "The mask module".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision, lifted
from ltm_retrofit.merging.methods import Keys, Method, Place, Scope
from ltm_retrofit.merging.rounds import PADDING, add_at, check_counts, rows_at
from ltm_retrofit.merging.tokens import TINY, Assignment, Mask, Merge, Merged, fixed


class Partition(NamedTuple):
    """How patch tokens split: every ``stride``-th from ``offset`` on is a destination; 2 is ToMe's even / odd."""

    stride: int
    offset: int
    sources: int
    destinations: int


def partition(tokens_in: int, tokens_out: int, prefix: int) -> Partition:
    """Choose the destinations so that ``tokens_in − tokens_out`` sources can leave.

    Destinations are the odd absolute positions, as in ToMe; where fewer than half of the patch tokens shall remain,
    every k-th patch instead.

    Raises:
        CountError: where the counts cannot be, with the range that can.
    """
    patches, remain = tokens_in - prefix, tokens_out - prefix
    check_counts(tokens_in, tokens_out, prefix)
    stride, offset = 2, (1 - prefix) % 2
    if len(range(offset, patches, stride)) > remain or patches < 2:
        stride, offset = math.ceil(patches / remain), 0
    destinations = len(range(offset, patches, stride))
    return Partition(stride, offset, patches - destinations, destinations)


class Counts(NamedTuple):
    """What a mask does with one token count: N in, P out, the partition, and where the sources lie among patches."""

    tokens_in: int
    tokens_out: int
    partition: Partition
    sources: Tensor


def sources_of(patches: int, chosen: Partition) -> Tensor:
    """Return the positions of the sources among the patch tokens."""
    destinations = range(chosen.offset, patches, chosen.stride)
    return torch.tensor([place for place in range(patches) if place not in destinations], dtype=torch.int64)


def split(patches: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
    """Split along dimension 1 into sources and destinations."""
    offset, stride = counts.partition.offset, counts.partition.stride
    if stride == 2:  # a view instead of a copy
        return patches[:, 1 - offset :: 2], patches[:, offset::2]
    return patches.index_select(1, counts.sources), patches[:, offset::stride]


class ToMeMask(Mask):
    """Hard assignment to the most similar destination, size-weighted mean.

    Args:
        dim: width D of the tokens.
        tokens_in: N, as planned; at another N the same share of the patch tokens is kept.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.
        own_key: a key map ``(d, D)`` of its own, where no block has one to give.
    """

    wants_key = True
    own_key: Tensor | None
    source_positions: Tensor

    def __init__(self, dim: int, tokens_in: int, tokens_out: int, prefix: int, own_key: Tensor | None = None) -> None:
        super().__init__(tokens_in, tokens_out, prefix)
        self.dim = dim
        self.partition = partition(tokens_in, tokens_out, prefix)
        self.register_buffer("source_positions", sources_of(tokens_in - prefix, self.partition), persistent=False)
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
            # written out: torch's one_hot looks at values, which torch.func.vmap refuses under gradients
            places = torch.arange(counts.partition.destinations, device=target.device)
            weights = (target.unsqueeze(-1) == places).to(similarity.dtype)
        return Merged(
            self.together(tokens, source, staying, merged),
            self.together(sizes, source_size, staying, new_size),
            Merge(self.assignment(leaving, staying, weights, counts)),
        )

    def counts(self, tokens: Tensor) -> Counts:
        """Return what to do with ``(B, N, D)`` tokens; P scales with N where N is not the planned one.

        Raises:
            CountError: where there is no patch token.
        """
        count = fixed(tokens.shape[1])
        kept = self.kept_at(count)
        if count == self.tokens_in:
            return Counts(count, kept, self.partition, self.source_positions)
        split = partition(count, kept, self.prefix)
        return Counts(count, kept, split, sources_of(count - self.prefix, split).to(tokens.device))

    def halves(self, whole: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
        """Split all N tokens, or their sizes, into sources and destinations; prefix tokens are neither."""
        return split(whole[:, self.prefix :], counts)

    def select(self, keys: Tensor, counts: Counts, sizes: Tensor | None = None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Select the sources that leave: those whose most similar destination is the most similar of all.

        Args:
            keys: ``(B, patches, d)``, of any length.
            counts: what to do with this many tokens.
            sizes: ``(B, N)`` where some tokens are padding: those leave first, and nobody joins them.

        Returns:
            positions among the sources of those that leave ``(B, r)``, or None where all leave; of those that stay
            ``(B, sources − r)``, ascending; and the similarities of all sources to all destinations ``(B, sources,
            destinations)``.
        """
        # Normalised, because the angle says what a token shows and the length how much the attention would weigh it:
        # by products of plain keys the longest would attract all others.
        source, destination = split(F.normalize(keys, dim=-1), counts)
        similarity = torch.bmm(source, destination.transpose(1, 2))
        if sizes is not None:  # −2 and 2 lie outside of what a cosine can be
            leaves_first, joined_by_none = (size <= PADDING for size in self.halves(sizes, counts))
            similarity = similarity.masked_fill(joined_by_none.unsqueeze(1), -2.0)
            similarity = similarity.masked_fill(leaves_first.unsqueeze(2), 2.0)
        leave = counts.tokens_in - counts.tokens_out
        if leave == counts.partition.sources:
            return None, torch.zeros(keys.shape[0], 0, dtype=torch.int64, device=keys.device), similarity
        most = similarity.amax(dim=-1)
        # r is fixed, where a threshold would be simpler: every shape is known in advance, for compile and export.
        # Stable, so that of equal similarities (flat sky) the first leaves, on every device and at every batch size.
        if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort; its TopK takes the lower index first, as we do
            order = most.topk(most.shape[-1], dim=-1).indices
        else:
            order = most.argsort(dim=-1, descending=True, stable=True)
        # Ascending, so that those that stay keep the order of the image.
        return order[:, :leave], order[:, leave:].sort(dim=-1).values, similarity

    def together(self, whole: Tensor, source: Tensor, staying: Tensor, merged: Tensor) -> Tensor:
        """Lay prefix tokens, sources that stay, and destinations one behind the other: N entries become P."""
        return torch.cat([whole[:, : self.prefix], take(source, staying), merged], dim=1)

    def assignment(self, leaving: Tensor | None, staying: Tensor, weights: Tensor, counts: Counts) -> Assignment:
        """Turn choices among the sources into an `Assignment` over all N tokens, in the order of `together`."""
        sources = (counts.sources + self.prefix).expand(staying.shape[0], -1)
        places = torch.arange(counts.tokens_in, device=staying.device).expand(staying.shape[0], -1)
        destinations = places[:, self.prefix + counts.partition.offset :: counts.partition.stride]
        return Assignment(self.together(places, sources, staying, destinations), take(sources, leaving), weights)


def unmerge_macs(place: Place) -> int:
    """``r·|B|·D`` in each cell: every token that left is a mix of the |B| destinations, the others only move.

    Raises:
        CountError: where the counts cannot be.
    """
    destinations = partition(place.tokens_in, place.tokens_out, place.prefix).destinations
    return place.cells * (place.tokens_in - place.tokens_out) * destinations * (place.width or place.dim)


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """Gather ``(B, n, D)`` or ``(B, n)`` by positions ``(B, k)``; None takes all."""
    if index is None:
        return x
    return x.gather(1, index) if x.ndim == 2 else rows_at(x, index)


def _build(place: Place, keys: Keys) -> nn.Module:
    # As published, it follows the block's keys while these are fine-tuned. An MLP has none to follow.
    own = keys.weight if place.scope == Scope.LOCAL else None
    return ToMeMask(place.dim, place.tokens_in, place.tokens_out, place.prefix, own)


def _macs(place: Place) -> int:
    """``(N·D + |A|·|B|)·d`` in each cell, N without prefix tokens: keys, and similarities of sources A and B."""
    _, _, sources, destinations = partition(place.tokens_in, place.tokens_out, place.prefix)
    return place.cells * ((sources + destinations) * place.dim + sources * destinations) * place.key_dim


METHOD = Method("tome", 1, (Scope.FLOW, Scope.LOCAL), _build, _macs, unmerge_macs)
