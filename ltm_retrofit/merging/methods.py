"""The registry of merging methods: a method is one file with one entry, and nothing else knows its name.

An entry says what a method builds, what that costs, and which scopes it serves. Importing this room imports nothing
heavy: the methods that come with the package are imported when they are first asked for.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from ltm_retrofit.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Grid = tuple[int, int]


class Scope(StrEnum):
    """How far merging reaches.

    In ``FLOW`` tokens stay merged for the rest of the network, in ``GRID`` they go on as a smaller H'×W' grid, in
    ``LOCAL`` they are merged for the MLP only and every token gets its group's update.
    """

    FLOW = "FLOW"
    GRID = "GRID"
    LOCAL = "LOCAL"


#: all of them, for methods that work everywhere
SCOPES = tuple(Scope)

#: A, the clusters of statistics: of the feature, and of masks that have the step
CLUSTERS = 64
#: methods that come with the package, and the room below `ltm_retrofit.merging` that holds each one's entry `METHOD`
_OURS = {"ltm": "mask", "tome": "tome", "pool": "pool", "slice": "slice"}
_REGISTERED: dict[str, Method] = {}


class Keys(NamedTuple):
    """An affine map of tokens by which they may be compared: ``weight (d, D)``, ``bias (d,)`` or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where a mask works, as far as a method needs to know. Token counts are of one sequence, prefix tokens included.

    In scope ``GRID``, ``grid`` (H, W) becomes ``grid_out`` (H', W') and the counts are their products. In scope
    ``LOCAL`` the counts are those of one cell, and a sequence has ``cells`` of them, which share one descriptor.
    """

    scope: str
    dim: int  # D, of the tokens
    key_dim: int  # d, of the keys by which they are compared
    tokens_in: int  # N
    tokens_out: int  # P
    prefix: int = 0  # leading tokens that always stay
    classes: int = 1  # C, of the statistics
    clusters: int = CLUSTERS  # A, likewise
    grid: Grid | None = None
    grid_out: Grid | None = None
    cells: int = 1
    rounds: int = 1  # in which tokens leave
    step: bool = False  # whether the mask has the information-bottleneck step
    width: int | None = None  # of the tokens that are brought back, where it is not D
    dtype: torch.dtype | None = None  # of the host's weights; float32 where nobody says


@dataclass(frozen=True)
class Method:
    """A way to merge tokens: an entry of the registry.

    Args:
        name: what `LTMConfig(method=…)` calls it.
        version: raised whenever the method computes something else; a saved folder of another version is refused.
        scopes: those it serves, of ``"FLOW"``, ``"GRID"`` and ``"LOCAL"``.
        build: makes the mask of a place, a `tokens.Mask`. It is given tensors, no model: besides the place a pretrained
            map of tokens to compare them by. In ``FLOW`` that is the mean over heads of the block's own keys, elsewhere
            the principal directions of the first weights that read the tokens. The caller moves the mask to its device.
        macs: multiply–adds of the mask for one sequence (all its ``cells``); a `CountError` where the counts of the
            place cannot be. Plans promise these numbers; `ltm.measure` counts them anew, and refuses where they differ.
        unmerge_macs: multiply–adds of bringing all tokens of one sequence back.
        rounds: in which tokens leave where nobody says otherwise, of methods whose masks know `Place.rounds`.

    Raises:
        RecipeError: where it serves no scope, or one that does not exist.

    Example:
        >>> import ltm_retrofit as ltm
        >>> from ltm_retrofit.merging.methods import Place, get_method
        >>> tome = get_method("tome")
        >>> isinstance(tome, ltm.Method)
        True
        >>> tome.macs(Place("FLOW", dim=384, key_dim=64, tokens_in=197, tokens_out=138, prefix=1))
        5431552
    """

    name: str
    version: int
    scopes: tuple[str, ...]
    build: Callable[[Place, Keys], nn.Module]
    macs: Callable[[Place], int]
    unmerge_macs: Callable[[Place], int]
    rounds: int = 1

    def __post_init__(self) -> None:
        """Check the scopes; a string alone would be read letter by letter."""
        if isinstance(self.scopes, str) or not self.scopes or not set(self.scopes) <= set(SCOPES):
            raise RecipeError(
                f"method {self.name!r} serves the scopes {self.scopes!r}: give a tuple of {', '.join(SCOPES)}"
            )


def register_method(method: Method) -> None:
    """Add a method of one's own to the registry, from where `LTMConfig(method=name)` takes it.

    Register it in every program that converts with it or loads a model that was saved with it.

    Raises:
        RecipeError: where another method has this name.

    Example:
        Each merged token is the mean of a run of neighbours:

        >>> import torch
        >>> import ltm_retrofit as ltm
        >>> from ltm_retrofit.merging.tokens import dense_unmerge_macs
        >>> class Runs(ltm.Mask):
        ...     def forward(self, inner, tokens, sizes, key=None, cells=1, padded=False):
        ...         n, first = int(tokens.shape[1]), self.prefix
        ...         p = self.kept_at(n)
        ...         run = first + torch.arange(n - first) * (p - first) // (n - first)
        ...         goes = torch.cat([torch.arange(first), run])
        ...         return ltm.merge_by(torch.eye(p)[goes].to(tokens.device), tokens, sizes)
        >>> ltm.register_method(
        ...     ltm.Method(
        ...         name="runs",
        ...         version=1,
        ...         scopes=("FLOW", "LOCAL"),
        ...         build=lambda place, keys: Runs(place.tokens_in, place.tokens_out, place.prefix),
        ...         macs=lambda place: place.cells * place.tokens_in * place.tokens_out * (place.dim + 1),
        ...         unmerge_macs=dense_unmerge_macs,
        ...     )
        ... )
        >>> ltm.LTMConfig(flops=0.7, method="runs").method
        'runs'
    """
    if method.name in _OURS or _REGISTERED.get(method.name, method) != method:
        raise RecipeError(f"a method {method.name!r} is registered already: give yours another name")
    _REGISTERED[method.name] = method


def is_ours(name: str) -> bool:
    """Say whether a method comes with the package."""
    return name in _OURS


def method_names() -> tuple[str, ...]:
    """Return the names in the registry, those of the package first."""
    return (*_OURS, *_REGISTERED)


def get_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        RecipeError: where there is none of this name.
    """
    if name in _OURS:
        method: Method = importlib.import_module(f"ltm_retrofit.merging.{_OURS[name]}").METHOD
        return method
    if name not in _REGISTERED:
        close = difflib.get_close_matches(name, method_names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RecipeError(f"method {name!r} is not registered; {hint}known: {', '.join(map(repr, method_names()))}")
    return _REGISTERED[name]
