"""What writes a converted model where its host's own ``save_pretrained`` or ``push_to_hub`` is called.

Users and Trainer call these, with the arguments and the habits of transformers: a folder may hold other files, and an
optimizer's state lies beside the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ltm_retrofit.errors import CheckpointError
from ltm_retrofit.folders import is_ours_by
from ltm_retrofit.saving.save import CARD, CONFIG, contents_of, push_to_hub
from ltm_retrofit.scopes.base import Interceptor

#: arguments of transformers' methods that change nothing here: a folder of ours has one file of weights, under the
#: names that the model itself has for them
_WITHOUT_EFFECT = ("max_shard_size", "save_original_format", "save_peft_format", "safe_serialization", "tags")
#: under this name Accelerate keeps the forward that it wrapped for mixed precision
_WRAPPED = "_original_forward"


def save_as_host(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    *,
    allow_unloadable: bool = False,
    **options: Any,
) -> None:
    """Write a converted model into any folder, beside what lies there, as ``PreTrainedModel.save_pretrained`` does.

    Each file takes the place of one of its name, but for a README.md that is not ours.

    Args:
        model: the converted model.
        save_directory: the folder, made where it does not exist.
        is_main_process: of several processes, whether this is the one that writes.
        state_dict: of the model, where it was gathered elsewhere.
        push_to_hub: also send it to the Hub, to ``repo_id``, else to one of the folder's name.
        allow_unloadable: as for `ltm_retrofit.save_pretrained`.
        options: those of ``push_to_hub``; and of transformers' method what has no effect here.

    Raises:
        CheckpointError, UnsupportedBlock: as from `ltm_retrofit.save_pretrained`, and on an option that cannot be
            followed; nothing was written.
    """
    repo = options.pop("repo_id", None)
    sending = {name: options.pop(name) for name in _SENDING if name in options}
    _refuse_options(options, "save_pretrained")
    if not is_main_process:
        return
    target = Path(save_directory).expanduser()
    with _unwrapped(model):
        contents = contents_of(model, False, allow_unloadable, state_dict)
    try:
        kept = (target / CARD).exists() and not is_ours_by(target / CONFIG, CARD)
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".saving.", dir=target) as room:
            contents.write(Path(room), target.resolve().name)
            for file in Path(room).iterdir():
                if not (kept and file.name == CARD):
                    file.replace(target / file.name)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    if push_to_hub:
        push_as_host(model, repo or target.resolve().name, allow_unloadable=allow_unloadable, **sending)


#: options that `ltm_retrofit.push_to_hub` knows
_SENDING = ("token", "private", "revision", "commit_message", "create_pr")


def push_as_host(model: nn.Module, repo_id: str, *, allow_unloadable: bool = False, **options: Any) -> str:
    """Send a converted model to the Hub, as ``PreTrainedModel.push_to_hub`` does.

    Args:
        model: the converted model.
        repo_id: ``"user/name"``, or a name in one's own namespace.
        allow_unloadable: as for `ltm_retrofit.push_to_hub`.
        options: likewise; and of transformers' method what has no effect here.

    Raises:
        CheckpointError, UnsupportedBlock: as from `ltm_retrofit.push_to_hub`.
    """
    sending = {name: options.pop(name) for name in _SENDING if name in options}
    _refuse_options(options, "push_to_hub")
    with _unwrapped(model):
        return push_to_hub(model, repo_id, allow_unloadable=allow_unloadable, **sending)


def _refuse_options(options: Mapping[str, Any], method: str) -> None:
    """Refuse options that were given, and would change what a folder of ours is."""
    if refused := [name for name, value in options.items() if value and name not in _WITHOUT_EFFECT]:
        raise CheckpointError(
            f"{method} of a converted model does not take {', '.join(sorted(refused))}: leave it out, or call "
            "ltm_retrofit.restore(model) and save the host"
        )


@contextmanager
def _unwrapped(model: nn.Module) -> Iterator[None]:
    """Let the model run as it will once it is loaded: without the mixed precision that Accelerate wrapped it in."""
    wrapped = model.__dict__.get("forward")
    if wrapped is None or isinstance(wrapped, Interceptor):
        yield
        return
    own = model.__dict__.get(_WRAPPED)
    del model.__dict__["forward"]
    if isinstance(own, Interceptor):
        model.__dict__["forward"] = own
    try:
        yield
    finally:
        model.__dict__["forward"] = wrapped
