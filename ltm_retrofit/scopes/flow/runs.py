"""Which of the blocks that can be cut follow each other, so that merged tokens meet nothing else on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ltm_retrofit.finding.example import Example, run
from ltm_retrofit.finding.recording import Event, Reached, Recording, replaced
from ltm_retrofit.undisturbed import undisturbed

if TYPE_CHECKING:
    from ltm_retrofit.scopes.flow.find import Candidate

#: of modules that are identities while nothing is trained
RATES = ("p", "drop_prob")


def unbroken(candidates: list[Candidate], recording: Recording, excluded: dict[str, str]) -> list[Candidate]:
    """Keep the last run of candidates with no excluded attention between them: merged tokens must not meet one."""
    names = {candidate.name: candidate for candidate in candidates}
    run_of: list[Candidate] = []
    pending = ""
    for attended in recording.attended:
        candidate = next((names[name] for name in attended.chain if name in names), None)
        if candidate is None:
            pending = attended.chain[-1]
        elif candidate not in run_of:
            if pending:
                _leave_out(run_of, f"tokens merged here would reach {pending}, which is left out", excluded)
            pending = ""
            run_of.append(candidate)
    return run_of


def handed_on(
    model: nn.Module, example: Example, candidates: list[Candidate], recording: Recording, excluded: dict[str, str]
) -> list[Candidate]:
    """Keep the last run of candidates of which each gives the next its very output: what tokens carry lies on it."""
    events = {event.name: event for event in recording.events}
    run_of: list[Candidate] = []
    for candidate in candidates:
        if run_of and not _hands_on(model, events[run_of[-1].name], events[candidate.name], recording):
            why = f"something between it and {candidate.name} makes a new tensor, and what merged tokens carry is lost"
            _leave_out(run_of, why, excluded)
        run_of.append(candidate)
    if name := _lost_in_training(model, example, run_of, recording):
        place = next(place for place, candidate in enumerate(run_of) if candidate.name == name)
        before, run_of = run_of[:place], run_of[place:]
        why = (
            f"while the model is trained, something before {name} makes a new tensor (dropout), and what merged tokens"
        )
        _leave_out(before, f"{why} carry is lost", excluded)
    if len(run_of) == 1 and run_of[0].end:
        _leave_out(run_of, "nothing that costs anything follows its attention", excluded)
    return run_of


def _lost_in_training(model: nn.Module, example: Example, run_of: list[Candidate], recording: Recording) -> str:
    """Return the last block to which what tokens carry does not come while the model is trained, if any.

    One pass up to the last block. Blocks hand out what they were recorded to put out, and what may lie between them is
    in training mode: modules around them, those that were given their tokens, and those that eval mode never calls. The
    stem is not. A model that asks for more while it is trained (targets) shows nothing here.
    """
    if len(run_of) < 2:
        return ""
    put_out: list[Tensor] = []
    lost: list[str] = []

    def stand_in(candidate: Candidate, *args: Any, **kwargs: Any) -> Tensor:
        tokens = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        if put_out and not any(tokens is out for out in put_out):
            lost.append(candidate.name)
        if candidate is run_of[-1]:
            raise Reached
        put_out.append(recording.calls[candidate.name][0].output.clone())  # whoever writes into it
        return put_out[-1]

    names = {*_between(run_of, recording), *(dict(model.named_modules()).keys() - {e.name for e in recording.events})}
    awake = [model.get_submodule(name) for name in names]
    with undisturbed(model), replaced({candidate.module: partial(stand_in, candidate) for candidate in run_of}):
        for module in awake:
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)  # which minds a single image
        with suppress(Exception):  # reached, or it cannot be run so
            run(model, example)
    return lost[-1] if lost else ""


def _between(run_of: list[Candidate], recording: Recording) -> Iterator[str]:
    """Name the modules around several blocks, and those between them that are given their tokens."""
    events = {event.name: event for event in recording.events}
    for candidate in run_of:
        parts = candidate.name.split(".")
        yield from (".".join(parts[:depth]) for depth in range(len(parts)))
    for one, other in pairwise(events[candidate.name] for candidate in run_of):
        yield from (e.name for e in recording.events if one.end < e.start < other.start and e.source == one.result)


def _leave_out(run_of: list[Candidate], why: str, excluded: dict[str, str]) -> None:
    excluded.update({candidate.name: f"{candidate.name}: {why}" for candidate in run_of})
    run_of.clear()


def _hands_on(model: nn.Module, one: Event, other: Event, recording: Recording) -> bool:
    """Say whether a block's output is the next one's input, also while the model is trained (dropout between them)."""
    between = (event for event in recording.events if one.end < event.start and event.end < other.start)
    altering = any(
        event.source == one.result and any(getattr(model.get_submodule(event.name), name, None) for name in RATES)
        for event in between
    )
    return one.result == other.source and not altering
