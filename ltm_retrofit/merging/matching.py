"""How N tokens split into sources that may leave and destinations, at any N, and what a mask costs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ltm_retrofit.errors import CountError
from ltm_retrofit.merging.methods import Place
from ltm_retrofit.merging.tokens import Assignment, Mask

#: far below the size of any token, and no zero
TINY = 1e-12
#: above what nothing but filling adds up to
FILLING = 1e-6


class Partition(NamedTuple):
    """How the patch tokens split into sources and destinations; ``stride`` 2 is ToMe's even / odd."""

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
    if not 1 <= remain <= patches:
        raise CountError(
            f"cannot merge {tokens_in} tokens, {prefix} of them prefix tokens, into {tokens_out}: "
            f"choose {prefix + 1} to {tokens_in}"
        )
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


def kept_at(count: int, tokens_in: int, tokens_out: int, prefix: int) -> int:
    """Return P for ``count`` tokens where ``tokens_out`` of ``tokens_in`` were planned: the same share of patches."""
    return prefix + max(1, round((count - prefix) * (tokens_out - prefix) / (tokens_in - prefix)))


def sources_of(patches: int, chosen: Partition) -> Tensor:
    """Return the positions of the sources among the patch tokens."""
    destination = torch.zeros(patches, dtype=torch.bool)
    destination[chosen.offset :: chosen.stride] = True
    return torch.arange(patches)[~destination]


def split(patches: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
    """Split along dimension 1 into sources and destinations."""
    offset, stride = counts.partition.offset, counts.partition.stride
    if stride == 2:  # a view instead of a copy
        return patches[:, 1 - offset :: 2], patches[:, offset::2]
    return patches.index_select(1, counts.sources), patches[:, offset::stride]


class SimilarityMask(Mask):
    """What the learnable mask and the published baseline share: who merges, by cosine similarity of keys.

    Args:
        dim: width D of the tokens.
        tokens_in: N, as planned; at another N the same share of the patch tokens is kept.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.
    """

    #: how much of the way from N to P is gone: a fine-tune may begin with all tokens
    reached = 1.0
    source_positions: Tensor

    def __init__(self, dim: int, tokens_in: int, tokens_out: int, prefix: int) -> None:
        super().__init__()
        self.dim, self.tokens_in, self.tokens_out, self.prefix = dim, tokens_in, tokens_out, prefix
        self.partition = partition(tokens_in, tokens_out, prefix)
        self.register_buffer("source_positions", sources_of(tokens_in - prefix, self.partition), persistent=False)

    def extra_repr(self) -> str:
        """Say what the module does in a printed model."""
        return f"{self.tokens_in} → {self.tokens_out} tokens, {self.prefix} prefix"

    def counts(self, tokens: Tensor) -> Counts:
        """Return what to do with ``(B, N, D)`` tokens; P scales with N where N is not the planned one.

        Raises:
            CountError: where there is no patch token.
        """
        count = int(tokens.shape[1])  # a tensor while it is traced
        if count == self.tokens_in and self.reached == 1:
            return Counts(count, self.tokens_out, self.partition, self.source_positions)
        kept = kept_at(count, self.tokens_in, self.tokens_out, self.prefix)
        kept = count - round(self.reached * (count - kept))
        split = partition(count, kept, self.prefix)
        return Counts(count, kept, split, sources_of(count - self.prefix, split).to(tokens.device))

    def choose(self, keys: Tensor, counts: Counts, valid: Tensor | None = None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Choose the sources that leave.

        Args:
            keys: ``(B, patches, d)``, of any length.
            counts: what to do with this many tokens.
            valid: ``(B, patches)`` bool, where some tokens only fill up: those leave first, and nobody joins them.

        Returns:
            positions among the sources of those that leave ``(B, r)``, or None where all leave; of those that stay,
            ascending; and the similarities of all sources to all destinations ``(B, sources, destinations)``.
        """
        source, destination = split(F.normalize(keys, dim=-1), counts)
        similarity = torch.bmm(source, destination.transpose(1, 2))
        if valid is not None:
            filled_source, filled = (~half for half in split(valid, counts))
            similarity = similarity.masked_fill(filled.unsqueeze(1), -2.0).masked_fill(filled_source.unsqueeze(2), 2.0)
        leave = counts.tokens_in - counts.tokens_out
        if leave == counts.partition.sources:
            return None, torch.zeros(keys.shape[0], 0, dtype=torch.int64, device=keys.device), similarity
        most = similarity.amax(dim=-1)
        if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort; its TopK takes the lower index first, as we do
            order = most.topk(most.shape[-1], dim=-1).indices
        else:
            order = most.argsort(dim=-1, descending=True, stable=True)
        leaving, staying = order[:, :leave], order[:, leave:].sort(dim=-1).values
        return leaving, staying, similarity

    def valid(self, sizes: Tensor | None, padded: bool) -> Tensor | None:
        """Return which patch tokens are more than filling ``(B, patches)``; None where all are."""
        return sizes[:, self.prefix :] > FILLING if padded and sizes is not None else None

    def assignment(self, leaving: Tensor | None, staying: Tensor, weights: Tensor, counts: Counts) -> Assignment:
        """Turn choices among the sources into an `Assignment` over all N tokens."""
        batch = staying.shape[0]
        sources = (counts.sources + self.prefix).expand(batch, -1)
        places = torch.arange(counts.tokens_in, device=staying.device)
        first = places[: self.prefix].expand(batch, -1)
        last = places[self.prefix + counts.partition.offset :: counts.partition.stride].expand(batch, -1)
        kept = torch.cat([first, sources.gather(1, staying), last], dim=1)
        return Assignment(kept, pick(sources, leaving), weights)


def lifted(x: Tensor) -> Tensor:
    """Lift half precision to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def take(rows: Tensor, index: Tensor | None) -> Tensor:
    """Gather ``(B, n, D)`` rows by ``(B, k)`` positions; None takes all."""
    return rows if index is None else rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def pick(values: Tensor, index: Tensor | None) -> Tensor:
    """Gather ``(B, n)`` values by ``(B, k)`` positions; None takes all."""
    return values if index is None else values.gather(1, index)


def unmerge_macs(place: Place) -> int:
    """Return the multiply-adds of bringing the tokens of one sequence back: one product with the destinations."""
    destinations = partition(place.tokens_in, place.tokens_out, place.prefix).destinations
    return place.groups * (place.tokens_in - place.tokens_out) * destinations * (place.width or place.dim)
