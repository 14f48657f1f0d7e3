"""Which of the blocks that can be cut follow each other, so that merged tokens meet nothing else on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ltm_retrofit.graph.probe import Event, Recording

if TYPE_CHECKING:
    from ltm_retrofit.graph.flow import Candidate

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
    model: nn.Module, candidates: list[Candidate], recording: Recording, excluded: dict[str, str]
) -> list[Candidate]:
    """Keep the last run of candidates of which each gives the next its very output: what tokens carry lies on it."""
    events = {event.name: event for event in recording.events}
    run_of: list[Candidate] = []
    for candidate in candidates:
        if run_of and not _hands_on(model, events[run_of[-1].name], events[candidate.name], recording):
            why = f"something between it and {candidate.name} makes a new tensor, and what merged tokens carry is lost"
            _leave_out(run_of, why, excluded)
        run_of.append(candidate)
    if len(run_of) == 1 and run_of[0].end:
        _leave_out(run_of, "nothing that costs anything follows its attention", excluded)
    return run_of


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
