"""Which entries of a model changed since it was converted: something cheap to compare for each."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

Fingerprint = tuple[tuple[int, ...], str, int]


def fingerprint(value: Tensor) -> Fingerprint:
    """Return shape, dtype and a checksum of the bytes in their order.

    (An exclusive or of the numbers would not do: a first step of Adam moves weights of one by the same amount up or
    down, and an even number of each is nothing again.)
    """
    return tuple(value.shape), str(value.dtype), 0 if value.is_meta else zlib.crc32(bytes_of(value))


def bytes_of(value: Tensor) -> memoryview:
    """Return what a tensor is stored as, on the CPU."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def fingerprints_of(model: nn.Module) -> dict[str, Fingerprint]:
    """Return the fingerprint of every entry of a state dict."""
    return {key: fingerprint(value) for key, value in model.state_dict().items()}
