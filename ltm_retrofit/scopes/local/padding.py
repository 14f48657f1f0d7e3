"""What an attention is called with beside its tokens: what of it may say that some tokens only fill up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Number = bool | int | float


@dataclass(frozen=True)
class Companions:
    """The tensors that an attention got in the example beside its tokens, by path: ``mask``, ``positions.0``.

    Args:
        free: those that follow from the image and the weights alone.
        fixed: those that came from an input which is no image; each had one value throughout, which hid nothing.
    """

    free: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Number], ...] = ()


def companions(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], flagged: Callable[[Tensor], bool]
) -> Companions | str:
    """Read them off a recorded call; a string names one that may hide tokens of the example.

    Args:
        module: the attention.
        args: of the call.
        kwargs: likewise.
        flagged: says whether a tensor depends on an input that is no image.
    """
    free: list[str] = []
    fixed: list[tuple[str, Number]] = []
    for path, value in beside(names_of(module), args, kwargs):
        if not flagged(value):
            free.append(path)
        elif (same := only_value(value)) is None:
            return path
        else:
            fixed.append((path, same))
    return Companions(tuple(free), tuple(fixed))


def beside(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the tensors of a call beside its tokens, which are the first of three dimensions and more, with paths.

    Args:
        names: of the positional arguments.
        args: of the call.
        kwargs: likewise.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tensors = [found for name, value in given.items() for found in _flat(name, value)]
    tokens = next((value for _, value in tensors if value.ndim >= 3 and value.is_floating_point()), None)
    return [(path, value) for path, value in tensors if tokens is None or value.shape != tokens.shape]


def _flat(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(f"{path}.{key}", entry)
    elif isinstance(value, (tuple, list)):
        for place, entry in enumerate(value):
            yield from _flat(f"{path}.{place}", entry)


def only_value(value: Tensor) -> Number | None:
    """Return the one value that all entries of a tensor have; None where there are others."""
    first = value.flatten()[:1]
    return first.item() if value.numel() and bool((value == first).all()) else None


def names_of(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's own forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
