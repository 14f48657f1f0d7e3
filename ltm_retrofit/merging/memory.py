"""The latest samples that passed by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Memory:
    """Keeps as many of the latest samples as it holds, in the batches they came in: adding one moves no other.

    Args:
        capacity: how many samples count.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.batches: list[tuple[Tensor, ...]] = []  # of as many parts as each sample has; newest last
        self.fresh = 0  # samples since `take_fresh`

    def __len__(self) -> int:
        """Count the samples."""
        return min(self.capacity, sum(len(batch[0]) for batch in self.batches))

    def add(self, *parts: Tensor) -> None:
        """Add a batch: tensors ``(n, …)``, the parts of its samples; what is beyond the capacity drops out."""
        self.batches.append(tuple(part.detach()[-self.capacity :].clone() for part in parts))
        self.fresh += len(parts[0])
        while sum(len(batch[0]) for batch in self.batches[1:]) >= self.capacity:
            del self.batches[0]

    def latest(self, count: int | None = None) -> tuple[Tensor, ...]:
        """Return each part of the latest samples, all that count or fewer: ``(n, …)``, oldest first, on one device."""
        count = self.capacity if count is None else min(count, self.capacity)
        first, held = len(self.batches), 0
        while first > 0 and held < count:
            first -= 1
            held += len(self.batches[first][0])
        device = self.batches[-1][0].device
        parts = zip(*self.batches[first:], strict=True)
        return tuple(torch.cat([batch.to(device) for batch in part])[max(0, held - count) :] for part in parts)

    def take_fresh(self) -> tuple[Tensor, ...]:
        """Return each part of the samples that have come since the last call, as far as they still count."""
        count, self.fresh = self.fresh, 0
        return self.latest(count)

    def state(self) -> list[Any]:
        """Return all that it holds, on the CPU, for `set_state`."""
        return [[tuple(part.cpu() for part in batch) for batch in self.batches], self.fresh]

    def set_state(self, state: list[Any], device: torch.device) -> None:
        """Hold what another one held, on a device."""
        batches, self.fresh = state
        self.batches = [tuple(part.to(device) for part in batch) for batch in batches]
