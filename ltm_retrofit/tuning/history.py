"""What a fine-tune starts from, how far it has come, and what it went through."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ltm_retrofit.converted.record import fingerprints_of, get_plan, is_retrofitted
from ltm_retrofit.errors import CheckpointError
from ltm_retrofit.tuning.settings import TrainConfig

#: settings that a run may change when it goes on
FREE = ("workers", "checkpoint_every")


@dataclass
class History:
    """What a fine-tune went through: one entry an epoch, and the loss of every batch."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        """Say how fast it went, and whether the loader kept up."""
        if not self.epochs:
            return "no epoch"
        seconds, waiting = (sum(entry[key] for entry in self.epochs) for key in ("seconds", "waiting"))
        images = sum(entry["images_per_second"] * entry["seconds"] for entry in self.epochs)
        missing = self.epochs[-1]["unreadable"]
        return (
            f"{images / seconds:.0f} images/s, {waiting / seconds:.0%} of the time waiting for the loader"
            + f"; {missing} images could not be read" * bool(missing)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass
class Progress:
    """How far a fine-tune has come.

    Epochs done, batches done of the next one; steps and images in all, batches whose loss held the bound, steps that
    fp16 left out in a row, whether the statistics have been fitted to a full memory; sums over the epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    images: int = 0
    joined: int = 0
    skipped: int = 0
    refreshed: bool = False
    sums: dict[str, float] = field(default_factory=dict)


def beginning(
    model: nn.Module, config: TrainConfig, images: int, data: str, processes: int, *, stream: bool
) -> dict[str, Any]:
    """Say what a run starts from: settings, weights, plan, images of an epoch, a digest of the data, processes.

    The workers of a stream are part of it: they share out its files.
    """
    weights = repr(sorted(fingerprints_of(model).items()))
    # token counts and the like are in no weight
    plan = json.dumps(get_plan(model).to_dict(), sort_keys=True) if is_retrofitted(model) else ""
    settings = {key: value for key, value in config.to_dict().items() if key not in FREE}
    known = {"weights": _digest(weights), "plan": _digest(plan), "images": images, "data": data}
    return {**settings, **known, "processes": processes, **({"workers": config.workers} if stream else {})}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that a checkpoint's run began as this one did.

    Raises:
        CheckpointError: naming what differs.
    """
    differing = [key for key in here if there.get(key) != here[key]]
    if differing:
        shown = ", ".join(f"{key} ({there.get(key)!r} there, {here[key]!r} here)" for key in differing)
        raise CheckpointError(
            f"the checkpoint is of another run, which differs in {shown}: go on with the same settings, model and "
            "data, or start anew in another folder"
        )
