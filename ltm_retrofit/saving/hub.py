"""save_pretrained, from_pretrained: config.json, model.safetensors and README.md, written all or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.config import check_keys
from ltm_retrofit.convert import restore, retrofit
from ltm_retrofit.converted.classifier import follow_classifier
from ltm_retrofit.converted.record import get_plan, is_retrofitted
from ltm_retrofit.converted.resizing import example_of, planned_size, resized, set_size, size_from
from ltm_retrofit.errors import AlreadyRetrofitted, BaseMismatch, CheckpointError, RecipeError
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.saving.adapter import adapter_state, attach, labels_of
from ltm_retrofit.saving.base import (
    differing,
    examine_base,
    is_ours,
    load_exactly,
    rebuild_base,
    record_base,
)
from ltm_retrofit.saving.card import model_card
from ltm_retrofit.saving.fetch import fetch

FORMAT, FORMAT_VERSION = "ltm_retrofit", 2
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_KEYS = ("format", "format_version", "versions", "base", "rebuildable", "reason", "plan", "dtypes", "sha256", "files")
_OPTIONAL = ("adapter", "labels", "resized")


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    adapter: bool = False,
    report: Any = None,
    recipe: Any = None,
) -> None:
    """Write a converted model into a folder of its own; a failure leaves what was there before.

    Args:
        model: the converted model; it is not changed, but for a plan that did not know of a new classifier yet.
        path: the folder, made where it does not exist.
        overwrite: replace a folder that holds nothing but what this function wrote.
        adapter: write masks, statistics, a new head and what else changed since the conversion, to be attached to the
            base checkpoint by ``from_pretrained(path, base=model)``.
        report: an object with ``to_markdown()`` for the model card.
        recipe: the recipe that made the model, a mapping or text, for the model card.

    Raises:
        NotRetrofitted: where the model is not converted.
        UnsupportedBlock: where its classifier was replaced by one that reads tokens that are gone.
        CheckpointError: where the folder cannot be written, or holds files that are not ours; where so much was
            trained that there is no base left for an adapter; where the model costs other than its plan says.
    """
    get_plan(model)
    target = Path(path).expanduser()
    check_target(target, overwrite)
    follow_classifier(model, thorough=True)
    plan = get_plan(model)
    attached: dict[str, Any] | None = None
    size = resized(model)
    reason: str | None
    if adapter:
        state, attached = adapter_state(model)
        base, reason = record_base(model), "this is an adapter"
    else:
        state = model.state_dict()
        base, reason = examine_base(model)
    if reason is not None and not adapter:
        warnings.warn(
            f"the base {type(model).__name__} cannot be rebuilt from a file ({reason}): loading this folder will need "
            "from_pretrained(path, base=<the original model>)",
            stacklevel=2,
        )
    state = _separate(state)
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {name: version(name) for name in ("ltm-retrofit", "torch", "timm", "transformers")},
        "base": base,
        "rebuildable": reason is None,
        "reason": reason,
        "plan": plan.to_dict(),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        "files": [CONFIG, WEIGHTS, CARD],
    }
    config |= {} if size is None else {"resized": list(size)}
    config |= {} if attached is None else {"adapter": attached, "labels": labels_of(model)}
    card = model_card(target.resolve().name, base, plan, reason, report, recipe)
    target = target.resolve()  # what a symbolic link points to is replaced, not the link
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}. Give a folder that you may write to") from error
    try:
        _write_weights(state, staging / WEIGHTS)
        config["sha256"] = _digest(staging / WEIGHTS)
        (staging / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (staging / CARD).write_text(card, encoding="utf-8")
        staging.chmod(0o755 & ~_umask())  # mkdtemp's folders are for their owner only
        swap(staging, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}. What was there is as it was") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def from_pretrained(path: str | os.PathLike[str], base: nn.Module | None = None) -> nn.Module:
    """Load what `save_pretrained` wrote: a converted model in eval mode, its logits equal bit for bit.

    Args:
        path: the folder, or the id of one on the Hugging Face Hub.
        base: the original model, changed in place and returned, where it is of a class that cannot be rebuilt from a
            file: its weights do not matter, all come from the folder. For an adapter the checkpoint it was trained on.

    Raises:
        CheckpointError: where the folder is missing, altered or truncated, or ``base`` is needed.
        BaseMismatch: where ``base`` is another architecture, or not the adapter's.
        AlreadyRetrofitted: where ``base`` is converted.
    """
    folder = Path(path).expanduser()
    name = str(path)
    if not folder.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = fetch(name)
    config = _read_config(folder)
    plan, size = _read_plan(config["plan"], folder), size_from(config.get("resized"))
    if base is not None and is_retrofitted(base):
        raise AlreadyRetrofitted(f"base, a {type(base).__name__}, is converted: call ltm_retrofit.restore(base) first")
    if (adapter := config.get("adapter")) is not None:
        if base is None:
            raise CheckpointError(
                f"{folder} is an adapter, without the weights of the {config['base'].get('class')} that it was trained "
                "on: pass from_pretrained(path, base=<that model, as it was before conversion>)"
            )
        return attach(base, adapter, plan, _read_weights(folder, config["sha256"]), config.get("labels") or [])
    if base is None and not config["rebuildable"]:
        raise CheckpointError(
            f"{folder} was made from a {config['base'].get('class')} that cannot be rebuilt from a file "
            f"({config['reason']}): pass from_pretrained(path, base=<the original model>)"
        )
    state = _read_weights(folder, config["sha256"])
    model = rebuild_base(config["base"]) if base is None else base
    own = {key: value for key, value in state.items() if not is_ours(key)}
    if differences := differing(own, model.state_dict()):
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise BaseMismatch(
            f"{type(model).__name__} is not the base that {folder} was made from: {'; '.join(differences[:5])}{more}"
        )
    # the host's non-persistent buffers follow the stored dtype only where they are recorded; see base.rebuild_base
    load_exactly(model, own)
    model.eval()
    try:
        set_size(model, size and planned_size(plan))  # converted as it was, at the size of its plan
        retrofit(model, plan=plan, example=example_of(plan, model))
    finally:
        set_size(model, size)
    if differences := differing(state, model.state_dict()):
        restore(model)
        raise CheckpointError(f"{folder}: the weights do not fit its plan: {'; '.join(differences[:5])}")
    load_exactly(model, state)
    return model.eval()


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse to write where something is that is not ours to replace."""
    try:
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file: give a folder")
        present = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}. Give a folder that you may write to") from error
    if not present:
        return
    try:
        config = json.loads((target / CONFIG).read_text(encoding="utf-8"))
        ours = config["files"] if config["format"] == FORMAT else []
        foreign = [name for name in present if name not in ours or not (target / name).is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        foreign = present
    if foreign:
        raise CheckpointError(
            f"{target} holds files that are not ours: {', '.join(foreign[:5])}"
            + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
            + ". Give an empty folder or a new one"
        )
    if not overwrite:
        raise CheckpointError(f"{target} holds a saved model: pass overwrite=True to replace it, or another folder")


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give every entry memory of its own, for safetensors stores no shared memory; tied weights are stored twice."""
    seen: set[int] = set()
    separate = {}
    for key, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        cut = tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes()
        separate[key] = tensor.detach().clone().contiguous() if place in seen or cut else tensor.detach().contiguous()
        seen.add(place)
    return separate


def _write_weights(state: dict[str, Tensor], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be written: {error}") from error


def swap(staging: Path, target: Path) -> None:
    """Put the new folder in the old one's place."""
    if not target.exists():
        staging.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(old)  # onto an empty folder
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: expected one that save_pretrained wrote")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable {CONFIG}: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} was not written by ltm_retrofit.save_pretrained")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {config.get('format_version')!r}, this ltm_retrofit reads {FORMAT_VERSION}: "
            f"load it with the version that wrote it ({(config.get('versions') or {}).get('ltm-retrofit', 'unknown')})"
        )
    try:
        check_keys(config, (*_KEYS, *_OPTIONAL), str(folder / CONFIG))
    except RecipeError as error:
        raise CheckpointError(str(error)) from error
    if missing := [key for key in _KEYS if key not in config]:
        raise CheckpointError(f"{folder / CONFIG} lacks {', '.join(missing)}")
    if not isinstance(config["base"], dict) or not isinstance(config["plan"], dict):
        raise CheckpointError(f"{folder / CONFIG}: base and plan must be mappings")
    return config


def _read_plan(values: Mapping[str, Any], folder: Path) -> MergePlan:
    try:
        return MergePlan.from_dict(values)
    except (RecipeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: the plan cannot be read: {error}") from error


def _read_weights(folder: Path, digest: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        found = _digest(file)
        if found != digest:
            raise CheckpointError(
                f"{file} is not what was saved: its SHA-256 is {found[:12]}…, {CONFIG} says {str(digest)[:12]}…. It "
                "was truncated or altered; copy it again"
            )
        state: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return state
