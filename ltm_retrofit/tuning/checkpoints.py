"""Where an interrupted fine-tune goes on: one file, replaced whole or not at all, that holds no pickled objects.

A checkpoint holds random numbers too, so that a run which goes on draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ltm_retrofit.converted.record import fingerprints_of, get_plan, is_retrofitted
from ltm_retrofit.errors import CheckpointError
from ltm_retrofit.folders import checkpoints_of
from ltm_retrofit.tuning.settings import TrainConfig

#: file name in the folder that a fine-tune is given
NAME = "checkpoint.safetensors"
#: the one before, until the weights of the latest have given a finite loss
BEFORE = "before.safetensors"
FORMAT = 5
#: entries above which a list of floats is kept as a tensor: the text of a file has room for some millions
LONG = 64
#: settings that a run may change when it goes on
FREE = ("workers", "checkpoint_every")


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn nested mappings, lists, numbers and tensors into what JSON holds; tensors go into ``tensors``.

    Raises:
        CheckpointError: on any other kind of value.
    """
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[pack(key, tensors), pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [pack(entry, tensors) for entry in value]}
    if isinstance(value, list) and len(value) > LONG and all(type(entry) is float for entry in value):
        return {"floats": pack(torch.tensor(value, dtype=torch.float64), tensors)}
    if isinstance(value, list):
        return [pack(entry, tensors) for entry in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"a checkpoint holds numbers, text and tensors, and cannot keep a {type(value).__name__}")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Turn what `pack` made back."""
    if isinstance(value, list):
        return [unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dtype":
        return getattr(torch, held)
    back: dict[str, Any] = {"items": dict, "tuple": tuple, "floats": Tensor.tolist}
    return back[kind](unpack(held, tensors))


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint in place of the last one: to another name, to the disk, then under its own name.

    Raises:
        CheckpointError: where it cannot be written, for want of room for example; the last one is as it was.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps({"format": FORMAT, "state": pack(state, tensors)})
    unfinished = folder / f"{NAME}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata={"ltm_retrofit": values})
        _to_disk(unfinished)
        if (folder / NAME).exists():
            os.replace(folder / NAME, folder / BEFORE)
        os.replace(unfinished, folder / NAME)
        _to_disk(folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        kept = "the last good one is still there" if exists(folder) else "there is none yet"
        raise CheckpointError(
            f"cannot write a checkpoint to {folder}: {error}; {kept}. Make room, and go on from it with resume"
        ) from error


def exists(folder: Path) -> bool:
    """Say whether there is a checkpoint to go on from."""
    return any((folder / name).exists() for name in (NAME, BEFORE))


def is_settled(folder: Path) -> bool:
    """Say whether the latest checkpoint is known to be good: there is none before it."""
    return not (folder / BEFORE).exists()


def settle(folder: Path) -> None:
    """Drop the checkpoint before the latest: that one is good."""
    (folder / BEFORE).unlink(missing_ok=True)


def take_back(folder: Path) -> None:
    """Drop the latest checkpoint, whose weights turned out bad; the one before takes its place, if there is one."""
    if not is_settled(folder):
        os.replace(folder / BEFORE, folder / NAME)
    else:
        (folder / NAME).unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(folder: Path) -> dict[str, Any] | None:
    """Return the checkpoint of a folder; None where it has none.

    Raises:
        CheckpointError: where the file is no checkpoint of ours.
    """
    file = next((folder / name for name in (NAME, BEFORE) if (folder / name).exists()), None)
    if file is None:
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            values = json.loads(opened.metadata()["ltm_retrofit"])
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is no checkpoint of a fine-tune: {type(error).__name__}: {error}") from error
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {values.get('format')!r}, this version reads {FORMAT}")
    state: dict[str, Any] = unpack(values["state"], tensors)
    return state


def random_state() -> dict[str, Any]:
    """Return where this process's sources of randomness are: Python's, NumPy's, torch's."""
    kind, internal, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(internal, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the sources of randomness back to where `random_state` found them."""
    random.setstate(state["python"])
    kind, internal, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, internal.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Let torch draw from a seed inside, and leave all sources of randomness as they were."""
    before = random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before)


@contextmanager
def asked_to_stop(say: Callable[[str], None], wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """Make of the first Ctrl-C something that can be asked for, while inside: the next checkpoint is a place to stop.

    A second one stops at once. Outside of the main thread, or where it is not wanted, Ctrl-C is what it always was.

    Raises:
        KeyboardInterrupt: where anything fails after the first one, as the loader's workers do, which hear it too.
    """
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        asked.append(number)
        say("stopping  once a checkpoint is written; Ctrl-C again stops at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def checkpoints_beside(out: Path, resume: bool) -> Path:
    """Return the folder for the checkpoints of a run that writes to ``out``.

    Raises:
        CheckpointError: where an interrupted run left some there, and this one is not to go on from them.
    """
    folder = checkpoints_of(out)
    if not resume and any(path.is_file() for path in folder.rglob("*")):
        raise CheckpointError(
            f"a run to {out} was interrupted, and its checkpoints lie in {folder}: go on from them with --resume, or "
            "remove that folder to begin anew"
        )
    return folder


def beginning_of(model: nn.Module, config: TrainConfig, **given: Any) -> dict[str, Any]:
    """Say what a run starts from: settings, weights, plan, and what else is given. No other run goes on from there."""
    settings = {key: value for key, value in config.to_dict().items() if key not in FREE}
    weights = repr(sorted(fingerprints_of(model).items()))
    # token counts and the like are in no weight
    plan = json.dumps(get_plan(model).to_dict(), sort_keys=True) if is_retrofitted(model) else ""
    return {**settings, "weights": _digest(weights), "plan": _digest(plan), **given}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Check that a checkpoint's run began as this one did.

    Raises:
        CheckpointError: naming what differs.
    """
    differing = [key for key in here if there.get(key) != here[key]]
    if differing:
        shown = ", ".join(f"{key} ({there.get(key)!r} there, {here[key]!r} here)" for key in differing)
        raise CheckpointError(
            f"the checkpoint is of another run, which differs in {shown}: go on with the same settings, model and "
            "data, or start anew in another folder"
        )
