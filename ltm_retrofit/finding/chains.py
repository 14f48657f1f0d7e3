"""The modules behind each attention that treat every token alone: an MLP, found without cutting its block.

Between one attention and the next, the outermost modules are tried first: each is run on some of its tokens and must
put out the same for those, (b) ``m(u[idx]) = m(u)[idx]``. Where one fails, its children are tried in the next round.
What holds is a link; links of which one hands its result to the next, and to nobody else, are a chain. Within a chain
merged tokens meet nothing that knows of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.example import Example, run
from ltm_retrofit.finding.layouts import Axes, orders_of, some_tokens, spatial_of, width_of
from ltm_retrofit.finding.proofs import bystander, close, count_weights
from ltm_retrofit.finding.recording import Call, Recording
from ltm_retrofit.finding.sites import Refused
from ltm_retrofit.macs import count_macs_quick

ROUNDS = 5  # how deep below the outermost module behind an attention an MLP is looked for


@dataclass
class Link:
    """One module that was proven token-wise, (b) ``m(u[idx]) = m(u)[idx]``, or an attention that is a set function."""

    call: Call
    order: str  # BNC, NBC, BHWC or BCHW
    cost: tuple[int, int, int]  # MACs of all sequences of N tokens: fixed + linear·N + square·N²
    weights: int  # how many weight matrices it holds
    calls_children: bool = False  # one after the other, whichever they are


#: links of which each hands its result to the next, with at least two weight matrices where there are any
Chain = list[Link]


def find_chains(
    model: nn.Module, example: Example, recording: Recording, axes: Axes
) -> dict[int, list[Chain] | Refused]:
    """Find the MLP behind each attention, by number, or why there is none. Runs the model a few times.

    Where a convolution inside an MLP mixes tokens, the weight matrices before and behind it are chains of their own.
    """
    times = [attended.time for attended in recording.attended]
    owners = [attended.owner for attended in recording.attended]
    windows = [
        list(_outermost((c for c in recording.calls if not _below(c.name, following, own)), start, end))
        for start, end, own, following in zip(times, [*times[1:], 1 << 62], owners, [*owners[1:], ""], strict=True)
    ]
    links: list[dict[str, Link]] = [{} for _ in windows]
    for _ in range(ROUNDS):
        waiting = {
            call.name: (index, call)
            for index, window in enumerate(windows)
            for call in window
            # a module that is called twice would need a mask for each call
            if len(recording.by_name[call.name]) == 1
            and call.name not in {*links[index], *axes.folded}
            and orders_of(call)
        }
        if not waiting:
            break
        _prove_pass(model, example, waiting, links, axes)
        windows = [
            [
                inner
                for call in window
                for inner in ([call] if call.name in held else _outermost(recording.calls, call.start, call.end))
            ]
            for window, held in zip(windows, links, strict=True)
        ]
    return {index: _choose(held, recording, index, model) for index, held in enumerate(links)}


def _below(name: str, owner: str, before: str) -> bool:
    """Say whether a module belongs to the next attention: its queries are made before it attends."""
    return bool(owner) and owner != before and (name == owner or name.startswith(owner + "."))


def _outermost(calls: Iterable[Call], start: int, end: int) -> Iterator[Call]:
    """Return the calls strictly between two times that lie in no other such call."""
    last = start
    for call in calls:
        if call.start > last and call.end < end:
            yield call
            last = call.end


def _prove_pass(
    model: nn.Module, example: Example, waiting: dict[str, tuple[int, Call]], links: list[dict[str, Link]], axes: Axes
) -> None:
    """Run the model once, and try each waiting module where it is called: there its other arguments are at hand."""
    busy: list[str] = []  # a module under proof is called again, and so are those in it

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if busy:
            return
        busy.append(name)
        index, call = waiting[name]
        try:
            if link := _prove_link(module, call, args, kwargs, output, name in axes.sequence_first):
                links[index][name] = link
        finally:
            busy.clear()

    with ExitStack() as hooks:
        for name in waiting:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(leave, name), with_kwargs=True))
        run(model, example)


def _prove_link(
    module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, sequence_first: bool
) -> Link | None:
    """(b) for one module, in whichever order its tokens lie; None where it mixes them: its children are tried next."""
    given = only_tensor(args, kwargs)
    if given is None:
        return None
    orders = orders_of(call)
    if sequence_first:
        orders = ["NBC"] if "BNC" in orders else []
    for order in orders:
        count = prod(spatial_of(tuple(given.shape), order))
        # two thirds, shuffled: a module that minds places or neighbours puts out something else
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: max(1, count * 2 // 3)]
        chosen = chosen.to(given.device)
        part, outs = some_tokens(given, order, chosen), list[Any]()
        try:
            with bystander(module) as child:
                macs = count_macs_quick(lambda part=part, outs=outs: outs.append(module(part, *args[1:], **kwargs)))  # type: ignore[misc]
        except CountError:
            return None
        except Exception:  # another layout, or not token-wise
            continue
        if isinstance(outs[0], Tensor) and close(outs[0], some_tokens(output, order, chosen)):
            each, left = divmod(macs, len(chosen))
            order = "BHWC" if order == "BNC" and given.ndim > 3 else order
            # where its MACs are no multiple of its token count, something in it is no function of a token
            return None if left else Link(call, order, (0, each, 0), count_weights(module), child.called)
    return None


def only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the tensor that a module is called with, where it is the first argument and there is no other."""
    tensors: list[Tensor] = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 and args and args[0] is tensors[0] else None


def _choose(links: dict[str, Link], recording: Recording, index: int, model: nn.Module) -> list[Chain] | Refused:
    """Join the links behind one attention to chains; take the first that holds an MLP, else all outside of it."""
    chains: list[Chain] = []
    for link in sorted(links.values(), key=lambda link: link.call.start):
        if chains and _hands_on(recording, chains[-1][-1], link):
            chains[-1].append(link)
        else:
            chains.append([link])
    for chain in chains:  # norms and scales at the ends cost nothing, and may be read by others
        while chain and not chain[0].weights:
            chain.pop(0)
        while chain and not chain[-1].weights:
            chain.pop()
    owner = recording.attended[index].owner
    single = [chain for chain in chains if chain]
    whole = [chain for chain in single if sum(link.weights for link in chain) >= 2]
    outside = [chain for chain in single if not chain[0].call.name.startswith(owner + ".")]
    if found := whole[:1] or outside or _couple(single):
        return found
    kind = type(model.get_submodule(owner)).__name__
    why = f"{owner or 'the model'} ({kind}): no module behind its attention is an MLP that treats each token alone"
    return Refused(owner, why)


def _couple(chains: list[Chain]) -> list[Chain]:
    """Take the two weight matrices of a block that attends by itself of which one widens and the next narrows again.

    What lies between them is a function in the block's own forward; its output projection is neither.
    """
    for one, other in pairwise(chains):
        (width, inner), (same, out) = _widths(one), _widths(other)
        if inner == same > width == out:
            return [one, other]
    return []


def _widths(chain: Chain) -> tuple[int, int]:
    first, last = chain[0], chain[-1]
    return width_of(first.call.shape_in, first.order), width_of(last.call.shape_out, last.order)


def _hands_on(recording: Recording, one: Link, other: Link) -> bool:
    """Say whether one module's result goes to the other and nowhere else."""
    if one.call.result != other.call.source or one.order != other.order or one.call.result is None:
        return False
    users = recording.used.get(one.call.result, set())
    return all(user == other.call.name or user.startswith(other.call.name + ".") for user in users)
