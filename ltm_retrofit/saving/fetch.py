"""One bounded way to the Hugging Face Hub: a folder, or one clear error within ten seconds."""

from __future__ import annotations

import threading
from pathlib import Path

from ltm_retrofit.errors import CheckpointError

#: seconds until the Hub counts as unreachable
PATIENCE = 6.0
#: never a pickle, never code
_WANTED = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]


def is_repository(name: str) -> bool:
    """Say whether a name can be an id on the Hub, ``organisation/name``, and not a path."""
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))


def fetch(repo: str) -> Path:
    """Download a model's configuration and safetensors, or find them in the cache; return the folder.

    Raises:
        CheckpointError: where there is no such repository, or the Hub cannot be reached and nothing is cached.
    """
    from huggingface_hub import snapshot_download

    reason = _unreachable(repo)  # asked once and briefly: the client's own retries add up to a minute
    try:
        folder = snapshot_download(repo, allow_patterns=_WANTED, local_files_only=bool(reason), etag_timeout=PATIENCE)
        return Path(folder)
    except Exception as error:  # httpx, huggingface_hub and the file system each have their own
        raise CheckpointError(
            f"{repo!r} cannot be fetched from the Hugging Face Hub, and the cache does not hold it: "
            f"{reason or _in_short(error)}. Give a local folder, or check the name and the connection "
            "(HF_HUB_OFFLINE, HF_ENDPOINT)"
        ) from error


def _unreachable(repo: str) -> str | None:
    """Ask the Hub for a repository; return why not, or None. In a thread, for name resolution has no time limit."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(repo, timeout=PATIENCE)
            answer.append(None)
        except Exception as error:
            answer.append(_in_short(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return answer[0] if answer else f"no answer within {PATIENCE + 1:g} s"


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
