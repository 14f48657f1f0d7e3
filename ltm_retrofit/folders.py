"""A folder is written whole or not at all, and only over one of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ltm_retrofit.errors import CheckpointError

#: stands in the file that lists a folder's files, so that another program's list is not taken for ours
OURS = "ltm_retrofit"


def check_ours(folder: Path, mark: str, *, overwrite: bool = True) -> None:
    """Check before any work that a folder may be written: it is new, empty, or holds nothing but what we wrote.

    Args:
        folder: where something will be written.
        mark: the name of the JSON file in which an earlier writing listed its ``files``.
        overwrite: whether a folder of ours may be replaced.

    Raises:
        CheckpointError: naming what is in the way.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise CheckpointError(f"{folder} cannot be written: {there} is not a folder that can be written")
        present = _present(folder)
        ours = _listed(folder / mark)
        foreign = sorted(name for name in present if name not in ours or not (folder / name).is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}. Give a folder that you may write to") from error
    if foreign:
        named = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise CheckpointError(f"{folder} holds files that are not ours: {named}. Give an empty folder or a new one")
    if present and not overwrite:
        raise CheckpointError(f"{folder} holds a saved model: pass overwrite=True to replace it, or another folder")


def checkpoints_of(out: Path) -> Path:
    """Return the folder in which a run that writes to ``out`` keeps its checkpoints."""
    return out.absolute().parent / f".{out.name}.checkpoints"


@contextmanager
def written_whole(folder: Path, mark: str, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a new folder to write into, which takes this folder's place when all went well and vanishes otherwise.

    Where ``folder`` is a symbolic link, what it points to is replaced, not the link.

    Args:
        folder: what is to be written.
        mark: as for `check_ours`, which is asked again at the end: what was written may have taken hours.
        overwrite: likewise.

    Raises:
        CheckpointError: where it cannot be written, for want of room for example; what was there is as it was.
    """
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # beside the folder, because only within one file system is a renaming done whole or not at all
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as room:
            new = Path(room, "new")
            new.mkdir()  # the room itself is for its owner only
            yield new
            check_ours(folder, mark, overwrite=overwrite)
            swap(new, folder, Path(room, "old"))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}. What was there is as it was") from error


def swap(new: Path, folder: Path, old: Path) -> None:
    """Put a new folder in the place of one that there may be, which is kept as ``old``."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise


def _present(folder: Path) -> set[str]:
    """Name all that is in a folder. Links, and folders that hold nothing, are somebody's too."""
    return {
        str(entry.relative_to(folder))
        for entry in folder.rglob("*")
        if entry.is_symlink() or not entry.is_dir() or not any(entry.iterdir())
    }


def is_ours_by(mark: Path, name: str) -> bool:
    """Say whether an earlier writing, which listed its files in ``mark``, wrote the file of this name."""
    return name in _listed(mark)


def _listed(mark: Path) -> set[str]:
    """Return the files that an earlier writing listed; none where its list is missing, broken or not ours."""
    try:
        values = json.loads(mark.read_text(encoding="utf-8"))
        return set(values["files"]) if OURS in values.values() else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
