"""Which arguments of an attention are masks, and what they hide."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.graph.signature import seen_by


def masks_given(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return names and values of the arguments that may be masks over the tokens of the first one.

    Those are of booleans or numbers, with as many entries in the last dimension as there are tokens: ``(B, N)``,
    ``(N, N)``, ``(B, 1, 1 or N, N)`` and alike.

    Args:
        names: of the positional arguments.
        args: of a call.
        kwargs: likewise.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    tokens = next((value for value in tensors.values() if value.ndim >= 3), None)
    found: list[tuple[str, Tensor]] = []
    for name, value in tensors.items():
        if tokens is None or value.ndim < 2 or value.shape[-1] not in tokens.shape[:-1]:
            continue
        if value.dtype == torch.bool or (value.is_floating_point() and value.shape != tokens.shape):
            found.append((name, value))
    return found


def names_of(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's own forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def hides(mask: Tensor) -> bool:
    """Say whether a mask hides some tokens and shows others."""
    return not bool(hides_nothing(mask))


def hides_nothing(mask: Tensor) -> Tensor:
    """Return the contrary of `hides`, for graphs in which no value may be read.

    True stands for "hidden" in `nn.MultiheadAttention`, for "seen" elsewhere; a mask all of which is the same hides
    nothing in either case.
    """
    return (mask == mask.flatten()[:1]).all() if mask.dtype == torch.bool else seen_by(mask).all()
