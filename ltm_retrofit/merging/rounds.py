"""Who joins whom: a few rounds of bipartite matching by Ward's cost, to a number of groups known in advance.

Agglomerative clustering by Ward (1963) joins, one pair after the other, the two groups whose union raises the sum of
squared distances from the means the least: ``s_a s_b / (s_a + s_b) · ‖z_a − z_b‖²``. That is what averaging loses.
It needs as many steps as tokens leave. Here each *round* lets many leave at once, as Bolya et al. (ICLR 2023) do once:
tokens split into halves, and the cheapest of one half join their nearest of the other. Three rounds come as near to the
original network as the clustering itself (``docs/method.md``, item 2), and every shape is known in advance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ltm_retrofit.errors import CountError

#: share of their squared norms below which a distance of two tokens is taken for rounding
SAME = 1e-5
#: 2^16 + 1: multiplying, and taking the difference away again, rounds to 16 bits less
COARSE = 65537.0
#: a size below this is padding: nothing else adds up to so little
PADDING = 1e-6


def check_counts(tokens_in: int, tokens_out: int, prefix: int) -> None:
    """Check that a mask can turn N tokens into P.

    Raises:
        CountError: where it cannot, with the range that can be.
    """
    if not prefix < tokens_out <= tokens_in:
        raise CountError(
            f"cannot merge {tokens_in} tokens, {prefix} of them prefix tokens, into {tokens_out}: "
            f"choose {prefix + 1} to {tokens_in}"
        )


def leaving_in(tokens_in: int, tokens_out: int, rounds: int, prefix: int = 0) -> tuple[int, ...]:
    """Return how many patches leave in each round until P tokens are left: equal parts, at most half of them at once.

    More than ``rounds`` rounds come out where that many cannot do it.

    Raises:
        CountError: where the counts cannot be.

    Example:
        >>> leaving_in(257, 151, rounds=3, prefix=1)
        (36, 35, 35)
        >>> leaving_in(16, 3, rounds=1)
        (8, 4, 1)
    """
    check_counts(tokens_in, tokens_out, prefix)
    leaving: list[int] = []
    patches, remain = tokens_in - prefix, tokens_out - prefix
    while patches > remain:
        share = -(-(patches - remain) // max(1, rounds - len(leaving)))
        leaving.append(min(patches // 2, share))
        patches -= leaving[-1]
    return tuple(leaving)


class Groups(NamedTuple):
    """Where each of n tokens went among m groups.

    ``of`` ``(B, n)`` is the group of each token; ``first`` ``(B, m)``, ascending, the token whose place a group takes;
    ``gone`` ``(B, n − m)`` are all others.
    """

    of: Tensor
    first: Tensor
    gone: Tensor


def join(z: Tensor, sizes: Tensor | None, leaving: tuple[int, ...], padded: bool = False) -> Groups:
    """Join tokens in rounds by Ward's cost.

    Tokens at odd places may leave, those at even places may be joined: in raster order neighbours lie in different
    halves. Survivors keep their order, so that this holds in the next round too.

    Args:
        z: what is compared, ``(B, n, D)`` in float32 or float64.
        sizes: how many original tokens each one stands for, ``(B, n)``, or None for ones.
        leaving: how many leave in each round, see `leaving_in`.
        padded: whether tokens of size zero are padding: those leave first, and nobody joins them.
    """
    batch, n = z.shape[:2]
    # without the mean, or a difference of two small numbers would be taken between two large ones
    x = z - z.mean(dim=1, keepdim=True)
    s = z.new_ones(batch, n) if sizes is None else sizes.to(z.dtype)
    of = first = everywhere = torch.arange(n, device=z.device).expand(batch, -1)
    gone = [first[:, :0]]
    for done, count in enumerate(leaving):
        cost = _cost(x, s, equal=sizes is None and not done, padded=padded)
        least, nearest = cost.min(dim=-1)
        places = everywhere[:, :n]
        source = _cheapest(least, count) if count < least.shape[1] else places[:, :count]
        place, target = 2 * source + 1, 2 * nearest.gather(1, source)
        # one sort says who stays, in the order of the image: those that leave are put behind all others
        stays = places.scatter_add(1, place, torch.full_like(place, n)).sort(dim=-1).values[:, : n - count]
        rank = torch.zeros_like(places).scatter(1, stays, places[:, : n - count])
        into = rank.gather(1, target)
        of = rank.scatter(1, place, into).gather(1, of)
        gone.append(first.gather(1, place))
        first = first.gather(1, stays)
        if done + 1 < len(leaving):  # the size-weighted means of what joined
            size, left = s.gather(1, stays), s.gather(1, place)
            s = size.scatter_add(1, into, left)
            moved = rows_at(x, place) * (left / s.gather(1, into)).unsqueeze(-1)
            x = add_at(rows_at(x, stays) * (size / s).unsqueeze(-1), into, moved)
            n -= count
    return Groups(of, first, torch.cat(gone, dim=1))


def _cost(x: Tensor, s: Tensor, equal: bool, padded: bool) -> Tensor:
    """Ward's cost ``(B, ⌊n/2⌋, ⌈n/2⌉)`` of each token at an odd place joining each one at an even place."""
    # A little less than ‖a‖² + ‖b‖²: copies of one token, as LOCAL makes them, then cost nothing.
    square = torch.linalg.vector_norm(x, dim=-1).square() * (1 - SAME)
    # ‖a − b‖² = ‖a‖² + ‖b‖² − 2ab: one matrix product instead of (n/2)² differences of D numbers
    cost: Tensor = torch.bmm(x[:, 1::2], x[:, ::2].transpose(1, 2)).mul(-2)
    cost = (cost + square[:, 1::2].unsqueeze(2) + square[:, ::2].unsqueeze(1)).clamp_min(0)
    if not equal:  # else s_a s_b / (s_a + s_b) is the same for all
        a, b = s[:, 1::2].unsqueeze(2), s[:, ::2].unsqueeze(1)
        cost = cost * (a * b / (a + b).clamp_min(PADDING))
    # To join one of two copies or the other costs the same. So that rounding does not decide, whose last bits change
    # with the size of the batch, only the first 8 bits count (Veltkamp's splitting; 37 in float64), and of equals the
    # first wins.
    most = cost * COARSE
    cost = most - (most - cost)
    if padded and not equal:
        cost = cost.masked_fill(b <= PADDING, torch.inf).masked_fill(a <= PADDING, -1.0)
    return cost


def _cheapest(least: Tensor, count: int) -> Tensor:
    """Return the places ``(B, count)`` of the smallest, the first among equals."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort; its TopK takes the lower index first, as we do
        return least.topk(count, dim=-1, largest=False).indices
    return least.argsort(dim=-1, stable=True)[:, :count]


def _flat(index: Tensor, rows: int) -> Tensor:
    """Turn positions ``(B, k)`` within each entry of a batch into positions among all its ``B · rows`` rows."""
    return (index + rows * torch.arange(index.shape[0], device=index.device).unsqueeze(1)).flatten()


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Return rows ``(B, k, D)`` of ``(B, n, D)``: whole rows are copied, where a gather would pick number by number."""
    rows: Tensor = x.flatten(0, 1).index_select(0, _flat(index, x.shape[1])).view(*index.shape, x.shape[-1])
    return rows


def add_at(x: Tensor, index: Tensor, more: Tensor) -> Tensor:
    """Return ``x (B, n, D)`` with rows ``more (B, k, D)`` added at positions ``index (B, k)``."""
    added: Tensor = x.flatten(0, 1).index_add(0, _flat(index, x.shape[1]), more.flatten(0, 1)).view_as(x)
    return added
