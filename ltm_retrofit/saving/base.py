"""What a base model can be rebuilt from, and the proof that it can: no name is ever imported because a file says so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.record import disabled, get_plan, is_retrofitted, load_state
from ltm_retrofit.converted.resizing import present_example
from ltm_retrofit.errors import CheckpointError, DataError, RetrofitError
from ltm_retrofit.finding.example import home, prepare_example, run
from ltm_retrofit.finding.proofs import all_equal
from ltm_retrofit.saving.arguments import LOADING, timm_arguments
from ltm_retrofit.scopes.base import CHILD
from ltm_retrofit.tuning.preprocessing import RECORDED, REFUSED, preprocessing_of
from ltm_retrofit.undisturbed import undisturbed

#: of timm's ``pretrained_cfg``: what says how to feed the model; nothing that names a place to load from
_SPOKEN_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "reverse", REFUSED)
_DATA_KEYS = (
    "tag",
    "input_size",
    "test_input_size",
    "min_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "pool_size",
    "first_conv",
    "classifier",
    "license",
    "label_names",
    "label_descriptions",
)
#: arguments that leave the architecture's own checkpoint recognisable
_MILD = {"num_classes", "img_size", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "dynamic_img_size"}
#: a name with a slash is a kernel on the Hub, that is code
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def record_base(model: nn.Module) -> dict[str, Any]:
    """Say what a base model, converted or not, can be rebuilt from; read off the live model."""
    return examine_base(model)[0]


def examine_base(model: nn.Module) -> tuple[dict[str, Any], str | None]:
    """Return the narrowest record that rebuilds the model and None, or the first record and why it does not."""
    first: tuple[dict[str, Any], str | None] | None = None
    for record in _records(model):
        reason = verify_base(model, record)
        if reason is None:
            return record, None
        first = first or (record, reason)
    assert first is not None
    return first


def rebuild_base(record: Mapping[str, Any]) -> nn.Module:
    """Build a recorded architecture, randomly initialised; the global random state stays as it is.

    Raises:
        CheckpointError: where the record names nothing that timm's registry or transformers' public classes have.
    """
    library = record.get("library")
    with torch.random.fork_rng(devices=[]):
        try:
            if library == "timm" and "architecture" in record:
                model = _rebuild_timm(record)
            elif library == "transformers" and "config" in record:
                model = _rebuild_transformers(record)
            else:
                raise CheckpointError(
                    f"{record.get('class')!r} of {library!r} is neither in timm's registry nor a class of transformers"
                )
        except CheckpointError:
            raise
        except Exception as error:  # the record is foreign input: whatever its values do to a constructor
            raise CheckpointError(f"the recorded base cannot be built: {type(error).__name__}: {error}") from error
    for name, dtype in record.get("buffers", {}).items():
        owner, _, leaf = name.rpartition(".")
        try:
            buffers = model.get_submodule(owner)._buffers
            buffers[leaf] = buffers[leaf].to(getattr(torch, dtype))  # type: ignore[union-attr]
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(f"the recorded base has no buffer {name!r} of dtype {dtype!r}") from error
    return model.eval()


def verify_base(model: nn.Module, record: Mapping[str, Any]) -> str | None:
    """Rebuild, load the model's own weights, compare outputs bit for bit. None where all holds, else the reason.

    The model may be converted; it is left as it was.
    """
    try:
        rebuilt = rebuild_base(record)
        state = base_state(model)
        if differences := differing(state, rebuilt.state_dict()):
            return "rebuilt from its record it has other weights: " + "; ".join(differences[:5])
        load_exactly(rebuilt, state)
        rebuilt.to(home(model)[0])
        converted = is_retrofitted(model)
        example = present_example(model) if converted else prepare_example(model, None)
        with torch.no_grad(), undisturbed(model), disabled(model) if converted else nullcontext():
            expected = run(model, example)
        with torch.no_grad(), undisturbed(rebuilt):
            given = run(rebuilt, example)
    except RetrofitError as error:
        return str(error)
    except Exception as error:  # a rebuilt model that is another one may fail in any way
        return f"rebuilt from its record it does not run: {type(error).__name__}: {error}"
    return None if all_equal(given, expected) else "rebuilt from its record, with the same weights, its outputs differ"


def is_ours(key: str) -> bool:
    """Say whether an entry of a converted model's state dict is the conversion's: no host has a name of ours."""
    return CHILD in key.split(".")


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the base itself."""
    state: dict[str, Tensor] = model.state_dict()
    if not is_retrofitted(model):
        return state
    return {key: value for key, value in state.items() if not is_ours(key)}


def differing(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """List keys and shapes in which two state dicts differ."""
    lines = [f"{key} is missing" for key in expected if key not in given]
    lines += [f"{key} is unexpected" for key in given if key not in expected]
    lines += [
        f"{key} is {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    return lines


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load strictly, dtypes included; parameters stay the same objects, so that ties and ``requires_grad`` hold."""
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            stored = state.get(f"{prefix}.{name}" if prefix else name)
            if tensor is None or stored is None or stored.dtype == tensor.dtype:
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(stored.dtype)
            else:
                module._buffers[name] = tensor.to(stored.dtype)
    load_state(model, state)


def public_class(name: object) -> Any:
    """Return a model class of transformers by name, and nothing else.

    Raises:
        CheckpointError: where transformers has no such model class.
    """
    import transformers

    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known or getattr(kind, "config_class", None) is None:
        raise CheckpointError(f"{name!r} is no model class of transformers: only those are ever built from a file")
    return kind


def _records(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Go through what the model may be rebuilt from, the narrowest first."""
    library = type(model).__module__.partition(".")[0]
    record: dict[str, Any] = {"library": library, "class": type(model).__name__, "id": None, "revision": None}
    floats = {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.dtype != torch.float32 and not _persistent(model, name)
    }
    if floats:
        record["buffers"] = floats
    declared = getattr(model, "pretrained_cfg", None)
    if library == "timm" and isinstance(declared, Mapping) and declared.get("architecture"):
        data = {key: declared[key] for key in _DATA_KEYS if declared.get(key) is not None}
        for arguments in timm_arguments(model):
            named = {"id": None, "revision": None}
            if set(arguments) <= _MILD and declared.get("hf_hub_id"):  # otherwise those weights cannot be in it
                named = {"id": declared["hf_hub_id"], "revision": declared.get("hf_hub_revision")}
            yield {**record, **named, "architecture": declared["architecture"], "arguments": arguments, "data": data}
    elif library == "transformers" and hasattr(model, "config"):
        config: Any = model.config
        values = json.loads(config.to_json_string(use_diff=False))
        record |= {
            "id": getattr(config, "_name_or_path", None) or None,
            "revision": getattr(config, "_commit_hash", None),
            "model_type": config.model_type,
            "attn_implementation": getattr(config, "_attn_implementation", None),
            "config": _public(values),
            "data": _spoken(model),
        }
        yield record
        classes = get_plan(model).classes if is_retrofitted(model) else len(values["id2label"])
        if classes != len(values["id2label"]):  # a classifier was replaced by hand, and the configuration was not told
            names = [f"LABEL_{index}" for index in range(classes)]
            labels = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
            yield {**record, "config": {**record["config"], **labels}}
    else:
        yield record


def _persistent(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(owner)._non_persistent_buffers_set


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _refuse(given: Iterable[str], allowed: Iterable[str] | None, forbidden: Iterable[str], where: str) -> None:
    bad = [key for key in given if key in set(forbidden) or (allowed is not None and key not in set(allowed))]
    if bad:
        raise CheckpointError(f"{where} may not hold {', '.join(map(repr, bad))}")


def _rebuild_timm(record: Mapping[str, Any]) -> nn.Module:
    import timm

    name, arguments, data = record["architecture"], record.get("arguments", {}), record.get("data", {})
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(f"timm {timm.__version__} has no architecture {name!r}")
    _refuse(arguments, None, LOADING, "the arguments of a recorded timm model")
    _refuse(data, _DATA_KEYS, (), "the data settings of a recorded timm model")
    built: nn.Module = timm.create_model(
        name, pretrained=False, pretrained_cfg_overlay=_tuples(data) or None, **_tuples(arguments)
    )
    return built


def _public(values: Any) -> Any:
    """Leave out of a config, at any depth, what is private or could make loading fetch code."""
    if isinstance(values, Mapping):
        return {
            key: _public(value)
            for key, value in values.items()
            if not str(key).startswith("_") and key not in ("auto_map", "attn_implementation", "quantization_config")
        }
    return [_public(value) for value in values] if isinstance(values, list) else values


def _rebuild_transformers(record: Mapping[str, Any]) -> nn.Module:
    import transformers

    kind, model_type, attention = public_class(record.get("class")), record.get("model_type"), None
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"transformers {transformers.__version__} has no model type {model_type!r}")
    config = transformers.CONFIG_MAPPING[model_type].from_dict(_public(record["config"]))
    if not isinstance(config, kind.config_class):
        raise CheckpointError(f"{kind.__name__} takes a {kind.config_class.__name__}, not one of {model_type!r}")
    if (attention := record.get("attn_implementation")) is not None:
        if attention not in _ATTENTION:
            raise CheckpointError(f"attn_implementation must be one of {', '.join(_ATTENTION)}, got {attention!r}")
        config._attn_implementation = attention
    dtype, config.dtype = config.dtype, None  # built in float32: stored weights bring their own dtype
    model: nn.Module = kind(config)
    model.config.dtype = dtype
    if data := record.get("data"):
        _refuse(data, _SPOKEN_KEYS, (), "the data settings of a recorded transformers model")
        model.__dict__[RECORDED] = _tuples(data)
    return model


def _spoken(model: nn.Module) -> dict[str, Any]:
    """What a transformers model's image processor says, which no config.json of ours would bring back."""
    try:
        wanted = preprocessing_of(model)
    except DataError as error:
        return {REFUSED: str(error)}
    return {
        "mean": list(wanted.mean),
        "std": list(wanted.std),
        "interpolation": wanted.interpolation,
        "crop_pct": wanted.crop_pct,
        "crop_mode": wanted.crop_mode,
        **({"reverse": True} if wanted.reverse else {}),
    }
