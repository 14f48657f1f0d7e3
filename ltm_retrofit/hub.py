"""What is known of the Hugging Face Hub: ids, whether it answers, and how a repository is fetched."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from ltm_retrofit.errors import CheckpointError

#: seconds until the Hub counts as unreachable
PATIENCE = 6.0
#: never a pickle, never code
_WANTED = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
#: what its cache puts before the name of a repository of models
_CACHED = "models--"


def is_repository(name: str) -> bool:
    """Say whether a name can be an id on the Hub, ``organisation/name``, and not a path."""
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))


def origin_of(name: str | None, revision: str | None) -> dict[str, Any]:
    """Say which repository of the Hub a model came from, and which of its revisions, as far as can be known.

    A folder is no origin: what is saved may be read elsewhere. Newer versions of transformers keep no revision in the
    model. Then it is the one whose weights are in the cache; whether it was, an adapter's hash says.
    """
    from huggingface_hub import constants

    place = Path(name or "")
    if len(place.parts) > 3 and place.parts[-2] == "snapshots" and place.parts[-3].startswith(_CACHED):
        return {"id": place.parts[-3].removeprefix(_CACHED).replace("--", "/"), "revision": place.name}
    if name is None or not is_repository(name) or place.is_dir():
        return {"id": None, "revision": None}
    cached = Path(constants.HF_HUB_CACHE, _CACHED + name.replace("/", "--"))
    held = {file.parent.name for file in cached.glob("snapshots/*/*") if file.suffix in (".safetensors", ".bin")}
    main = cached / "refs" / "main"
    if len(held) > 1 and main.is_file():
        held &= {main.read_text(encoding="utf-8")}
    return {"id": name, "revision": revision or (held.pop() if len(held) == 1 else None)}


def fetch(
    repo: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download a model's configuration and safetensors, or find them in the cache; return the folder.

    Args:
        repo: the repository's id.
        revision: its branch, tag or commit.
        token: of an account that may read it.
        cache_dir: another cache than the usual one.
        local_files_only: ask nobody.

    Raises:
        CheckpointError: where there is no such repository, or the Hub cannot be reached and nothing is cached.
    """
    from huggingface_hub import snapshot_download

    reason = "local_files_only is set" if local_files_only else unreachable(repo, revision=revision, token=token)
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            allow_patterns=_WANTED,
            local_files_only=bool(reason),
            etag_timeout=PATIENCE,
        )
        return Path(folder)
    except Exception as error:  # httpx, huggingface_hub and the file system each have their own
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"{repo!r}{at} cannot be fetched from the Hugging Face Hub, and the cache does not hold it: "
            f"{reason or in_short(error)}. There is no such folder here either: give one, or check the name, the "
            "connection (HF_HUB_OFFLINE, HF_ENDPOINT) and, where it is private, the token"
        ) from error


def unreachable(
    repo: str, kind: str = "model", *, revision: str | None = None, token: str | bool | None = None
) -> str | None:
    """Ask the Hub for a repository of this kind, ``"model"`` or ``"dataset"``; return why it cannot be had, or None.

    It is asked once and briefly: its client's own retries add up to a minute. In a thread, for name resolution has no
    time limit.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            about = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
            about(repo, revision=revision, token=token, timeout=PATIENCE)
            answer.append(None)
        except Exception as error:
            answer.append(in_short(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return answer[0] if answer else f"no answer within {PATIENCE + 1:g} s"


def in_short(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
