"""The MLP behind an attention, where a block cannot be cut: modules that treat every token alone (scope LOCAL)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError, UnsupportedBlock
from ltm_retrofit.finding.bystander import bystander
from ltm_retrofit.finding.example import Example, run
from ltm_retrofit.finding.layouts import Axes, shaped, some_tokens, spatial_of, width_of
from ltm_retrofit.finding.proofs import close
from ltm_retrofit.finding.recording import Event, Recording
from ltm_retrofit.macs import count_macs_quick

ROUNDS = 5  # how deep below the outermost module behind an attention an MLP is looked for


@dataclass
class Link:
    """One module that was proven token-wise, (b) ``m(u[idx]) = m(u)[idx]``, or an attention that is a set function."""

    event: Event
    order: str  # BNC, NBC, BHWC or BCHW
    cost: tuple[int, int, int]  # MACs of all sequences of N tokens: fixed + linear·N + square·N²
    weights: int  # how many weight matrices it holds
    calls_children: bool = False  # one after the other, whichever they are


@dataclass
class Chain:
    """Links of which each hands its result to the next, with at least two weight matrices where there are any."""

    links: list[Link]

    @property
    def weights(self) -> int:
        """How many weight matrices it holds."""
        return sum(link.weights for link in self.links)

    @property
    def names(self) -> tuple[str, ...]:
        """The modules, in order."""
        return tuple(link.event.name for link in self.links)


def find_chains(model: nn.Module, example: Example, recording: Recording, axes: Axes) -> dict[int, list[Chain] | str]:
    """Find the MLP behind each attention, by number; a string says why there is none.

    Where a convolution inside an MLP mixes tokens, the weight matrices before and behind it are chains of their own.

    Runs the model a few times, proving (b) for what lies between one attention and the next.
    """
    calls: dict[str, int] = {}
    for event in recording.events:
        calls[event.name] = calls.get(event.name, 0) + 1
    times = [attended.time for attended in recording.attended]
    owners = [attended.chain[-1] for attended in recording.attended]
    windows = [
        list(_outermost((e for e in recording.events if not _below(e.name, following, own)), start, end))
        for start, end, own, following in zip(times, [*times[1:], 1 << 62], owners, [*owners[1:], ""], strict=True)
    ]
    links: dict[int, dict[str, Link]] = {index: {} for index in range(len(windows))}
    for _ in range(ROUNDS):
        waiting = {
            event.name: (index, event)
            for index, window in enumerate(windows)
            for event in window
            if calls[event.name] == 1 and event.name not in {*links[index], *axes.folded} and shaped(event)
        }
        if not waiting:
            break
        _prove_pass(model, example, waiting, links, axes.sequence_first)
        windows = [
            [
                inner
                for event in window
                for inner in (
                    _outermost(recording.events, event.start, event.end) if event.name not in links[index] else [event]
                )
            ]
            for index, window in enumerate(windows)
        ]
    return {index: _choose(links[index], recording, index, model) for index in range(len(recording.attended))}


def _below(name: str, owner: str, before: str) -> bool:
    """Say whether a module belongs to the next attention: its queries are made before it attends."""
    return bool(owner) and owner != before and (name == owner or name.startswith(owner + "."))


def _outermost(events: Iterable[Event], start: int, end: int) -> Iterator[Event]:
    """Return the calls strictly between two times that lie in no other such call."""
    last = start
    for event in events:
        if event.start > last and event.end < end:
            yield event
            last = event.end


def _prove_pass(
    model: nn.Module,
    example: Example,
    waiting: dict[str, tuple[int, Event]],
    links: dict[int, dict[str, Link]],
    sequence_first: Container[str],
) -> None:
    busy: list[str] = []

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if busy:
            return
        busy.append(name)
        try:
            index, event = waiting[name]
            links[index][name] = _prove_link(module, event, args, kwargs, output, name in sequence_first)
        except UnsupportedBlock:  # its children are tried next
            pass
        finally:
            busy.clear()

    handles = [
        model.get_submodule(name).register_forward_hook(partial(leave, name), with_kwargs=True) for name in waiting
    ]
    try:
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()


def _prove_link(
    module: nn.Module,
    event: Event,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    sequence_first: bool,
) -> Link:
    given = only_tensor(args, kwargs)
    orders = [order for order in (("NBC",) if sequence_first else ("BNC", "BCHW")) if _fits(given, output, order)]
    for order in orders:
        count = prod(spatial_of(tuple(given.shape), order))
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: max(1, count * 2 // 3)]
        part = some_tokens(given, order, chosen.to(given.device))
        outs: list[Any] = []
        try:
            with bystander(module) as child:
                fewer = count_macs_quick(lambda part=part, outs=outs: outs.append(module(part, *args[1:], **kwargs)))  # type: ignore[misc]
        except CountError as error:
            raise UnsupportedBlock(str(error)) from error
        except Exception:  # another layout, or not token-wise
            continue
        out = outs[0]
        if not isinstance(out, Tensor) or not close(out, some_tokens(output, order, chosen.to(given.device))):
            continue
        per_token, fixed = divmod(fewer, len(chosen))
        if fixed:
            raise UnsupportedBlock("its MACs are no multiple of its token count")
        order = "BHWC" if order == "BNC" and given.ndim > 3 else order
        return Link(event, order, (0, per_token, 0), count_weights(module), child.called)
    raise UnsupportedBlock("mixes tokens")


def only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tensor that a module is called with, where it is the first argument and there is no other.

    Raises:
        UnsupportedBlock: where there are others.
    """
    tensors: list[Tensor] = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if len(tensors) != 1 or not args or args[0] is not tensors[0]:
        raise UnsupportedBlock("takes more than one tensor")
    (given,) = tensors
    return given


def count_weights(module: nn.Module) -> int:
    """Count a module's weight matrices; tables that only scale or shift are none."""
    return sum(p.ndim >= 2 and p.numel() > p.shape[0] and p.numel() > p.shape[1] for p in module.parameters())


def _fits(given: Tensor, output: Tensor, order: str) -> bool:
    if order == "BCHW":
        return given.ndim in (3, 4) and given.shape[0] == output.shape[0] and given.shape[2:] == output.shape[2:]
    return given.shape[:-1] == output.shape[:-1]


def _choose(links: dict[str, Link], recording: Recording, index: int, model: nn.Module) -> list[Chain] | str:
    """Join the links behind one attention to chains; take the first that holds an MLP, else all outside of it."""
    chains: list[Chain] = []
    for link in sorted(links.values(), key=lambda link: link.event.start):
        last = chains[-1].links[-1] if chains else None
        if last is not None and _hands_on(recording, last, link):
            chains[-1].links.append(link)
        else:
            chains.append(Chain([link]))
    for chain in chains:  # norms and scales at the ends cost nothing, and may be read by others
        while chain.links and not chain.links[0].weights:
            chain.links.pop(0)
        while chain.links and not chain.links[-1].weights:
            chain.links.pop()
    owner = recording.attended[index].chain[-1]
    whole = [chain for chain in chains if chain.links and chain.weights >= 2]
    single = [chain for chain in chains if chain.links]
    outside = [chain for chain in single if not chain.names[0].startswith(owner + ".")]
    found = whole[:1] or outside or _couple(single)
    if not found:
        kind = type(model.get_submodule(owner)).__name__
        return f"{owner or 'the model'} ({kind}): no module behind its attention is an MLP that treats each token alone"
    return found


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
    first, last = chain.links[0], chain.links[-1]
    return width_of(first.event.shape_in, first.order), width_of(last.event.shape_out, last.order)


def _hands_on(recording: Recording, one: Link, other: Link) -> bool:
    """Say whether one module's result goes to the other and nowhere else."""
    if one.event.result != other.event.source or one.order != other.order or one.event.result is None:
        return False
    users = recording.used.get(one.event.result, set())
    return all(user == other.event.name or user.startswith(other.event.name + ".") for user in users)
