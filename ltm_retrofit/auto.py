"""Import this, and the Auto classes of transformers load what `ltm_retrofit.save_pretrained` wrote.

>>> import transformers
>>> import ltm_retrofit as ltm
>>> import ltm_retrofit.auto
>>> host = transformers.ViTForImageClassification(
...     transformers.ViTConfig(hidden_size=48, num_attention_heads=3, intermediate_size=96, num_hidden_layers=4,
...                            image_size=32, patch_size=4, num_labels=7))
>>> ltm.save_pretrained(ltm.retrofit(host), "saved")
>>> model = transformers.AutoModelForImageClassification.from_pretrained("saved")
>>> type(model).__name__, ltm.is_retrofitted(model)
('ViTForImageClassification', True)

A folder says ``model_type: ltm_retrofit``, not its host's type: without this import transformers does not know it, and
says so. Under the host's type it would load the host, leave the masks aside, and run unmerged without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ltm_retrofit.errors import BaseMismatch, CheckpointError, RecipeError
from ltm_retrofit.folders import OURS
from ltm_retrofit.saving.base import auto_class, loads, public_class
from ltm_retrofit.saving.load import from_pretrained
from ltm_retrofit.saving.save import CONFIG

#: what an Auto class is given of the options of `ltm_retrofit.from_pretrained`
_KNOWN = set("dtype device_map attn_implementation token cache_dir revision local_files_only".split())
#: what it is given beside, and what needs nothing done
_WITHOUT_EFFECT = set(
    "_from_auto _from_pipeline trust_remote_code adapter_kwargs use_safetensors low_cpu_mem_usage weights_only "
    "torch_dtype name_or_path".split()
)


class RetrofitConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The ``config.json`` of a converted model, as transformers wants to see it; the model itself has its host's.

    ``base`` describes the host, ``plan`` what is merged; ``id2label`` names the classes.
    """

    model_type: ClassVar[str] = OURS

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what a folder says.

        Raises:
            RecipeError: on settings to change in it: the weights were trained with those that it has.
        """
        unused = kwargs.pop("return_unused_kwargs", False)
        host = (config_dict.get("base") or {}).get("config") or {}
        more = {name: host[name] for name in ("id2label", "label2id") if host.get(name)}
        config = cls(**config_dict, **more, **{"name_or_path": kwargs.pop("name_or_path", "")})
        if unused:
            return config, kwargs
        _check_options(kwargs)
        return config


class Door:
    """Stands behind one Auto class of transformers for folders of ours."""

    auto: Any = None

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **options: Any) -> nn.Module:
        """Load the host's class, converted.

        Raises:
            BaseMismatch: where the Auto class is for other models than the folder's host.
            RecipeError: on an option that a converted model cannot follow.
            CheckpointError: as from `ltm_retrofit.from_pretrained`.
        """
        _check_options({**options, **{f"the positional argument {value!r}": True for value in args}})
        if config is not None:
            _check_kind(cls.auto, config.base, name)
        if (old := options.pop("torch_dtype", None)) is not None:
            options.setdefault("dtype", old)
        return from_pretrained(name, **{key: value for key, value in options.items() if key in _KNOWN})

    @classmethod
    def _from_config(cls, config: Any, **_: Any) -> nn.Module:
        raise CheckpointError(
            f"{cls.auto.__name__}.from_config makes random weights, and a converted model's masks come from its "
            "host's: retrofit a host, or load the folder by from_pretrained"
        )


def _check_options(options: Mapping[str, Any]) -> None:
    if refused := sorted(name for name, value in options.items() if value and name not in _KNOWN | _WITHOUT_EFFECT):
        raise RecipeError(
            f"a converted model cannot be loaded with {', '.join(refused)}: it has what it was saved with. Known are "
            f"{', '.join(sorted(_KNOWN))}"
        )


def _check_kind(auto: Any, base: Mapping[str, Any], name: Any) -> None:
    """Refuse a host of another task, or of another library."""
    host = f"{name} holds a converted {base.get('class')}"
    if base.get("library") != "transformers":
        raise BaseMismatch(
            f"{host} of {base.get('library')}, which no Auto class of transformers loads: "
            f"call ltm_retrofit.from_pretrained({str(name)!r})"
        )
    # AutoModel is for all: what it gives of a classifier is that classifier, for the plan is the whole model's
    if auto is not transformers.AutoModel and not loads(auto, public_class(base.get("class"))):
        raise BaseMismatch(
            f"{host}, which {auto.__name__} does not load: use {auto_class(base['class'])}, AutoModel or "
            "ltm_retrofit.from_pretrained"
        )


def _register() -> dict[Any, type[Door]]:
    """Put a door behind every Auto class; return them."""
    AutoConfig.register(OURS, RetrofitConfig, exist_ok=True)
    doors = {}
    for name in dir(transformers):
        if name.startswith("AutoModel") or name == "AutoBackbone":
            auto = getattr(transformers, name)
            doors[auto] = type(name, (Door,), {"auto": auto})
            auto.register(RetrofitConfig, doors[auto], exist_ok=True)
    return doors


_DOORS = _register()
_AutoBackbone: Any = transformers.AutoBackbone
_of_the_hub = _AutoBackbone.from_pretrained.__func__


def _backbone(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
    """AutoBackbone asks the Hub for every name first, which is an error where that is the path of a folder."""
    file = Path(name) / CONFIG
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("model_type") != OURS:
        return _of_the_hub(cls, name, *args, **options)
    config = options.pop("config", None) or AutoConfig.from_pretrained(name)
    return _DOORS[cls].from_pretrained(name, *args, config=config, **options)


_AutoBackbone.from_pretrained = classmethod(_backbone)
