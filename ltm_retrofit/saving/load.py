"""``--model``: what a name stands for, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ltm_retrofit.errors import CheckpointError
from ltm_retrofit.saving.base import public_class
from ltm_retrofit.saving.fetch import fetch
from ltm_retrofit.saving.hub import FORMAT, WEIGHTS, from_pretrained

#: the model that comes with the package
EMBEDDED = "digits_vit"
_ASSETS = Path(__file__).parent.parent / "assets"


class LoadedModel(NamedTuple):
    """A model in eval mode, and where it came from, in words."""

    model: nn.Module
    origin: str


def load_model(name: str) -> LoadedModel:
    """Load a pretrained model by a folder, the embedded model's name, a timm name or a Hub id, in this order.

    Raises:
        CheckpointError: where the name is none of these, or what it stands for cannot be loaded.
    """
    import timm

    name = str(name)
    if Path(name).is_dir():
        return _load_folder(Path(name), f"the folder {name}")
    if name == EMBEDDED:
        if not (_ASSETS / EMBEDDED).is_dir():
            raise CheckpointError(f"this installation lacks the embedded model {EMBEDDED!r} ({_ASSETS / EMBEDDED})")
        return _load_folder(_ASSETS / EMBEDDED, f"the embedded model {EMBEDDED}")
    architecture = name.partition(".")[0]
    if "/" not in name and timm.is_model(architecture):
        return _load_timm_name(name)
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "/", "~")):
        return _load_folder(fetch(name), f"{name} on the Hugging Face Hub")
    raise CheckpointError(
        f"{name!r} is no model: expected an existing folder, {EMBEDDED!r}, a name of timm "
        f"(e.g. 'vit_tiny_patch16_224'{_similar(name)}), or a Hub id 'organisation/name'"
    )


def _similar(name: str) -> str:
    from difflib import get_close_matches

    import timm

    close = get_close_matches(name, timm.list_models(), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _load_timm_name(name: str) -> LoadedModel:
    import timm

    declared = timm.get_pretrained_cfg(name, allow_unregistered=False) if _has_tag(name) else None
    repo = declared.hf_hub_id if declared is not None else None
    if not repo:
        tags = ", ".join(timm.list_pretrained(name.partition(".")[0] + "*")[:5]) or "none"
        raise CheckpointError(f"timm has no pretrained weights on the Hub for {name!r}; there are: {tags}")
    if repo.endswith("/"):
        repo += name
    loaded = _load_folder(fetch(repo), f"{name} of timm (pretrained, from {repo})")
    return loaded


def _has_tag(name: str) -> bool:
    import timm

    architecture, _, tag = name.partition(".")
    return not tag or name in timm.list_pretrained(f"{architecture}.*")


def _load_folder(folder: Path, origin: str) -> LoadedModel:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{origin} has no readable config.json ({error}): expected a folder saved by ltm_retrofit, timm or "
            "transformers"
        ) from error
    if config.get("format") == FORMAT:
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
    raise CheckpointError(
        f"{origin}: its config.json names neither a timm 'architecture' nor a transformers 'model_type'"
    )


def _load_timm(folder: Path, config: dict[str, object]) -> nn.Module:
    import timm

    if not isinstance(config["architecture"], str) or not timm.is_model(config["architecture"]):
        raise CheckpointError(f"timm {timm.__version__} has no architecture {config['architecture']!r}")
    if not (folder / WEIGHTS).is_file():  # timm would look for others, pickles among them
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    settings = config.get("model_args")
    given = settings if isinstance(settings, dict) else {}
    if refused := [key for key in given if key.startswith("pretrained") or key in ("checkpoint_path", "cache_dir")]:
        raise CheckpointError(f"{folder}: model_args may not hold {', '.join(map(repr, refused))}")
    # `num_classes` stands beside `model_args`, and timm up to 1.0.30 writes it there only
    if isinstance(config.get("num_classes"), int):
        given = {"num_classes": config["num_classes"], **given}
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.items()
    }
    model: nn.Module = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True, **arguments)
    return model.eval()


def _load_transformers(folder: Path, config: dict[str, object]) -> nn.Module:
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
