"""An MLP behind an attention, and what the attention is called with besides its tokens. Data and no search."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ltm_retrofit.finding.example import named_tensors
from ltm_retrofit.finding.sites import AttentionSite

Number = bool | int | float
Grid = tuple[int, int]


@dataclass(frozen=True)
class SideInputs:
    """The tensors that an attention got in the example besides its tokens, by path: ``mask``, ``positions.0``.

    Args:
        free: those that follow from the image and the weights alone.
        fixed: those that came from an input which is no image; each had one value throughout, which hid nothing.
    """

    free: tuple[str, ...] = ()
    fixed: tuple[tuple[str, Number], ...] = ()


@dataclass(frozen=True, kw_only=True)
class LocalSite(AttentionSite):
    """An MLP behind an attention: modules that treat each token alone, one handing its result to the next.

    Or, where it ``mixes``, the attention itself, which takes its tokens as a set.

    ``cell`` is the group of tokens, height × width in the grid, in which merging happens; ``weight`` names the first
    weight matrix that reads the tokens, below the first module.
    """

    paths: ClassVar[tuple[str, ...]] = (*AttentionSite.paths, "chain", "host")

    chain: tuple[str, ...]
    host: str  # the module on which the mask is registered
    cell: Grid
    cost: tuple[int, int, int]  # multiply-adds of the chain for N tokens: fixed + linear·N + square·N²
    width: int  # of the chain's output
    weight: str
    mixes: bool = False
    side_inputs: SideInputs = field(default_factory=SideInputs)

    @property
    def parts(self) -> tuple[str, ...]:
        """The modules that belong to one block of the model."""
        return (self.attention, *self.chain)

    @property
    def spare(self) -> bool:
        """Whether it is chosen only where its attention has no other site: merging before an attention costs most."""
        return self.mixes


def side_tensors(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Return the tensors of a call besides its tokens, which are the first of three dimensions and more, with paths.

    Args:
        names: of the positional arguments.
        args: of the call.
        kwargs: likewise.
    """
    tensors = list(named_tensors({**dict(zip(names, args, strict=False)), **kwargs}))
    tokens = next((value for _, value in tensors if value.ndim >= 3 and value.is_floating_point()), None)
    return [(path, value) for path, value in tensors if tokens is None or value.shape != tokens.shape]


def names_of(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's own forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
