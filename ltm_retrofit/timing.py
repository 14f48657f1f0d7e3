"""How long does one way take beside another?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import quantiles

import torch

#: rounds below which no median is taken, however little time is left; and rounds before them, which warm up
FEWEST, WARMUP = 3, 2


def alternated(
    ways: Sequence[Callable[[], object]],
    device: torch.device,
    rounds: int,
    *,
    warmup: int = WARMUP,
    seconds: float = math.inf,
    each: Callable[[], object] = int,
) -> list[list[float]]:
    """Time several ways in alternation: a shared machine drifts by more from minute to minute than merging saves.

    Args:
        ways: what is timed.
        device: on which they run.
        rounds: the most that are timed.
        warmup: rounds before these.
        seconds: after so long it ends with the rounds that it has, `FEWEST` or more of them.
        each: is called after each round.

    Returns:
        the milliseconds of each way in each round.
    """

    def timed(way: Callable[[], object]) -> float:
        if device.type == "cuda":  # its kernels run on after the call has come back
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - began)

    taken: list[list[float]] = []
    started = time.perf_counter()
    for index in range(warmup + rounds):
        times = [timed(way) for way in ways]
        if index >= warmup:
            taken.append(times)
        each()
        if len(taken) >= FEWEST and time.perf_counter() - started > seconds:
            break
    return taken


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile; of one value, that value."""
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return low, middle, high
