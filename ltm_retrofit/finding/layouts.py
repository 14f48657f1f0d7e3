"""How tokens lie in a tensor: images first or tokens first, in a row or on a map."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ltm_retrofit.finding.example import Example, on_meta, repeat_batch, run
from ltm_retrofit.finding.recording import Event, Recording


def as_tokens(x: Tensor, order: str) -> Tensor:
    """Lay ``(R, N, C)``, ``(N, R, C)``, ``(R, …, C)``, ``(R, C, H, W)`` or ``(R, C, N)`` out as ``(R, N, C)``."""
    if order == "NBC":
        return x.transpose(0, 1)
    if order != "BCHW":
        return x.flatten(1, -2)
    flat = x.flatten(2)
    if x.shape[0] == 1 and x.requires_grad:  # as in `from_tokens`: the gradient of a part lies as usual
        flat = flat.narrow(2, 0, flat.shape[2])
    return flat.transpose(1, 2)


def from_tokens(x: Tensor, order: str, spatial: tuple[int, ...]) -> Tensor:
    """Invert `as_tokens`; with other counts ``spatial`` is one row of as many tokens as there are.

    One map is made to lie in memory as usual: torch 2.15's batch norm on CPU gives wrong gradients where of one image
    its input lies channels last and the gradient of its output does not, or the other way round.
    """
    if order == "NBC":
        return x.transpose(0, 1)
    rows, _, width = x.shape
    if order == "BCHW":
        maps = x.transpose(1, 2).reshape(rows, width, *spatial)
        return maps.contiguous() if rows == 1 and x.requires_grad else maps
    return x.reshape(rows, *spatial, width)


def spatial_of(shape: tuple[int, ...], order: str) -> tuple[int, ...]:
    """Return the token dimensions of a shape."""
    if order == "NBC":
        return tuple(shape[:1])
    return tuple(shape[2:]) if order == "BCHW" else tuple(shape[1:-1])


def width_of(shape: tuple[int, ...], order: str) -> int:
    """Return how many features each token of a shape has."""
    return shape[1] if order == "BCHW" else shape[-1]


def some_tokens(x: Tensor, order: str, index: Tensor) -> Tensor:
    """Return the tokens of these numbers, in as many dimensions as x has."""
    ranks = len(spatial_of(tuple(x.shape), order))
    return from_tokens(as_tokens(x, order)[:, index], order, (*[1] * (ranks - 1), len(index)))


def shaped(event: Event) -> bool:
    """Say whether as many tokens come out as go in."""
    given, out = event.shape_in, event.shape_out
    if event.source is None or event.result is None or len(given) < 3 or len(given) != len(out):
        return False
    return given[:-1] == out[:-1] or (len(given) in (3, 4) and given[0] == out[0] and given[2:] == out[2:])


class Axes(NamedTuple):
    """Modules in which images are not in the first dimension."""

    sequence_first: frozenset[str]  # tokens come before images, as those of `nn.MultiheadAttention` do by default
    folded: frozenset[str]  # images lie among the tokens, or elsewhere, where merging would mix them


def find_axes(model: nn.Module, example: Example, recording: Recording) -> Axes:
    """Find out by a pass of two images: for one image ``(N, 1, C)`` may as well be N windows of a token each.

    The pass needs no numbers, where the model runs without; a model of one image only has none that could mix.
    """
    one = {event.name: event.shape_in for event in recording.events if shaped(event)}
    for without_numbers in (True, False):
        two: dict[str, tuple[int, ...]] = {}
        subject, inputs = on_meta(model, example) if without_numbers else (model, example)
        handles = [subject.get_submodule(name).register_forward_pre_hook(partial(_note, two, name)) for name in one]
        try:
            run(subject, repeat_batch(inputs, 2))
        except Exception:  # something looks at values, or it takes one image only
            continue
        finally:
            for handle in handles:
                handle.remove()
        break
    else:
        return Axes(frozenset(), frozenset())
    first = {name for name, size in two.items() if size == (2 * one[name][0], *one[name][1:])}
    second = {name for name, size in two.items() if one[name][1] == 1 and size == (one[name][0], 2, *one[name][2:])}
    return Axes(frozenset(second - first), frozenset(two.keys() - first - second))


def _note(two: dict[str, tuple[int, ...]], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], Tensor):
        two.setdefault(name, tuple(args[0].shape))
