"""What does a name stand for, and how is it read? Folders of ours, of timm and of transformers; names; Hub ids."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltm_retrofit.config import check_keys
from ltm_retrofit.convert import restore, retrofit
from ltm_retrofit.converted.record import is_retrofitted
from ltm_retrofit.converted.resizing import example_of, planned_size, set_size, size_from
from ltm_retrofit.errors import AlreadyRetrofitted, BaseMismatch, CheckpointError, RecipeError
from ltm_retrofit.finding.example import KEPT, read_processor
from ltm_retrofit.folders import OURS
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.saving.adapter import attach
from ltm_retrofit.saving.base import create_timm, differing, is_ours, load_exactly, public_class, rebuild_base
from ltm_retrofit.saving.save import CONFIG, FORMAT_VERSION, PROCESSOR, WEIGHTS, digest

#: seconds until the Hub counts as unreachable
PATIENCE = 6.0
#: never a pickle, never code
_WANTED = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
#: the model that comes with the package
EMBEDDED = "digits_vit"
_ASSETS = Path(__file__).parent.parent / "assets"
_KEYS = ("format", "format_version", "versions", "base", "rebuildable", "reason", "plan", "dtypes", "sha256", "files")
_OPTIONAL = ("adapter", "labels", "resized")


class LoadedModel(NamedTuple):
    """A model in eval mode, and where it came from, in words."""

    model: nn.Module
    origin: str


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

    Example:
        >>> import timm, torch
        >>> import ltm_retrofit as ltm
        >>> tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
        >>> model = ltm.retrofit(timm.create_model("vit_tiny_patch16_224", **tiny).eval())
        >>> ltm.save_pretrained(model, "tiny")
        >>> again, images = ltm.from_pretrained("tiny"), torch.randn(2, 3, 32, 32)
        >>> torch.equal(again(images), model(images))
        True
    """
    folder = Path(path).expanduser()
    if not folder.exists() and is_repository(str(path)):
        folder = fetch(str(path))
    config, plan = _read_config(folder)
    size = size_from(config.get("resized"))
    if base is not None and is_retrofitted(base):
        raise AlreadyRetrofitted(f"base, a {type(base).__name__}, is converted: call ltm_retrofit.restore(base) first")
    if base is None and not config["rebuildable"]:
        raise CheckpointError(
            f"{folder} was made from a {config['base'].get('class')} that cannot be rebuilt from it "
            f"({config['reason']}): pass from_pretrained(path, base=<that model, as it was before conversion>)"
        )
    state = _read_weights(folder, config["sha256"])
    model = rebuild_base(config["base"]) if base is None else base
    if (adapter := config.get("adapter")) is not None:
        return attach(model, adapter, plan, state, config.get("labels") or [])
    own = {key: value for key, value in state.items() if not is_ours(key)}
    if differences := differing(own, model.state_dict()):
        raise BaseMismatch(f"{type(model).__name__} is not the base that {folder} was made from: {differences}")
    # before the conversion, whose proofs run on these weights
    load_exactly(model, own)
    model.eval()
    try:
        set_size(model, size and planned_size(plan))  # the masks are built for the size of the plan
        retrofit(model, plan=plan, example=example_of(plan, model))
    finally:
        set_size(model, size)
    if differences := differing(state, model.state_dict()):
        restore(model)
        raise CheckpointError(f"{folder}: the weights do not fit its plan: {differences}")
    load_exactly(model, state)
    if (folder / PROCESSOR).is_file() and (processor := read_processor(folder)) is not None:
        model.__dict__[KEPT] = processor
    return model.eval()


def load_model(name: str) -> nn.Module:
    """Load a pretrained model, converted or not, in eval mode.

    Args:
        name: a folder (saved by this package, timm or transformers), ``"digits_vit"`` (comes with the package), a name
            of timm's, or an id on the Hugging Face Hub; tried in this order.

    Raises:
        CheckpointError: where the name is none of these, or what it stands for cannot be loaded.

    Example:
        >>> import ltm_retrofit as ltm
        >>> ltm.load_model("digits_vit").num_classes
        10
    """
    return find_model(name).model


def find_model(name: str) -> LoadedModel:
    """Load as `load_model` does, and say where the model came from."""
    import timm

    name = str(name)
    if Path(name).is_dir():
        return _load_folder(Path(name), f"the folder {name}")
    if name == EMBEDDED:
        if not (_ASSETS / EMBEDDED).is_dir():
            raise CheckpointError(f"this installation lacks the embedded model {EMBEDDED!r} ({_ASSETS / EMBEDDED})")
        return _load_folder(_ASSETS / EMBEDDED, f"the embedded model {EMBEDDED}")
    if "/" not in name and timm.is_model(name.partition(".")[0]):
        # asked for here, and not by timm, whose download has no time limit and may be a pickle
        known = timm.is_model_pretrained(name)
        repository = timm.get_pretrained_cfg_value(name, "hf_hub_id") if known else None
        if not repository:
            tags = ", ".join(timm.list_pretrained(name.partition(".")[0] + "*")[:5]) or "none"
            raise CheckpointError(f"timm has no pretrained weights on the Hub for {name!r}; there are: {tags}")
        return _load_folder(fetch(repository), f"{name} of timm (pretrained, from {repository})")
    if is_repository(name):
        return _load_folder(fetch(name), f"{name} on the Hugging Face Hub")
    close = get_close_matches(name, timm.list_models(), n=1)
    raise CheckpointError(
        f"{name!r} is no model: expected an existing folder, {EMBEDDED!r}, a name of timm (e.g. 'vit_tiny_patch16_224'"
        f"{f'; did you mean {close[0]!r}?' if close else ''}), or a Hub id 'organisation/name'"
    )


def _read_config(folder: Path) -> tuple[dict[str, Any], MergePlan]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: expected one that save_pretrained wrote")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable {CONFIG}: {error}") from error
    if not isinstance(config, dict) or config.get("format") != OURS:
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
    try:
        return config, MergePlan.from_dict(config["plan"])
    except (RecipeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: the plan cannot be read: {error}") from error


def _read_weights(folder: Path, expected: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        if (found := digest(file)) != expected:
            raise CheckpointError(
                f"{file} is not what was saved: its SHA-256 is {found[:12]}…, {CONFIG} says {str(expected)[:12]}…. It "
                "was truncated or altered; copy it again"
            )
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _load_folder(folder: Path, origin: str) -> LoadedModel:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{origin} has no readable {CONFIG} ({error}): expected a folder saved by ltm_retrofit, timm or "
            "transformers"
        ) from error
    if config.get("format") == OURS:
        return LoadedModel(from_pretrained(folder), f"{origin}, converted by ltm_retrofit")
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(f"{origin} holds no safetensors: other formats can run code and are not read")
    with torch.random.fork_rng(devices=[]):
        try:
            if "architecture" in config:
                return LoadedModel(_load_timm(folder, config), f"{origin}, in timm's format")
            if "model_type" in config or "architectures" in config:
                return LoadedModel(_load_transformers(folder, config), f"{origin}, in transformers' format")
        except CheckpointError:
            raise
        except Exception as error:  # whatever a foreign file does to a loader
            raise CheckpointError(f"{origin} cannot be loaded: {type(error).__name__}: {error}") from error
    raise CheckpointError(f"{origin}: its {CONFIG} names neither a timm 'architecture' nor a transformers 'model_type'")


def _load_timm(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    if not (folder / WEIGHTS).is_file():  # timm would look for others, pickles among them
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    arguments = dict(config.get("model_args") or {})
    # `num_classes` stands beside `model_args`, and timm up to 1.0.30 writes it there only
    if isinstance(config.get("num_classes"), int):
        arguments.setdefault("num_classes", config["num_classes"])
    source = f"local-dir:{folder.resolve()}"
    return create_timm(config["architecture"], arguments, f"{folder}", source, pretrained=True).eval()


def _load_transformers(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    import transformers

    named = config.get("architectures")
    kind = public_class(named[0]) if isinstance(named, list) and named else transformers.AutoModelForImageClassification
    model, loaded = kind.from_pretrained(
        str(folder), use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True
    )
    for what in ("missing_keys", "mismatched_keys"):  # transformers fills them at random and only prints so
        if wrong := sorted(map(str, loaded.get(what) or ())):
            raise CheckpointError(f"{folder}: {what.replace('_', ' ')} in its weights: {', '.join(wrong[:5])}")
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        # mapped straight from the file, weights lie at odd addresses, and products come out a rounding apart from
        # those of the same weights anywhere else
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model.eval()


# ------------------------------------------------------------ the Hub


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
