"""What does a name stand for, and how is it read? Folders of ours, of timm and of transformers; names; Hub ids.

Over 400 lines: each kind of folder says in its own way what it holds, and each is checked before anything is built.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltm_retrofit.config import LTMConfig, check_keys
from ltm_retrofit.convert import replan, restore, retrofit
from ltm_retrofit.converted.record import LOADED, align, is_retrofitted, was_finetuned
from ltm_retrofit.converted.resizing import example_of, planned_size, set_size, size_from
from ltm_retrofit.errors import AlreadyRetrofitted, BaseMismatch, CheckpointError, RecipeError, check_choice
from ltm_retrofit.finding.example import KEPT, read_processor
from ltm_retrofit.folders import OURS
from ltm_retrofit.hub import fetch, is_repository
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.saving.adapter import attach
from ltm_retrofit.saving.base import (
    ATTENTION,
    configured,
    create_timm,
    differing,
    is_ours,
    load_exactly,
    public_class,
    rebuild_base,
)
from ltm_retrofit.saving.save import CONFIG, FORMAT_VERSION, PROCESSOR, WEIGHTS, digest

#: the model that comes with the package
EMBEDDED = "digits_vit"
_ASSETS = Path(__file__).parent.parent / "assets"
_KEYS = ("format", "format_version", "versions", "base", "rebuildable", "reason", "plan", "dtypes", "sha256", "files")
_OPTIONAL = ("adapter", "labels", "resized", "model_type", "transformers_weights", "tuned_from")
#: where a recipe's run puts its model
_OF_A_RUN = "model"
#: format versions; 3 says to transformers what it is
_READ = (2, FORMAT_VERSION)


class LoadedModel(NamedTuple):
    """A model in eval mode, and where it came from, in words."""

    model: nn.Module
    origin: str


def from_pretrained(
    path: str | os.PathLike[str],
    base: nn.Module | None = None,
    *,
    flops: float | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load what `save_pretrained` wrote: a converted model in eval mode, its logits equal bit for bit.

    Args:
        path: the folder, or the id of one on the Hugging Face Hub.
        base: the original model, changed in place and returned, where it is of a class that cannot be rebuilt from a
            file: its weights do not matter, all come from the folder. For an adapter the checkpoint it was trained on;
            left out, that is fetched from the Hub, if it came from there.
        flops: another budget than that of the folder, see `replan`: the share of the original's MACs. Where the
            folder's plan was chosen by images, the rule ``"auto"`` chooses now, and a warning says so.
        dtype: of the weights, ``torch.bfloat16`` or ``"bfloat16"``; as they were saved where it is left out or
            ``"auto"``. Statistics stay in float32.
        device_map: the device, ``"cuda"``, ``0`` or ``{"": 0}``; ``"auto"`` is the accelerator where there is one. A
            model lies on one device.
        attn_implementation: of a transformers model, ``"eager"`` or ``"sdpa"``; as it was saved where it is left out.
        token: of an account on the Hub that may read a private or gated repository.
        cache_dir: where downloads are kept, instead of the Hub's usual cache.
        revision: a branch, tag or commit of the repository.
        local_files_only: ask nobody, take what the cache holds.

    Raises:
        CheckpointError: where the folder is missing, altered or truncated, or ``base`` is needed.
        BaseMismatch: where ``base`` is another architecture, or not the adapter's; where the plan's method is not
            registered, or in another version.
        AlreadyRetrofitted: where ``base`` is converted.
        BudgetError: where ``flops`` cannot be met.
        RecipeError: where ``flops``, ``dtype``, ``device_map`` or ``attn_implementation`` is none that can be.

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
    numbers, device = as_dtype(dtype), as_device(device_map)
    if base is not None and is_retrofitted(base):
        raise AlreadyRetrofitted(f"base, a {type(base).__name__}, is converted: call ltm_retrofit.restore(base) first")
    if base is not None and attn_implementation is not None:
        raise RecipeError("give base or attn_implementation, not both: the base has its own, set it there")
    folder = Path(path).expanduser()
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    if not folder.exists() and is_repository(str(path)):
        folder = fetch(str(path), revision=revision, **hub)
    folder = model_within(folder)
    config, plan = _read_config(folder)
    if attn_implementation is not None:
        if config["base"].get("library") != "transformers":
            raise RecipeError(
                f"attn_implementation={attn_implementation!r} is for models of transformers, and {folder} holds a "
                f"{config['base'].get('class')} of {config['base'].get('library')}: leave it out"
            )
        check_choice(attn_implementation, ATTENTION, "attn_implementation")
        config["base"] = {**config["base"], "attn_implementation": attn_implementation}
    adapter = config.get("adapter")
    if base is None and not config["rebuildable"] and not (adapter and config["base"].get("id")):
        raise CheckpointError(
            f"{folder} was made from a {config['base'].get('class')} that cannot be rebuilt from it "
            f"({config['reason']}): pass from_pretrained(path, base=<that model, as it was before conversion>)"
        )
    state = _read_weights(folder, config["sha256"])
    if adapter is not None:
        model = base if base is not None else fetch_base(config["base"], adapter, hub)
        model = attach(model, adapter, plan, state, config.get("labels") or [])
    else:
        model = rebuild_base(config["base"]) if base is None else base
        _fill(model, plan, state, size_from(config.get("resized")), folder)
    if (folder / PROCESSOR).is_file() and (processor := read_processor(folder)) is not None:
        model.__dict__[KEPT] = processor
    model.__dict__[LOADED] = (str(folder.absolute()), config["sha256"])
    if flops is not None:
        replan(model, _at_another_budget(plan.config, flops))
    if numbers is not None:
        model.to(numbers)
        if hasattr(model, "config"):
            model.config.dtype = numbers
    return (model if device is None else model.to(device)).eval()


def model_within(folder: Path) -> Path:
    """Return the folder of the model that a recipe's run wrote into this folder; itself where it is none of a run."""
    inner = folder / _OF_A_RUN
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def before_tuning(path: str | os.PathLike[str]) -> nn.Module | None:
    """Load the converted model that a folder's model was tuned from, by what the folder says; None where it is gone."""
    folder, seen = model_within(Path(path).expanduser()), set[Path]()
    while (folder / CONFIG).is_file() and folder.resolve() not in seen:
        seen.add(folder.resolve())
        said = _read_config(folder)[0].get("tuned_from")
        if not isinstance(said, dict):
            return None
        folder = folder / str(said.get("path"))
        if not (folder / WEIGHTS).is_file() or digest(folder / WEIGHTS) != said.get("sha256"):
            return None
        model = from_pretrained(folder)
        if not was_finetuned(model):  # else that was tuned from another one
            return model
    return None


def _at_another_budget(config: LTMConfig, flops: float) -> LTMConfig:
    if config.schedule == "calibrated":
        warnings.warn(
            f"the plan of this folder was chosen by images, and there are none here: the schedule "
            f"{LTMConfig.schedule!r} plans for flops={flops:g}. To choose by images again: ltm_retrofit.replan(model, "
            f"LTMConfig(flops={flops:g}, schedule='calibrated'), images=ltm_retrofit.load_images(model, folder))",
            stacklevel=3,
        )
        config = replace(config, schedule=LTMConfig.schedule)
    return replace(config, flops=flops, tokens=None, latency=None)


def _fill(
    model: nn.Module, plan: MergePlan, state: dict[str, Tensor], size: tuple[int, int] | None, folder: Path
) -> None:
    """Convert a base by a stored plan, in place, and give it the stored weights."""
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


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Read a floating dtype as transformers' users write it; None where it stays as it was saved.

    Raises:
        RecipeError: where it is none.
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise RecipeError(f"dtype must be 'auto' or a floating dtype such as torch.bfloat16, got {dtype!r}")
    return found


def as_device(device_map: Any) -> torch.device | None:
    """Read a device map as transformers' users write it, all of it one device; None where it is left out.

    Raises:
        RecipeError: where it is no device, or several.
    """
    entries = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(entries) != 1:
        raise RecipeError(f"device_map has several devices or none, {device_map!r}: a converted model lies on one")
    (entry,) = entries
    if entry in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return None if entry is None else torch.device(entry)
    except (RuntimeError, TypeError) as error:
        raise RecipeError(f"device_map must be a device such as 'cuda:0', or 'auto', got {device_map!r}") from error


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
    if config.get("format_version") not in _READ:
        raise CheckpointError(
            f"{folder} has format version {config.get('format_version')!r}, this ltm_retrofit reads {_READ}: "
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
    folder = model_within(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError) as error:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        raise CheckpointError(
            f"{origin} has no readable {CONFIG} ({error}); it holds {found}. Give a folder saved by ltm_retrofit, timm "
            "or transformers"
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
    return _read_transformers(folder, kind)


def _read_transformers(folder: Path, kind: Any, new: Collection[str] = (), **options: Any) -> nn.Module:
    """Load a folder by a class of transformers; entries of ``new`` may be missing in it."""
    model, loaded = kind.from_pretrained(
        str(folder),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    for what in ("missing_keys", "mismatched_keys"):  # transformers fills them at random and only prints so
        if wrong := sorted(set(map(str, loaded.get(what) or ())) - set(new)):
            raise CheckpointError(f"{folder}: {what.replace('_', ' ')} in its weights: {', '.join(wrong[:5])}")
    assert isinstance(model, nn.Module)
    align(model)
    return model.eval()


def fetch_base(said: Mapping[str, Any], adapter: Mapping[str, Any], hub: Mapping[str, Any]) -> nn.Module:
    """Fetch the checkpoint that an adapter was trained on, and load it as it was before the adapter's classifier.

    Args:
        said: what the adapter's folder says of its base.
        adapter: what it says of itself.
        hub: options of `fetch`.

    Raises:
        CheckpointError: where it cannot be fetched, or does not fit.
    """
    where = f"{said['id']} (revision {said.get('revision') or 'main'}), the base of this adapter,"
    try:
        folder = fetch(said["id"], revision=said.get("revision"), **hub)
    except CheckpointError as error:
        raise CheckpointError(f"{where} is not at hand: {error}. Or pass from_pretrained(path, base=<it>)") from error
    with torch.random.fork_rng(devices=[]):
        try:
            stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if said.get("library") == "timm":
                classes = {"num_classes": stored["num_classes"]} if adapter["new_head"] else {}
                arguments = {**said.get("arguments", {}), **classes}
                return _load_timm(folder, {**stored, "architecture": said["architecture"], "model_args": arguments})
            labels = {name: stored.get(name) for name in ("id2label", "label2id")} if adapter["new_head"] else {}
            kind, config, switches = configured({**said, "config": {**said["config"], **labels}})
            dtype = config.dtype or "auto"
            return _read_transformers(folder, kind, adapter["carried"], config=config, dtype=dtype, **switches)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a foreign file does to a loader
            raise CheckpointError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
