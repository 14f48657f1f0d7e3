"""Old names, until their callers have moved."""

from __future__ import annotations

from ltm_retrofit.merging.matching import partition, split

__all__ = ["merge_macs", "partition", "split", "unmerge_macs"]


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
