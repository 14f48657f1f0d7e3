"""How boxes of two sizes overlap: exact average pooling to any count."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor


def overlaps(size: int, kept: int) -> tuple[Tensor, Tensor]:
    """Return which of ``size`` boxes each of ``kept`` equal boxes overlaps, and by how much of itself.

    Exact, in whole numbers until the last division: ``index (kept, k)`` int64 and ``share (kept, k)`` float64, rows
    summing to one. Where fewer than k overlap, the rest have share 0.
    """
    width = max(ceil((p + 1) * size / kept) - (p * size) // kept for p in range(kept))
    index, share = torch.zeros(kept, width, dtype=torch.int64), torch.zeros(kept, width, dtype=torch.float64)
    for p in range(kept):  # in units of 1/kept: box p is [p·size, (p + 1)·size), box j is [j·kept, (j + 1)·kept)
        for place in range(width):
            j = (p * size) // kept + place
            common = min((p + 1) * size, (j + 1) * kept) - max(p * size, j * kept)
            if j < size and common > 0:
                index[p, place], share[p, place] = j, common / size
    return index, share
