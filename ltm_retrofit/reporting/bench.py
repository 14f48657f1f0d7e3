"""Latency, paired against the original: both paths of one model, in alternation, in one process."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from ltm_retrofit.converted.record import disabled, is_retrofitted, masks_of
from ltm_retrofit.finding.example import Example, home, repeat_batch, run
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


def paired_latency(model: nn.Module, example: Example, *, rounds: int = 10, warmup: int = 2) -> Paired:
    """Time a model on an example, alternating with its original path where it is converted. Eval mode, no gradients."""
    device = home(model)[0]

    def timed() -> float:
        if device.type == "cuda":  # its kernels run on after the call has come back
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run(model, example)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * (time.perf_counter() - began)

    converted = is_retrofitted(model)
    pairs: list[tuple[float, float]] = []
    with undisturbed(model), torch.inference_mode():
        # in alternation, because a shared machine drifts by more from minute to minute than merging saves
        for index in range(warmup + rounds):
            with disabled(model) if converted else nullcontext():
                before = timed()
            after = timed() if converted else before
            if index >= warmup:
                pairs.append((before, after))
        merging = _merging_share(model, example, max(3, rounds // 3)) if converted else None
    original = median(before for before, _ in pairs)
    if not converted:
        return Paired(original)
    # of ratios, not of times: both passes of a pair saw the same machine
    ratios = [after / before for before, after in pairs]
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Paired(original, median(after for _, after in pairs), (middle, low, high), merging)


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
    model: nn.Module, example: Example, batches: tuple[int, ...] = (1, 8, 32), *, rounds: int = 10
) -> dict[int, Paired]:
    """`paired_latency` at several batch sizes."""
    return {batch: paired_latency(model, repeat_batch(example, batch), rounds=rounds) for batch in batches}
