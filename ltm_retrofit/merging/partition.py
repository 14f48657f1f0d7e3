"""How N tokens split into sources that may leave and destinations, at any N, and what a mask costs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ltm_retrofit.errors import CountError


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


def merge_macs(
    method: str, dim: int, key_dim: int, tokens_in: int, tokens_out: int, prefix: int, classes: int, clusters: int
) -> int:
    """Return the multiply-adds of one mask for one image.

    Keys and similarities for all but ``"slice"`` and ``"pool"``; ToMe's merging is a scatter and counts nothing; a
    learnable mask adds a dense product over the destinations and the information-bottleneck step,
    ``2AD + 2AC + 2ND``.
    """
    if method == "slice":
        return 0
    if method == "pool":  # a dense matrix, for tokens and sizes
        return tokens_in * tokens_out * (dim + 1)
    patches, (_, _, sources, destinations) = tokens_in - prefix, partition(tokens_in, tokens_out, prefix)
    similarity = (patches * dim + sources * destinations) * key_dim
    if method == "tome":
        return similarity
    merging = (tokens_in - tokens_out) * destinations * dim
    return similarity + merging + 2 * patches * dim + 2 * clusters * (dim + classes)


def unmerge_macs(method: str, dim: int, tokens_in: int, tokens_out: int, prefix: int) -> int:
    """Return the multiply-adds of bringing ``tokens_out`` back to ``tokens_in`` for one image."""
    if method == "pool":
        return tokens_in * tokens_out * dim
    destinations = 1 if method == "slice" else partition(tokens_in, tokens_out, prefix).destinations
    return (tokens_in - tokens_out) * destinations * dim


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
