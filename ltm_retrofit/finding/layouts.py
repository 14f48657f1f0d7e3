"""How tokens lie in a tensor: images first or tokens first, in a row or on a map, prefix tokens where they do."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltm_retrofit.finding.example import Example, first_tensor, on_meta, other_image, repeat_batch, run
from ltm_retrofit.finding.recording import Call, Reached, Recording


def as_tokens(x: Tensor, order: str) -> Tensor:
    """Lay ``(R, N, C)``, ``(N, R, C)``, ``(R, …, C)``, ``(R, C, H, W)`` or ``(R, C, N)`` out as ``(R, N, C)``."""
    if order == "NBC":
        return x.transpose(0, 1)
    if order != "BCHW":
        return x.flatten(1, -2)
    flat = x.flatten(2)
    if x.shape[0] == 1:  # as in `from_tokens`: the gradient of a part lies as usual
        flat = flat.narrow(2, 0, flat.shape[2])
    return flat.transpose(1, 2)


def from_tokens(x: Tensor, order: str, spatial: tuple[int, ...]) -> Tensor:
    """Invert `as_tokens`; with other counts ``spatial`` is one line of as many tokens as there are.

    One map is made to lie in memory as usual: torch 2.15's batch norm on CPU gives wrong gradients where of one image
    its input lies channels last and the gradient of its output does not, or the other way round.
    """
    if order == "NBC":
        return x.transpose(0, 1)
    sequences, _, width = x.shape
    if order == "BCHW":
        maps = x.transpose(1, 2).reshape(sequences, width, *spatial)
        return maps.contiguous() if sequences == 1 else maps  # with and without gradients, or traces would differ
    return x.reshape(sequences, *spatial, width)


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


def orders_of(call: Call) -> list[str]:
    """Return the orders, BNC and BCHW, by which as many tokens come out of a module as go in."""
    given, out = call.shape_in, call.shape_out
    if len(given) < 3 or len(given) != len(out):
        return []
    fits = {"BNC": given[:-1] == out[:-1], "BCHW": len(given) <= 4 and given[0] == out[0] and given[2:] == out[2:]}
    return [order for order in fits if fits[order]]


# ------------------------------------------------------------------------------------------ what tokens are compared by


def key_width(dim: int) -> int:
    """Return how wide the keys are by which tokens of ``dim`` features are compared where no attention has keys."""
    return min(dim, max(16, min(64, dim // 8)))


def principal_keys(weight: Tensor, width: int) -> Tensor:
    """Return the ``(width, D)`` map of tokens that best keeps the distances of ``weight``'s outputs: its leading SVD.

    Two tokens that are alike to the first weight matrix of an MLP get nearly the same update from it. With
    ``W = U S Vᵀ``, ``|W(a − b)| = |S Vᵀ(a − b)|``, and leaving out the smallest singular values changes that least.
    """
    if weight.is_meta:
        return weight.new_zeros(width, weight.shape[1])
    matrix = weight.detach().float().flatten(2).sum(-1) if weight.ndim > 2 else weight.detach().float()
    with torch.random.fork_rng(devices=[]):  # the SVD starts from a random projection
        torch.manual_seed(0)
        _, values, right = torch.svd_lowrank(matrix, q=min(width + 8, *matrix.shape), niter=2)
    keys = matrix.new_zeros(width, matrix.shape[1])
    keys[: min(width, len(values))] = (values[:, None] * right.T)[:width]
    return keys


# -------------------------------------------------------------------------------------------- found out by another pass


class Axes(NamedTuple):
    """Modules in which images are not in the first dimension."""

    sequence_first: frozenset[str]  # tokens come before images, as those of `nn.MultiheadAttention` do by default
    folded: frozenset[str]  # images lie among the tokens, or elsewhere, where merging would mix them


def find_axes(model: nn.Module, example: Example, recording: Recording) -> Axes:
    """Find out by a pass of two images: for one image ``(N, 1, C)`` may as well be N windows of a token each.

    The pass runs on the meta device, where the model runs there; a model of one image only has none that could mix.
    """
    one = {call.name: call.shape_in for call in recording.calls if orders_of(call)}
    for meta in (True, False):
        two: dict[str, tuple[int, ...]] = {}
        subject, inputs = on_meta(model, example) if meta else (model, example)
        with ExitStack() as hooks, suppress(Exception):  # something looks at values, or it takes one image only
            for name in one:
                note = partial(_note, two, name)
                hooks.enter_context(subject.get_submodule(name).register_forward_pre_hook(note))
            run(subject, repeat_batch(inputs, 2))
            break
    else:
        return Axes(frozenset(), frozenset())
    first = {name for name, size in two.items() if size == (2 * one[name][0], *one[name][1:])}
    second = {name for name, size in two.items() if one[name][1] == 1 and size == (one[name][0], 2, *one[name][2:])}
    return Axes(frozenset(second - first), frozenset(two.keys() - first - second))


def _note(two: dict[str, tuple[int, ...]], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    if args and isinstance(args[0], Tensor):
        two.setdefault(name, tuple(args[0].shape))


def same_tokens(model: nn.Module, example: Example, name: str, before: Tensor) -> Tensor | None:
    """Say which tokens another image leaves as they are, ``(N,)``: they enter a module as ``(R, N, D)``.

    Those are class, distillation and register tokens. Asked where tokens first attend: past an attention, every token
    depends on the image. None where the model does not take such another image, or makes other tokens of it.
    """
    seen: list[Tensor | None] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(first_tensor(args, kwargs))
        raise Reached

    watched = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    with watched, suppress(Exception):  # reached, or whatever a model has against the image
        run(model, other_image(example))
    other = seen[0] if seen else None
    if other is None or other.shape != before.shape:
        return None
    same = (other == before).all(dim=-1)
    return same.all(dim=1 if same.shape[1] == 1 else 0)  # tokens may come before images


def constant_tokens(model: nn.Module, example: Example, recording: Recording) -> dict[int, tuple[int, int]]:
    """Return token count → how many constant tokens lead and end a sequence of so many.

    What ``torch.cat`` joins was recorded. Where tokens first attend, they are counted in whatever way they were joined.
    """
    joined = dict(recording.joined)
    first = recording.attended[0]
    for name in reversed(first.around):
        call = recording.attending[name][0]
        tokens = first_tensor(call.args, call.kwargs)
        if tokens is None or tokens.ndim != 3 or not tokens.is_floating_point() or tokens._version != call.version:
            continue
        found = same_tokens(model, example, name, tokens)
        same = [] if found is None else found.tolist()
        if True in same and False in same:
            joined[len(same)] = same.index(False), same[::-1].index(False)
        break
    return joined
