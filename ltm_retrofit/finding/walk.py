"""What the scopes search: the model and one recorded pass of it, or a twin of a model that is on the meta device.

A model whose parameters are on the meta device can be planned for, not run. What the proofs need is its structure, so
they run on a twin at native width: every parameter is drawn at random, and each run of equal blocks is cut down to a
few blocks. A block of the twin then stands for those that were cut away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import ExampleError
from ltm_retrofit.finding.chains import Chain, find_chains
from ltm_retrofit.finding.example import Example, in_float, mapped, on_meta, run
from ltm_retrofit.finding.layouts import Axes, constant_tokens, find_axes
from ltm_retrofit.finding.recording import Recording, record
from ltm_retrofit.finding.sites import AttentionSite, Refused
from ltm_retrofit.finding.views import Views, find_views
from ltm_retrofit.macs import count_macs_again, count_macs_quick
from ltm_retrofit.undisturbed import copied, undisturbed

#: MACs above which the twin of a model on the meta device is cut short
SHORTENED = 3e9
#: MACs above which it is cut short in any case, and then has no sites in scope GRID
WHOLE = 12e9


@dataclass
class Walk:
    """One search: what it looks at, and what scopes have in common, which is computed when first asked for.

    Args:
        model: with values, so that proofs run on it.
        example: for it.
        full: the whole model, to count on: ``model`` too, but where that is a twin.
        full_example: for it.
        recording: of ``model`` on ``example``.
        removed: blocks of ``full`` that a twin lacks, each with the equal one that stands for it.
        on_meta_macs: MACs of ``full`` where it is on the meta device, else 0.
        settled: numbers of the attentions that have a site in the best scope, once that was searched.
    """

    model: nn.Module
    example: Example
    full: nn.Module
    full_example: Example
    recording: Recording
    removed: dict[str, str] = field(default_factory=dict)
    on_meta_macs: int = 0
    settled: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Walk:
        """Record the model; one on the meta device by a twin, as short as may be."""
        if not is_on_meta(model):
            full, given = model, example
            if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
                # rounding in half precision is as large as what proofs look for; sites hold names and code, no modules
                full, given = copied(model).float(), in_float(example)
            return cls(full, given, full, given, record(full, given))
        macs = _count(*runnable(model, example))
        if macs > SHORTENED:
            with suppress(ExampleError):  # something counts its blocks
                return cls._by_twin(model, example, macs, kept_of(macs))
        return cls._by_twin(model, example, macs, None)

    @classmethod
    def _by_twin(cls, model: nn.Module, example: Example, macs: int, kept: int | None) -> Walk:
        twin, inputs, removed = make_twin(model, example, kept=kept)
        return cls(twin, inputs, model, example, record(twin, inputs), removed, macs)

    def whole(self) -> Walk:
        """Return the same of a twin that lacks no block."""
        return self._by_twin(self.full, self.full_example, self.on_meta_macs, None)

    @cached_property
    def macs(self) -> int:
        """MACs of the full model."""
        return self.on_meta_macs or count_macs_again(self.full, self.full_example, self.recording.macs)

    @cached_property
    def countable(self) -> tuple[nn.Module, Example]:
        """The full model and its example on the meta device, or where it does not run there, with values."""
        return runnable(self.full, self.full_example)

    @cached_property
    def axes(self) -> Axes:
        """In which modules images are not in the first dimension."""
        return find_axes(self.model, self.example, self.recording)

    @cached_property
    def chains(self) -> dict[int, list[Chain] | Refused]:
        """The MLP behind each attention. Large models on the meta device are searched for the best scope only."""
        if self.on_meta_macs > SHORTENED and not self.unsettled:
            return {}
        return find_chains(self.model, self.example, self.recording, self.axes)

    @cached_property
    def views(self) -> dict[int, Views]:
        """The attentions, by number, behind which not all tokens know of the same."""
        return find_views(self.model, self.example, self.recording)

    @cached_property
    def constant_tokens(self) -> dict[int, tuple[int, int]]:
        """Token count → how many constant tokens lead and end a sequence of so many."""
        return constant_tokens(self.model, self.example, self.recording)

    @property
    def unsettled(self) -> list[int]:
        """Numbers of the attentions that have no site in the best scope."""
        return [number for number in range(len(self.recording.attended)) if number not in self.settled]

    def faithful(self) -> bool:
        """Say whether the blocks that stay in a twin receive what they receive in the full model, and are read alike.

        ConViT joins its class token before the eleventh block: in a twin of four there is none. VitPose's classifier
        may read what the fourth of twelve blocks puts out: in a twin of four that would be the last one.
        """
        lists = {name.rpartition(".")[0] for name in self.removed}
        calls = self.recording.calls
        wanted = {c.name: c.shape_in for c in calls if c.name.rpartition(".")[0] in lists and c.shape_in}
        try:
            full = record(*on_meta(self.full, self.full_example))
        except Exception:  # something looks at values, which the meta device has none of
            return False
        given = {call.name: call for call in full.calls}

        def readers(name: str) -> frozenset[str]:
            own = f"{name.rpartition('.')[0]}."
            return frozenset(user for user in full.used.get(given[name].result or 0, ()) if not user.startswith(own))

        for path in lists:
            blocks = [name for name in given if name.rpartition(".")[0] == path]
            if len({readers(name) for name in blocks[:-1]}) > 1:
                return False
        return all(given[name].shape_in == shape for name, shape in wanted.items())

    def spans_blocks(self, site: AttentionSite) -> bool:
        """Say whether a site lies in several of the blocks that a twin was cut among: it cannot be copied to others."""
        lists = {name.rpartition(".")[0] for name in self.removed}

        def blocks(name: str) -> frozenset[str]:
            around = [path for path in lists if name.startswith(f"{path}.")]
            return frozenset(".".join(name.split(".")[: len(path.split(".")) + 1]) for path in around)

        return len({blocks(name) for name in site.parts}) > 1

    def expanded(self, sites: Sequence[AttentionSite]) -> list[AttentionSite]:
        """Give every block of the full model the site of the block that stands for it, in the order of the model."""
        if not self.removed:
            return list(sites)
        order = {name: place for place, (name, _) in enumerate(self.full.named_modules())}
        full = list(sites)
        for gone, stands in reversed(self.removed.items()):  # lists within lists first
            for site in list(full):
                if any(_moved(name, stands, gone) for name in (site.block, site.attention)):
                    copied = _renamed(site, stands, gone)
                    full += [] if copied in full else [copied]
        return sorted(full, key=lambda site: order.get(site.block, 0))

    def stands_for(self, name: str) -> int:
        """Return how many modules of the full model one of the twin stands for, itself included."""
        names = {name}
        for gone, stands in reversed(self.removed.items()):
            names |= {moved for name in names if (moved := _moved(name, stands, gone))}
        return len(names)


def runnable(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Return copies on the meta device, where counting is cheap, or where they do not run there, some with values."""
    empty, inputs = on_meta(model, example)
    with suppress(Exception), undisturbed(empty), torch.no_grad():
        run(empty, inputs)
        return empty, inputs
    # something looks at values, or a constant lives on a device
    return make_twin(model, example, kept=None)[:2] if is_on_meta(model) else (model, example)


def _count(model: nn.Module, example: Example) -> int:
    with undisturbed(model), torch.no_grad():
        return count_macs_quick(lambda: run(model, example))


# ---------------------------------------------------------------------------------------------------------------- twin


def kept_of(macs: float) -> int:
    """Return how many blocks stay of each run of equal ones: fewer where the model is large."""
    return 4 if macs < 5e9 else 2


def is_on_meta(model: nn.Module) -> bool:
    """Say whether any of a model's parameters is on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


def make_twin(
    model: nn.Module, example: Example, *, kept: int | None, seed: int = 0
) -> tuple[nn.Module, Example, dict[str, str]]:
    """Return the twin, its example, and for each block that was cut away the equal one that stands for it.

    ``kept`` blocks stay of each run of equal ones, the last one among them; all where it is None.
    """
    twin = copied(model)
    removed = {} if kept is None else _shorten(twin, kept)
    fill(twin, seed)
    return twin, _filled(example, seed), removed


def fill(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter and every table anew, in place; whole numbers on the meta device become zeros.

    Magnitudes keep activations moderate; nothing is zero, so that no branch is invisible to a proof.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}  # shared parameters stay shared

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


def _filled(example: Example, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)

    def fill_in(value: Tensor) -> Tensor:
        if not value.is_meta:
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value.dtype)
        return torch.ones(value.shape, dtype=value.dtype)

    return mapped(example, fill_in)


def _shorten(model: nn.Module, kept: int) -> dict[str, str]:
    removed: dict[str, str] = {}
    for path, container in list(model.named_modules()):
        if not isinstance(container, (nn.Sequential, nn.ModuleList)) or len(container) <= kept:
            continue
        seen: dict[Any, list[str]] = {}
        for place, (name, child) in enumerate(container.named_children()):
            if not any(parameter.ndim >= 2 for parameter in child.parameters()):
                continue  # a list of dropouts runs beside a list of stages, and costs nothing
            seen.setdefault(_likeness(child, place), []).append(name)
        for names in seen.values():
            # the last one stays, since others may read it; the one before it stands for what is cut away
            for name in names[kept - 1 : -1]:
                full = f"{path}.{name}" if path else name
                removed[full] = f"{path}.{names[kept - 2]}" if path else names[kept - 2]
                del container._modules[name]
    return removed


def _likeness(module: nn.Module, place: int) -> Any:
    """What makes two blocks equal: classes, shapes and plain settings; a setting equal to its place is its number."""

    def plain(name: str, value: Any) -> bool:
        if isinstance(value, tuple):
            return all(isinstance(entry, int) for entry in value)
        if not isinstance(value, (bool, int, str)) or name.startswith("_"):
            return False
        return value is True or value != place

    parts = [
        (name, type(child), tuple(sorted(repr(item) for item in vars(child).items() if plain(*item))))
        for name, child in module.named_modules()
    ]
    shapes = [(name, tuple(t.shape)) for name, t in (*module.named_parameters(), *module.named_buffers())]
    return tuple(parts), tuple(shapes)


def _moved(name: str, old: str, new: str) -> str | None:
    """Return what a name that lies at or below ``old`` is below ``new``; None where it lies elsewhere."""
    return new + name[len(old) :] if name == old or name.startswith(f"{old}.") else None


def _renamed(site: AttentionSite, old: str, new: str) -> AttentionSite:
    if old == new:
        return site

    def rename(value: Any) -> Any:
        if isinstance(value, str):
            return _moved(value, old, new) or value
        return tuple(rename(entry) for entry in value)

    changes: Mapping[str, Any] = {name: rename(getattr(site, name)) for name in site.paths}
    return dataclasses.replace(site, **changes)
