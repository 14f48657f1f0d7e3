"""How the learning rate rises and falls over a run."""

from __future__ import annotations

import math

import torch
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ltm_retrofit.tuning.settings import TrainConfig


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total: int) -> LambdaLR:
    """Return a schedule over ``total`` steps: every group's own highest rate, times the factor of timm's schedule.

    Timm's cosine is written out, so that its warm-up scales with each group's rate.
    """
    rising = config.warmup * total

    def cosine(step: int) -> float:
        done = step / max(1, total)
        return (step + 1) / (rising + 1) if step < rising else 0.5 * (1 + math.cos(math.pi * done))

    if config.sched == "cosine":
        return LambdaLR(optimizer, cosine)
    unit = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)  # whose rate is the factor
    theirs, _ = create_scheduler_v2(
        unit,
        sched=config.sched,
        num_epochs=total,
        decay_epochs=max(1, round(0.3 * total)),  # of "step"
        decay_rate=0.1 if config.sched == "step" else 1.0,  # of "poly" it is the power
        warmup_epochs=round(rising),
        warmup_lr=1 / (rising + 1),
        updates_per_epoch=1,
        step_on_epochs=False,
    )

    def factor(step: int) -> float:
        theirs.step_update(step)
        return float(unit.param_groups[0]["lr"])

    return LambdaLR(optimizer, factor)
