"""How long does one way take beside another?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import quantiles

import torch


def alternated(ways: Sequence[Callable[[], object]], device: torch.device) -> Iterator[list[float]]:
    """Time several ways in alternation: a shared machine drifts by more from minute to minute than merging saves.

    Yields:
        the milliseconds of each way, round by round without an end; the first ones warm up.
    """

    def timed(way: Callable[[], object]) -> float:
        if device.type == "cuda":  # its kernels run on after the call has come back
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - began)

    while True:
        yield [timed(way) for way in ways]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile; of one value, that value."""
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return low, middle, high
