"""What arguments ``timm.create_model`` needs to make a model again, read off the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

#: arguments of ``timm.create_model`` that read files or the network
LOADING = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "model_name",
}


def timm_arguments(model: Any) -> Iterator[dict[str, Any]]:
    """Arguments of ``timm.create_model``: those that timm remembers (1.0.31 on), the usual few, all that can be read.

    What timm remembers comes first: outputs alone do not tell, say, a model that takes any input size.
    """
    parameters: dict[str, inspect.Parameter] = {}
    for kind in type(model).__mro__[:-1]:  # with **kwargs the parents' arguments count as well
        if kind is not nn.Module and "__init__" in vars(kind):
            parameters = {**inspect.signature(vars(kind)["__init__"]).parameters, **parameters}
    readings = {name: getattr(model, name) for name in parameters if _argument(getattr(model, name, None))}
    patches, blocks = getattr(model, "patch_embed", None), getattr(model, "blocks", None)
    readings |= _read(patches, img_size="img_size", patch_size="patch_size", dynamic_img_pad="dynamic_img_pad")
    readings |= _read(model, reg_tokens="num_reg_tokens", class_token="has_class_token")
    drops = _read(getattr(model, "head_drop", None), drop_rate="p") | _read(
        getattr(model, "pos_drop", None), pos_drop_rate="p"
    )
    drops |= _read(getattr(model, "patch_drop", None), patch_drop_rate="prob")
    if isinstance(blocks, nn.Sequential) and len(blocks):
        block = blocks[len(blocks) - 1]
        attention: Any = getattr(block, "attn", None)
        mlp: Any = getattr(block, "mlp", None)
        readings |= {"depth": len(blocks)} | _read(attention, num_heads="num_heads")
        drops |= _read(attention, attn_drop_rate="attn_drop.p", proj_drop_rate="proj_drop.p")
        drops |= _read(block, drop_path_rate="drop_path1.drop_prob")
        if hasattr(attention, "qkv"):
            readings["qkv_bias"] = getattr(attention.qkv, "bias", None) is not None
            readings["qk_norm"] = not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity)
        if isinstance(getattr(mlp, "fc1", None), nn.Linear):
            readings["mlp_ratio"] = mlp.fc1.out_features / mlp.fc1.in_features
        if hasattr(getattr(block, "ls1", None), "gamma"):
            readings["init_values"] = 1e-5
    present = {
        module: not isinstance(getattr(model, module), nn.Identity)
        for module in ("norm_pre", "norm", "fc_norm")
        if hasattr(model, module)
    }
    if "norm_pre" in present:
        readings["pre_norm"] = present["norm_pre"]
    if {"norm", "fc_norm"} <= present.keys():  # one of the two is the final norm
        readings |= {"fc_norm": present["fc_norm"], "final_norm": present["norm"] or present["fc_norm"]}
    usual = ("num_classes", "in_chans", "img_size", "global_pool")
    few: dict[str, Any] = {name: readings[name] for name in usual if name in readings}
    few |= {name: True for name in ("dynamic_img_size", "dynamic_img_pad") if readings.get(name)}
    drops = {name: value for name, value in drops.items() if value and name in parameters}
    remembered = {
        name: value
        for name, value in getattr(model, "_model_args", {}).items()
        if is_plain(value) and name not in LOADING
    }
    if remembered:
        yield {**drops, **remembered, **few}
    yield {**drops, **few}
    yield {name: value for name, value in {**remembered, **readings, **drops}.items() if name in parameters}


def _argument(value: object) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and is_plain(value))


def _read(owner: object, **paths: str) -> dict[str, Any]:
    """Read ``argument="path.of.attribute"`` off a module where it is there."""
    found = {}
    for argument, path in paths.items():
        value = owner
        for name in path.split("."):
            value = getattr(value, name, None)
        if _argument(value):
            found[argument] = list(value) if isinstance(value, tuple) else value
    return found


def is_plain(value: object) -> bool:
    """Say whether JSON can hold a value."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, dict))
