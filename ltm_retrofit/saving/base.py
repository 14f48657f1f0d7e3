"""The base of a saved model: what it can be rebuilt from, and the proof that it can.

No name is ever imported because a file says so: only timm's registry and transformers' public classes are built.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.record import disabled, get_plan, is_retrofitted, load_state
from ltm_retrofit.converted.resizing import present_example
from ltm_retrofit.errors import CheckpointError, RetrofitError
from ltm_retrofit.finding.example import KEPT, home, run
from ltm_retrofit.finding.proofs import all_equal
from ltm_retrofit.hub import origin_of
from ltm_retrofit.scopes.base import CHILD
from ltm_retrofit.undisturbed import undisturbed

#: of timm's ``pretrained_cfg``: what says how to feed the model, nothing that names a place to load from
_DATA_KEYS = set(
    "tag input_size test_input_size min_input_size fixed_input_size interpolation crop_pct test_crop_pct crop_mode "
    "mean std num_classes pool_size first_conv classifier license label_names label_descriptions".split()
)
#: the same of a transformers model, in folders of before its image processor was saved beside it
_SPOKEN_KEYS = {"mean", "std", "interpolation", "crop_pct", "crop_mode", "reverse", "refused"}
#: arguments of ``timm.create_model`` that read files or the network
_LOADING = set(
    "pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict pretrained_filter_fn pretrained_model_args "
    "checkpoint_path cache_dir model_name".split()
)
#: arguments that leave the architecture's own checkpoint recognisable
_MILD = {"num_classes", "img_size", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "dynamic_img_size"}
#: a name with a slash is a kernel on the Hub, that is code
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def describe_base(model: nn.Module) -> dict[str, Any]:
    """Say what a base model, converted or not, is made from; read off the live model, and not tried."""
    return next(_descriptions(model))


def proven_base(model: nn.Module) -> tuple[dict[str, Any], str | None]:
    """Return the narrowest description that rebuilds the model and None; else the first one, and why it does not."""
    tried = []
    for description in _descriptions(model):
        tried.append((description, verify_base(model, description)))
        if tried[-1][1] is None:
            return tried[-1]
    return tried[0]


def rebuild_base(description: Mapping[str, Any]) -> nn.Module:
    """Build a described architecture, randomly initialised; the global random state stays as it is.

    Raises:
        CheckpointError: where it names nothing that timm's registry or transformers' public classes have.
    """
    library = description.get("library")
    with torch.random.fork_rng(devices=[]):
        try:
            if library == "timm" and "architecture" in description:
                model = _rebuild_timm(description)
            elif library == "transformers" and "config" in description:
                model = _rebuild_transformers(description)
            else:
                raise CheckpointError(
                    f"{description.get('class')!r} of {library!r} is neither a class of transformers nor made by "
                    "timm.create_model, which keeps the arguments"
                )
        except CheckpointError:
            raise
        except Exception as error:  # a file is foreign input: whatever its values do to a constructor
            raise CheckpointError(f"the base cannot be built: {type(error).__name__}: {error}") from error
    for name, dtype in description.get("buffers", {}).items():
        try:
            buffer = model.get_buffer(name)
            buffer.data = buffer.to(getattr(torch, dtype))
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"the base has no buffer {name!r} of dtype {dtype!r}") from error
    return model.eval()


def verify_base(model: nn.Module, description: Mapping[str, Any]) -> str | None:
    """Rebuild, load the model's own weights, compare outputs bit for bit. None where all holds, else the reason.

    The model may be converted; it is left as it was.
    """
    try:
        rebuilt = rebuild_base(description)
        state = base_state(model)
        if differences := differing(state, rebuilt.state_dict()):
            return f"rebuilt from its description it has other weights: {differences}"
        load_exactly(rebuilt, state)
        rebuilt.to(home(model)[0])
        converted = is_retrofitted(model)
        example = present_example(model)
        with torch.no_grad(), undisturbed(model), disabled(model) if converted else nullcontext():
            expected = run(model, example)
        with torch.no_grad(), undisturbed(rebuilt):
            given = run(rebuilt, example)
    except RetrofitError as error:
        return str(error)
    except Exception as error:  # a rebuilt model that is another one may fail in any way
        return f"rebuilt from its description it does not run: {type(error).__name__}: {error}"
    return None if all_equal(given, expected) else "rebuilt with the same weights, its outputs differ"


def is_ours(key: str) -> bool:
    """Say whether an entry of a converted model's state dict is the conversion's: no host has a name of ours."""
    return CHILD in key.split(".")


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the base itself."""
    return {key: value for key, value in model.state_dict().items() if not is_ours(key)}


def differing(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Say in which keys and shapes two state dicts differ; an empty text where they do not."""
    lines = [f"{key} is missing" for key in expected if key not in given]
    lines += [f"{key} is unexpected" for key in given if key not in expected]
    lines += [
        f"{key} is {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load strictly, dtypes included; tensors stay the same objects, so that ties and ``requires_grad`` hold."""
    # by every name that a tensor has: the file has them all
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            if name in state and state[name].dtype != tensor.dtype:
                tensor.data = tensor.data.to(state[name].dtype)
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


def auto_class(name: str) -> str:
    """Return the narrowest Auto class of transformers that loads a model class: classifiers, backbones, or all."""
    import transformers

    kind = public_class(name)
    narrow = ("AutoModelForImageClassification", "AutoBackbone")
    return next((auto for auto in narrow if loads(getattr(transformers, auto), kind)), "AutoModel")


def loads(auto: Any, kind: Any) -> bool:
    """Say whether an Auto class loads this model class of transformers."""
    loaded = auto._model_mapping.get(kind.config_class, None)
    return kind in loaded if isinstance(loaded, tuple | list) else kind is loaded


def create_timm(name: object, arguments: Mapping[str, Any], where: str, source: str = "", **options: Any) -> nn.Module:
    """Call ``timm.create_model`` with what a file says.

    Args:
        name: the architecture that the file names.
        arguments: of ``timm.create_model``, as JSON holds them.
        where: the file, for messages.
        source: what to create, where it is not the architecture by its name.
        options: further arguments, of ours.

    Raises:
        CheckpointError: where timm has no such architecture, or an argument would read files or the network.
    """
    import timm

    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(f"timm {timm.__version__} has no architecture {name!r}")
    _refuse(_LOADING & arguments.keys(), f"the arguments of {where}")
    model: nn.Module = timm.create_model(source or name, **options, **_tuples(arguments))
    return model


def _descriptions(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Go through what the model may be rebuilt from, the narrowest first."""
    library = type(model).__module__.partition(".")[0]
    description: dict[str, Any] = {"library": library, "class": type(model).__name__, "id": None, "revision": None}
    stored = model.state_dict().keys()
    floats = {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and buffer.dtype != torch.float32 and name not in stored
    }
    if floats:
        description["buffers"] = floats
    if library == "timm":
        yield description | _describe_timm(model)
    elif library == "transformers" and hasattr(model, "config"):
        config: Any = model.config
        values = json.loads(config.to_json_string(use_diff=False))
        description |= {
            **origin_of(getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)),
            "attn_implementation": getattr(config, "_attn_implementation", None),
            "config": _public(values),
        }
        if isinstance(said := model.__dict__.get(KEPT), Mapping):  # it came out of such a folder, and goes into one
            description["data"] = {key: list(v) if isinstance(v, tuple) else v for key, v in said.items()}
        yield description
        classes = get_plan(model).classes if is_retrofitted(model) else len(values["id2label"])
        if classes != len(values["id2label"]):  # a classifier was replaced by hand, and the configuration was not told
            names = {index: f"LABEL_{index}" for index in range(classes)}
            labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
            yield {**description, "config": {**description["config"], **labels}}
        # what a user gave to the class beside the configuration (add_pooling_layer=False) is kept nowhere: tried
        switches = _switches(type(model))
        for turned in list(product((False, True), repeat=len(switches)))[1:]:
            chosen = [name for name, other in zip(switches, turned, strict=True) if other]
            yield {**description, "arguments": {name: not switches[name] for name in chosen}}
    else:
        yield description


def _switches(kind: type) -> dict[str, bool]:
    """Return the arguments of a class of transformers that are yes or no, and what they are by default."""
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, bool)}


def _describe_timm(model: Any) -> dict[str, Any]:
    """Read what ``timm.create_model`` keeps in a model, and what was changed since by methods of timm's.

    A model that was not made by it keeps nothing: a constructor's arguments cannot be told from its result.
    """
    from timm.models import get_model_args

    declared, kept = getattr(model, "pretrained_cfg", None), getattr(model, "_model_args", None)
    if not isinstance(declared, Mapping) or not declared.get("architecture") or kept is None:
        return {}
    # timm leaves drop rates out of what it exports, but a training that goes on needs them
    kept = {**kept, **get_model_args(model)}
    arguments = {name: value for name, value in kept.items() if _plain(value) and name not in _LOADING}
    data = {key: value for key, value in declared.items() if key in _DATA_KEYS and value is not None}
    description = {"architecture": declared["architecture"], "arguments": arguments, "data": data}
    # a checkpoint fits the architecture as timm has it, or as its own configuration says it
    fits = set(arguments) <= _MILD or declared.get("source") == "hf-hub"
    if fits and declared.get("hf_hub_id"):
        description |= origin_of(declared["hf_hub_id"], declared.get("hf_hub_revision"))
    return description


def _plain(value: object) -> bool:
    """Say whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _refuse(keys: Iterable[str], where: str) -> None:
    if bad := sorted(keys):
        raise CheckpointError(f"{where} may not hold {', '.join(map(repr, bad))}")


def _rebuild_timm(description: Mapping[str, Any]) -> nn.Module:
    data = description.get("data", {})
    _refuse(data.keys() - _DATA_KEYS, "the data settings of a timm base")
    overlay = _tuples(data) or None
    arguments = description.get("arguments", {})
    return create_timm(description["architecture"], arguments, "a timm base", pretrained_cfg_overlay=overlay)


def _public(values: Any) -> Any:
    """Leave out of a config, at any depth, what is private or could make loading fetch code."""
    if isinstance(values, Mapping):
        return {
            key: _public(value)
            for key, value in values.items()
            if not str(key).startswith("_") and key not in ("auto_map", "attn_implementation", "quantization_config")
        }
    return [_public(value) for value in values] if isinstance(values, list) else values


def _rebuild_transformers(description: Mapping[str, Any]) -> nn.Module:
    kind, config, switches = configured(description)
    dtype, config.dtype = config.dtype, None  # built in float32: stored weights bring their own dtype
    model: nn.Module = kind(config, **switches)
    model.config.dtype = dtype
    if data := description.get("data"):
        _refuse(data.keys() - _SPOKEN_KEYS, "the data settings of a transformers base")
        model.__dict__[KEPT] = _tuples(data)
    return model


def configured(description: Mapping[str, Any]) -> tuple[Any, Any, dict[str, bool]]:
    """Return the class of transformers that a description names, its configuration and its switches.

    Raises:
        CheckpointError: where transformers has no such class, or it takes another configuration, or other switches.
    """
    import transformers

    kind, values = public_class(description.get("class")), description["config"]
    model_type = description.get("model_type", values.get("model_type"))  # beside the config up to format version 2
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(f"transformers {transformers.__version__} has no model type {model_type!r}")
    config = transformers.CONFIG_MAPPING[model_type].from_dict(_public(values))
    if not isinstance(config, kind.config_class):
        raise CheckpointError(f"{kind.__name__} takes a {kind.config_class.__name__}, not one of {model_type!r}")
    if (attention := description.get("attn_implementation")) is not None:
        if attention not in ATTENTION:
            raise CheckpointError(f"attn_implementation must be one of {', '.join(ATTENTION)}, got {attention!r}")
        config._attn_implementation = attention
    switches = {name: bool(value) for name, value in description.get("arguments", {}).items()}
    if unknown := sorted(switches.keys() - _switches(kind).keys()):
        raise CheckpointError(f"{kind.__name__} has no switch {', '.join(map(repr, unknown))}")
    return kind, config, switches
