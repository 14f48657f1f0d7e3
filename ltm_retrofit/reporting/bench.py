"""Latency, paired against the original: both paths of one model, in alternation, in one process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from ltm_retrofit.converted.record import forwards_of, is_retrofitted, masks_of
from ltm_retrofit.finding.example import Example, home, repeat_batch, run, tensors_of
from ltm_retrofit.progress import progress
from ltm_retrofit.reporting.memory import free_bytes
from ltm_retrofit.scopes import both_ways
from ltm_retrofit.timing import FEWEST, WARMUP, alternated, quartiles
from ltm_retrofit.tuning.processes import is_main
from ltm_retrofit.undisturbed import undisturbed


@dataclass(frozen=True)
class Paired:
    """Median milliseconds of a forward pass, and the quartiles of the paired ratios converted / original.

    ``merging`` is the share of the converted pass that its masks take, timed apart. What was not measured is None.
    """

    original: float
    converted: float | None = None
    ratio: tuple[float, float, float] | None = None
    merging: float | None = None

    def __str__(self) -> str:
        """Return ``105.2 ms → 71.9 ms (×0.68)``."""
        after = "" if self.converted is None else f" → {self.converted:.1f} ms"
        return f"{self.original:.1f} ms{after}" + ("" if self.ratio is None else f" (×{self.ratio[0]:.2f})")


def paired_latency(
    model: nn.Module, example: Example, *, rounds: int = 10, warmup: int = WARMUP, seconds: float = math.inf
) -> Paired:
    """Time a model on an example, alternating with its original path where it is converted. Eval mode, no gradients.

    After ``seconds`` it ends with the rounds that it has, `FEWEST` or more of them.
    """
    converted = is_retrofitted(model)
    images = len(tensors_of(example)[0])
    bar = progress(f"timing batches of {images}", warmup + rounds, "rounds", on=is_main())
    both = both_ways(model, list(forwards_of(model)), example)
    with undisturbed(model), torch.inference_mode(), both as ways, bar:
        ways = ways if converted else ways[1:]
        taken = alternated(ways, home(model)[0], rounds, warmup=warmup, seconds=seconds, each=bar.update)
        merging = _merging_share(model, example, max(3, len(taken) // 3)) if converted else None
    before = median(times[0] for times in taken)
    if not converted:
        return Paired(before)
    # of ratios, not of times: both passes of a pair saw the same machine
    low, middle, high = quartiles([after / before for before, after in taken])
    return Paired(before, median(after for _, after in taken), (middle, low, high), merging)


def _merging_share(model: nn.Module, example: Example, rounds: int) -> float:
    """Time the masks within the forward pass; on CPU only, where a call's time is its work's."""
    spent, started = [0.0], [0.0]

    def begin(*_: Any) -> None:
        started[0] = time.perf_counter()

    def end(*_: Any) -> None:
        spent[0] += time.perf_counter() - started[0]

    handles = [
        handle
        for mask in masks_of(model).values()
        for handle in (mask.register_forward_pre_hook(begin), mask.register_forward_hook(end))
    ]
    try:
        began = time.perf_counter()
        for _ in range(rounds):
            run(model, example)
        return spent[0] / (time.perf_counter() - began)
    finally:
        for handle in handles:
            handle.remove()


def batch_latencies(
    model: nn.Module,
    example: Example,
    batches: Sequence[int] = (1, 8, 32),
    *,
    rounds: int = 10,
    seconds: float = math.inf,
    need: float = 0,
    say: Callable[[str], object] = str,
) -> tuple[dict[int, Paired], list[str]]:
    """`paired_latency` at several batch sizes, the smallest first; and why some were left out.

    Args:
        model: converted or not.
        example: of one image.
        batches: how many images at once.
        rounds: the most that are timed at each.
        seconds: for all of them together; what would go on for longer is left out, and said.
        need: bytes that one image takes; a batch that needs more than is free is left out, and said.
        say: receives each result as it comes.
    """
    found: dict[int, Paired] = {}
    left_out: list[str] = []
    started, order = time.perf_counter(), sorted(set(batches))
    for place, batch in enumerate(order):
        left = seconds - (time.perf_counter() - started)
        why = _too_large(batch, need, free_bytes(home(model)[0]))
        if not why and found:
            small, paired = next(reversed(found.items()))
            expected = (paired.original + (paired.converted or 0)) / 1000 * batch / small * (FEWEST + 1)
            if expected > left:
                why = (
                    f"it would take some {expected:.0f} s more, and timing has {max(left, 0):.0f} s left of {seconds:g}"
                )
        if why:
            left_out.append(f"batches of {batch} were not timed: {why}")
            say(left_out[-1])
            continue
        share = left / (len(order) - place)
        warmup = 2 if share == math.inf or not found else 1
        found[batch] = paired_latency(model, repeat_batch(example, batch), rounds=rounds, warmup=warmup, seconds=share)
        say(f"latency, batch {batch}: {found[batch]}")
    return found, left_out


def _too_large(batch: int, need: float, free: float) -> str:
    """Say that a batch does not fit into memory; empty where it does."""
    if batch * need <= free:
        return ""
    return f"they need about {batch * need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
