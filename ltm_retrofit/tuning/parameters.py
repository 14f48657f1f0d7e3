"""What trains, and how fast: masks, norms, low-rank additions or everything, each with its rate over the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay  # type: ignore[attr-defined]
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ltm_retrofit.converted.record import learns
from ltm_retrofit.errors import RecipeError, TrainingError
from ltm_retrofit.tuning.classes import new_classifier
from ltm_retrofit.tuning.settings import TrainConfig

#: how much faster masks learn than weights that are trained already (1 to 100 were tried: docs/ablation_mask_1.md)
MASKS_FASTER = 30
#: what modules of timm and transformers that checkpoint are flagged by
CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")


def masks_in(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all learnable masks."""
    return [p for module in model.modules() if learns(module) for p in module.parameters()]


def chosen(model: nn.Module, train: str) -> set[nn.Parameter]:
    """Return the parameters that ``train`` names; a classifier that is new is always among them.

    Raises:
        TrainingError: where it names masks and there is none.
    """
    if train == "all":
        return set(model.parameters())
    found = set(masks_in(model))
    if train != "lora" and not found:
        raise TrainingError(
            f"train={train!r} finds no mask that learns: convert the model with a method whose masks have parameters, "
            "such as 'ltm'"
        )
    if train == "masks+norms":
        norms = (module for module in model.modules() if "Norm" in type(module).__name__)
        # vectors only: a classifier whose class is called after its norm holds a matrix, too
        found |= {p for norm in norms for p in norm.parameters(recurse=False) if p.ndim == 1}
    if train == "lora":
        found |= {p for name, p in model.named_parameters() if ".lora_" in name}
    return found | new_classifier(model)


def choose(model: nn.Module, train: str) -> None:
    """Let the parameters train that ``train`` names, and no others; with ``"all"`` those that did.

    Raises:
        TrainingError: where it names masks and there is none.
    """
    if train != "all":
        training = chosen(model, train)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in training)


@contextmanager
def low_rank(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """With ``train="lora"``, add low-rank matrices (Hu et al. 2021, by peft) beside every linear map, while inside.

    Masks are left out, and a classifier that is new: these train themselves. Afterwards the matrices are merged into
    the weights, whose names are as before.

    Raises:
        TrainingError: where peft is not installed, or nothing is linear.
    """
    if config.train != "lora":
        yield
        return
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise TrainingError("train='lora' needs peft: pip install 'ltm-retrofit[lora]'") from error
    names = _linear_maps(model)
    if not names:
        raise TrainingError(f"train='lora' finds no linear map in {type(model).__name__} to add to")
    settings = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules=names)
    added = LoraModel(model, settings, "default")
    try:
        yield
    finally:
        added.merge_and_unload(progressbar=False)


def _linear_maps(model: nn.Module) -> list[str]:
    """Name the linear maps that are called as modules, masks and a new classifier left out."""
    packed = tuple(name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    masks = {module for mask in model.modules() if learns(mask) for module in mask.modules()}
    classifier = new_classifier(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module not in masks
        and not any(name.startswith(f"{owner}.") for owner in packed)
        and not classifier & set(module.parameters())
    ]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make timm's optimizer of this name over the parameters that train.

    Matrices decay, vectors do not; masks have a rate of their own; with ``layer_decay`` below 1 earlier blocks
    learn more slowly (timm's layers).

    Raises:
        TrainingError: where nothing trains.
        RecipeError: where timm has no such optimizer.
    """
    assert config.lr is not None, "what was left open is decided"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError("no parameter of this model requires a gradient: call model.requires_grad_() first")
    scale = _depth_scales(model, config.layer_decay) if config.layer_decay < 1 else {}
    masks, mask_rate = set(masks_in(model)), config.mask_lr
    if mask_rate is None:
        mask_rate = config.lr * (MASKS_FASTER if config.train in ("all", "masks+norms") else 1)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        rate = mask_rate if parameter in masks else config.lr * scale.get(parameter, 1.0)
        groups.setdefault((rate, config.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    named: list[dict[str, Any]] = [
        {"params": several, "lr": rate, "weight_decay": decay} for (rate, decay), several in groups.items()
    ]
    try:
        optimizer = create_optimizer_v2(named, opt=config.opt, lr=config.lr, weight_decay=0.0)
    except (ValueError, AssertionError, TypeError) as error:
        raise RecipeError(f"opt={config.opt!r}: timm cannot make this optimizer: {error}") from error
    if getattr(optimizer, "is_second_order", False):
        raise RecipeError(f"opt={config.opt!r} needs second derivatives, which merging has none of: take another one")
    return optimizer


def _depth_scales(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return ``decay`` to the number of layers behind each parameter: timm's own layers, else the largest list.

    Raises:
        TrainingError: where the model has neither.
    """
    if hasattr(model, "group_matcher"):
        groups = param_groups_layer_decay(model, layer_decay=decay)
        return {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        and len({type(child) for child in module}) == 1 < len(module)
    ]
    if not lists:
        raise TrainingError(f"{type(model).__name__} has no list of equal blocks: leave layer_decay at 1")
    prefix = f"{max(lists)[1]}."
    depth = len(model.get_submodule(prefix[:-1]))  # type: ignore[arg-type]
    scales, layer = {}, 0
    for name, parameter in model.named_parameters():
        if name.startswith(prefix):
            layer = 1 + int(name[len(prefix) :].partition(".")[0])
        elif layer:
            layer = depth + 1  # what is registered behind the blocks
        scales[parameter] = decay ** (depth + 1 - layer)
    return scales


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total: int) -> LambdaLR:
    """Return a schedule over ``total`` steps: every group's own highest rate, times the factor of timm's schedule.

    Timm's cosine is written out, so that its warm-up scales with each group's rate.
    """
    rising = config.warmup * total

    def cosine(step: int) -> float:
        done = step / max(1, total)
        return (step + 1) / (rising + 1) if step < rising else 0.5 * (1 + math.cos(math.pi * done))

    if config.sched == "cosine":
        return LambdaLR(optimizer, cosine)
    unit = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)  # whose rate is the factor
    theirs, _ = create_scheduler_v2(
        unit,
        sched=config.sched,
        num_epochs=total,
        decay_epochs=max(1, round(0.3 * total)),  # of "step"
        decay_rate=0.1 if config.sched == "step" else 1.0,  # of "poly" it is the power
        warmup_epochs=round(rising),
        warmup_lr=1 / (rising + 1),
        updates_per_epoch=1,
        step_on_epochs=False,
    )

    def factor(step: int) -> float:
        theirs.step_update(step)
        return float(unit.param_groups[0]["lr"])

    return LambdaLR(optimizer, factor)


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Switch the host's own gradient checkpointing on, and off again; it stays on where it was.

    Raises:
        TrainingError: where it has none.
    """
    on = any(getattr(module, name, False) is True for module in model.modules() for name in CHECKPOINTING)
    if not wanted or on:
        yield
        return
    if callable(switch := getattr(model, "set_grad_checkpointing", None)):
        switch(True)
    elif getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    else:
        raise TrainingError(f"{type(model).__name__} has no gradient checkpointing: set checkpointing to false")
    try:
        yield
    finally:
        if callable(switch):
            switch(False)
        else:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
