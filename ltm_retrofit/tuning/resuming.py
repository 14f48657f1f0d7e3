"""All that a run is made of, written down and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn

from ltm_retrofit.converted.record import load_state, mark_finetuned
from ltm_retrofit.merging.statistics import Memory
from ltm_retrofit.tuning import checkpoints
from ltm_retrofit.tuning.history import History, Progress, check_same

if TYPE_CHECKING:
    from ltm_retrofit.tuning.loop import Run


def keep(run: Run) -> None:
    """Write a checkpoint; the first process does, all have to call it."""
    assert run.folder is not None
    passes = run.passes
    own: dict[str, Any] = {"now": checkpoints.random_state(), "passes": passes.state()}
    own |= {"unreadable": passes.unreadable(), "information": [memory.state() for memory in _own_memory(run)]}
    randoms = checkpoints.of_every_rank(own, run.accelerator)
    if run.accelerator.is_main_process:
        state: dict[str, Any] = {name: part.state_dict() for name, part in _parts(run).items()}
        state |= {"began": run.began, "batch_images": passes.images, "random": randoms}
        state |= {"progress": asdict(run.progress), "history": asdict(run.history)}
        state |= {"memories": {name: module.memory.state() for name, module in run.statistics()}}
        checkpoints.write(run.folder, state)
    run.accelerator.wait_for_everyone()


def resume(run: Run, state: Mapping[str, Any]) -> None:
    """Go on from a checkpoint.

    Raises:
        CheckpointError: where it is of another run: other settings, model, data, or number of processes.
    """
    check_same(state["began"], run.began)
    for name, part in _parts(run).items():
        if isinstance(part, nn.Module):
            load_state(part, state[name])
        else:
            part.load_state_dict(state[name])
    device = run.accelerator.device
    for name, module in run.statistics():
        module.memory.set_state(state["memories"][name], device)
    run.progress, run.history = Progress(**state["progress"]), History(**state["history"])
    own = state["random"][run.accelerator.process_index]
    checkpoints.set_random_state(own["now"])
    run.passes.set_state(own["passes"])
    run.passes.set_unreadable(own["unreadable"])
    for memory, kept in zip(_own_memory(run), own["information"], strict=True):
        memory.set_state(kept, device)
    # its own run may have been killed before it saw a loss of these weights
    run.unproven = run.folder is not None and not checkpoints.is_settled(run.folder)
    if run.progress.step:
        mark_finetuned(run.model)


def _parts(run: Run) -> dict[str, Any]:
    parts = {"model": run.model, "optimizer": run.optimizer, "schedule": run.schedule}
    parts |= {} if run.ema is None else {"ema": run.ema.module}
    return parts | ({} if run.accelerator.scaler is None else {"scaler": run.accelerator.scaler})


def _own_memory(run: Run) -> list[Memory]:
    """Return the memory of this process's own images, if there is one; the statistics' are of all processes'."""
    return [] if run.objective.information is None else [run.objective.information.memory]
