"""The latest samples that passed by."""

from __future__ import annotations

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

    def __len__(self) -> int:
        """Count the samples."""
        return min(self.capacity, sum(len(batch[0]) for batch in self.batches))

    def add(self, *parts: Tensor) -> None:
        """Add a batch: tensors ``(n, …)``, the parts of its samples; what is beyond the capacity drops out."""
        self.batches.append(tuple(part.detach()[-self.capacity :].clone() for part in parts))
        while sum(len(batch[0]) for batch in self.batches[1:]) >= self.capacity:
            del self.batches[0]

    def latest(self) -> tuple[Tensor, ...]:
        """Return each part of all samples ``(n, …)``, oldest first, where the newest batch lies."""
        newest = self.batches[-1]
        return tuple(
            torch.cat([part.to(newest[0].device) for part in parts])[-self.capacity :]
            for parts in zip(*self.batches, strict=True)
        )
