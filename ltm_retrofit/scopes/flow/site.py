"""A block that may be cut: its two halves as code, what they cost, and where its keys come from. Data and no search."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.call import Settings, Signature
from ltm_retrofit.finding.sites import AttentionSite


class Code:
    """One function written by ``torch.fx``: called with the block in place of ``self``; can be pickled and copied."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source, self.names = source, names
        scope = dict(names)
        exec(compile(source, "<ltm_retrofit cut>", "exec"), scope)
        self.function: Callable[..., Any] = scope["forward"]

    def __call__(self, *args: Any) -> Any:
        """Run the piece on ``(block, …)``."""
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        """Code never changes, so a copied model shares it."""
        return self

    def __eq__(self, other: object) -> bool:
        """Compare by what is run."""
        return isinstance(other, Code) and self.source == other.source

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash(self.source)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle modules among the names as their import path."""
        modules = [key for key, value in self.names.items() if isinstance(value, types.ModuleType)]
        names = {key: value.__name__ if key in modules else value for key, value in self.names.items()}
        return _load_code, (self.source, names, modules)


def _load_code(source: str, names: dict[str, Any], modules: Iterable[str]) -> Code:
    return Code(source, {**names, **{key: importlib.import_module(names[key]) for key in modules}})


@dataclass(frozen=True)
class Halves:
    """``front(block, x, bias, followers) -> (z, h)`` and ``back(block, z)``: z the stream, h attention's input.

    ``settings`` are the block's attributes that both were made with, but for those that its forward writes.
    """

    front: Code
    back: Code
    settings: Settings = field(default=(), compare=False)


def _plain(value: Any) -> Any:
    """Return a weight as numbers: modules in int8 give theirs when called, and torchao's lie in a tensor of its own."""
    value = value() if callable(value) else value
    if type(value) is nn.Parameter or not isinstance(value, Tensor):
        return value  # nearly always, and what follows no compiler understands
    quantized = value.is_quantized or type(value).__module__.startswith("torchao.")
    return value.dequantize() if quantized else value


@dataclass(frozen=True)
class KeySource:
    """Where a block's keys come from, read off the gradient of the keys: features of one affine map of ``h``.

    ``weight`` and ``bias`` are paths below the block; ``bias`` is a constant tensor where no parameter is
    the bias, or None. ``features[head]`` are the map's output features that make the head's key.
    """

    weight: str
    bias: str | Tensor | None
    features: Tensor  # (heads, d) int64

    def mean_map(self, block: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return ``(W_m (d, D), b_m (d,) or None)``: the mean over heads of the block's present key map.

        Raises:
            UnsupportedBlock: where the module that the map belongs to was replaced by one without a weight.
        """
        try:
            weight = _plain(attrgetter(self.weight)(block))  # a parameter, or made of some (pruned, normalised)
            bias = _plain(attrgetter(self.bias)(block)) if isinstance(self.bias, str) else self.bias
        except AttributeError as error:
            raise UnsupportedBlock(
                f"a mask of this model compares tokens by the keys of their block, whose {self.weight} is gone "
                f"({error}): a module was replaced. Call ltm_retrofit.restore(model) and retrofit the model that you "
                "have, or convert with method='ltm', which compares the tokens themselves"
            ) from error
        features = self.features.to(weight.device)
        mean = weight[features].mean(dim=0)
        return mean, None if bias is None else bias.to(weight)[features].mean(dim=0)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a block for one image: front and back for N tokens are ``fixed + linear·N + square·N²``."""

    front: tuple[int, int, int]
    back: tuple[int, int, int]

    def __call__(self, tokens_in: int, tokens_out: int) -> int:
        """Return the block's MACs with ``tokens_in`` before and ``tokens_out`` after its mask."""
        return sum(
            fixed + linear * count + square * count * count
            for (fixed, linear, square), count in ((self.front, tokens_in), (self.back, tokens_out))
        )


@dataclass(frozen=True, kw_only=True)
class FlowSite(AttentionSite):
    """A block that may be cut between attention and MLP, after which the rest of the network takes fewer tokens."""

    cost: Cost
    signature: Signature
    halves: dict[tuple[bool, bool], Halves]  # (training, with attention bias)
    key: KeySource
