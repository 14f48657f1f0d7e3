"""Which entries of a model changed since it was converted: something cheap to compare for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Fingerprint = tuple[tuple[int, ...], str, int]


def fingerprint(value: Tensor) -> Fingerprint:
    """Return shape, dtype and the exclusive or of all numbers: training changes it, a mere reordering would not."""
    bits = 0
    if not value.is_meta and value.numel():
        bits = int(torch.hash_tensor(value.detach().flatten()).view(torch.int64))  # as signed: uint64 has no item()
    return tuple(value.shape), str(value.dtype), bits


def fingerprints_of(model: nn.Module) -> dict[str, Fingerprint]:
    """Return the fingerprint of every entry of a state dict."""
    return {key: fingerprint(value) for key, value in model.state_dict().items()}
