"""A model with numbers for one without: blocks that repeat are cut away, and every parameter is drawn at random.

A model whose parameters are on the meta device can be planned for, not run. What the proofs need is its structure,
so they run on a twin at native width in which each run of equal blocks is a few blocks long.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.finding.example import Example, mapped
from ltm_retrofit.finding.sites import AttentionSite


def kept_of(macs: float) -> int:
    """Return how many blocks stay of each run of equal ones: fewer where the model is large."""
    return 4 if macs < 5e9 else 2


def is_empty(model: nn.Module) -> bool:
    """Say whether a model's parameters have no numbers."""
    return any(parameter.is_meta for parameter in model.parameters())


def make_twin(
    model: nn.Module, example: Example, *, kept: int | None, seed: int = 0
) -> tuple[nn.Module, Example, dict[str, str]]:
    """Return the twin, its example, and for each block that was cut away the equal one that stands for it.

    ``kept`` blocks stay of each run of equal ones, the last one among them; all where it is None.
    """
    twin, removed = copy.deepcopy(model), dict[str, str]()
    if kept is not None:
        _shorten(twin, kept, removed)
    fill(twin, seed)
    example = _with_numbers(example, seed)
    return twin, example, removed


def fill(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter and every table anew, in place; whole numbers on the meta device become zeros.

    Magnitudes keep activations moderate; nothing is zero, so that no branch is invisible to a proof.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}

    def draw(tensor: Tensor, positive: bool) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim <= 1:
            return (1 + 0.1 * noise.clamp(-3, 3) if positive else 0.1 * noise).to(tensor.dtype)
        fan = max(1, tensor[0].numel())
        return (noise * float(min(0.08, fan**-0.5))).to(tensor.dtype)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in drawn:
                    scale = name == "weight" or "scale" in name or "gamma" in name
                    value = nn.Parameter(draw(parameter, scale), requires_grad=parameter.requires_grad)
                    drawn[id(parameter)] = value
                    drawn[id(value)] = value
                module._parameters[name] = drawn[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and (buffer.is_meta or name in ("running_mean", "running_var")):
                module._buffers[name] = draw(buffer, name == "running_var")


def _shorten(model: nn.Module, kept: int, removed: dict[str, str]) -> None:
    for path, container in list(model.named_modules()):
        if not isinstance(container, (nn.Sequential, nn.ModuleList)) or len(container) <= kept:
            continue
        seen: dict[Any, list[str]] = {}
        for place, (name, child) in enumerate(container.named_children()):
            if not any(parameter.ndim >= 2 for parameter in child.parameters()):
                continue  # a list of dropouts runs beside a list of stages, and costs nothing
            seen.setdefault(_signature(child, place), []).append(name)
        for names in seen.values():
            for name in names[kept - 1 : -1]:
                full = f"{path}.{name}" if path else name
                removed[full] = f"{path}.{names[kept - 2]}" if path else names[kept - 2]
                del container._modules[name]


def _signature(module: nn.Module, place: int) -> Any:
    """What makes two blocks equal: classes, shapes and plain settings; a setting equal to its place is its number."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        settings = sorted(
            (key, value)
            for key, value in vars(child).items()
            if isinstance(value, (bool, int, str)) and not key.startswith("_") and (value != place or value is True)
        )
        sizes = sorted(
            (key, value)
            for key, value in vars(child).items()
            if isinstance(value, tuple) and all(isinstance(entry, int) for entry in value)
        )
        parts.append((name, type(child), tuple(map(repr, settings)), tuple(map(repr, sizes))))
    shapes = [(name, tuple(t.shape)) for name, t in (*module.named_parameters(), *module.named_buffers())]
    return tuple(parts), tuple(shapes)


def _with_numbers(example: Example, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)

    def fill_in(value: Tensor) -> Tensor:
        if not value.is_meta:
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value.dtype)
        return torch.ones(value.shape, dtype=value.dtype)

    return mapped(example, fill_in)


def expand(sites: Sequence[AttentionSite], removed: Mapping[str, str], model: nn.Module) -> list[AttentionSite]:
    """Give every block of the full model the site of the block that stands for it, in the order of the model."""
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    full = list(sites)
    for gone, stands in reversed(list(removed.items())):  # lists within lists first
        for site in list(full):
            if any(_moved(name, stands, gone) for name in (site.block, site.attention)):
                copied = _renamed(site, stands, gone)
                full += [] if copied in full else [copied]
    return sorted(full, key=lambda site: order.get(site.block, 0))


def stands_for(name: str, removed: Mapping[str, str]) -> int:
    """Return how many modules of the full model one of the twin stands for, itself included."""
    names = {name}
    for gone, stands in reversed(list(removed.items())):
        names |= {moved for name in names if (moved := _moved(name, stands, gone))}
    return len(names)


def _moved(name: str, old: str, new: str) -> str | None:
    """Return what a name that lies at or below ``old`` is below ``new``; None where it lies elsewhere."""
    return new + name[len(old) :] if name == old or name.startswith(f"{old}.") else None


def _renamed(site: AttentionSite, old: str, new: str) -> AttentionSite:
    if old == new:
        return site

    def rename(value: Any) -> Any:
        if isinstance(value, str):
            return _moved(value, old, new) or value
        return tuple(rename(entry) for entry in value) if isinstance(value, tuple) else value

    names = {name: rename(getattr(site, name)) for name in ("block", "attention")}
    names |= {name: rename(getattr(site, name)) for name in ("chain", "host") if hasattr(site, name)}
    return dataclasses.replace(site, **names)
