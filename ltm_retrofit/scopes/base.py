"""What every scope answers, and what the answers are made of: rows and budgets, interceptors and masks, panels.

Over 400 lines: these are the few words that the scopes and the rooms above them share, and each needs the others.
"""

from __future__ import annotations

import inspect
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from ltm_retrofit.config import LTMConfig, Strict
from ltm_retrofit.errors import CountError, UnsupportedBlock
from ltm_retrofit.finding.call import Settings, changed_setting
from ltm_retrofit.finding.sites import AttentionSite, Found, Sites
from ltm_retrofit.finding.walk import Walk
from ltm_retrofit.merging.methods import CLUSTERS, Keys, Place, Scope, get_method, is_ours
from ltm_retrofit.merging.tokens import Merge

#: name under which masks are registered, and the plan on the model
CHILD = "ltm"

# ------------------------------------------------------------------------------------------------ what may be spent


@dataclass(frozen=True)
class Row(Strict):
    """A line of a plan: what one site does.

    Its ``action`` is ``"merge"``, N tokens into P, or ``"slice"``, to the prefix tokens after the last attention.
    Counts are of one sequence of one image, prefix tokens included; ``grid`` is H'×W' in scope ``GRID``. Tokens leave
    in so many ``rounds``, where the method has rounds.
    """

    site: str
    scope: str
    tokens_in: int
    tokens_out: int
    action: str = "merge"
    grid: tuple[int, int] | None = None
    rounds: int = 1

    @property
    def slices(self) -> bool:
        """Whether the row only drops tokens, without a mask."""
        return self.action == "slice"


class Made(Protocol):
    """What a method's masks are made for, whatever the place: a plan, or the search for one."""

    @property
    def config(self) -> LTMConfig:
        """What was asked for."""

    @property
    def classes(self) -> int:
        """C, of the statistics."""

    @property
    def clusters(self) -> int:
        """A, likewise."""


def made(of: Made) -> dict[str, Any]:
    """Return what a `Place` says of that."""
    return {"classes": max(1, of.classes), "clusters": of.clusters, "step": of.config.ib_step}


#: rows, and by how many MACs they change the model
Option = tuple[tuple[Row, ...], int]
S = TypeVar("S", bound=AttentionSite)


def quarters(blocks: Sequence[S]) -> list[S]:
    """Return the blocks ⌊d/4⌋, ⌊d/2⌋ and ⌊3d/4⌋ of d, counted from 0."""
    return [blocks[place] for place in sorted({len(blocks) * quarter // 4 for quarter in (1, 2, 3)})]


#: which blocks merge first, by the name of the schedule
SCHEDULES: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
    "auto": quarters,
    "calibrated": quarters,
    "stages": quarters,
    "every": list,
}


class Budget(ABC, Generic[S]):
    """What plans of one scope cost, and the search for those that meet a budget.

    Args:
        sites: what was found.
        config: what is asked for.
        blocks: the scope's sites, in depth order.
        mergeable: those of them that may merge, unless ``config`` names others.
    """

    def __init__(self, sites: Sites, config: LTMConfig, blocks: Sequence[S], mergeable: Sequence[S]) -> None:
        self.config, self.method, self.classes = config, get_method(config.method), sites.ending.classes
        self.clusters = CLUSTERS
        self.rounds = config.rounds or self.method.rounds
        self.blocks = blocks
        self.mergeable = [site for site in mergeable if config.sites is None or site.block in config.sites]

    @abstractmethod
    def search(self, change: int) -> Iterator[list[Option]]:
        """Yield batches of plans that change the MACs by about ``change`` (negative), simplest first."""

    @abstractmethod
    def change(self, rows: Sequence[Row]) -> int:
        """Return by how many MACs rows change the model, masks included.

        Raises:
            CountError: where they do not fit the sites.
        """

    @abstractmethod
    def from_tokens(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """Turn a user's counts into rows, none of a site at which nothing merges.

        Raises:
            CountError: where they do not fit the sites.
        """

    def rank(self, option: Option) -> Any:
        """Return what the best of several plans that meet a budget has most of: MACs left."""
        return option[1]

    def chained(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """Return rows of this scope that were edited, with what follows from one for the next.

        Raises:
            CountError: where one does not fit what the rows before it leave.
        """
        return tuple(rows)

    def probes(self) -> list[tuple[Row, ...]]:
        """Return rows whose loss has to be known before `allocated` can choose; none where it does not choose."""
        return []

    def allocated(self, change: int, losses: Mapping[tuple[Row, ...], float]) -> list[Option]:
        """Return plans that change the MACs by ``change`` (negative) and lose little, by what the probes lost."""
        return []

    def near(self, rows: tuple[Row, ...], change: int) -> list[Option]:
        """Return plans that differ a little from one, and change the MACs by about ``change``."""
        return []

    def scheduled(self) -> list[S]:
        """Return the sites of the schedule, or all that the user named."""
        if self.config.sites is not None:
            return self.mergeable
        first = {site.block for site in SCHEDULES[self.config.schedule](self.blocks)}
        return [site for site in self.mergeable if site.block in first]

    def widening(self) -> Iterator[list[S]]:
        """Yield the scheduled sites, then one more each time: the simplest plan that meets a budget wins."""
        chosen = self.scheduled()
        yield chosen
        for site in self.mergeable if self.config.sites is None else []:
            if site not in chosen:
                chosen = [other for other in self.mergeable if other in chosen or other is site]
                yield chosen

    def counted(self, tokens: Sequence[int], chosen: Sequence[S]) -> list[tuple[S, int]]:
        """Pair a user's counts with ``chosen`` sites, or with all that may merge.

        Raises:
            CountError: where there are as many counts as neither.
        """
        if len(tokens) == len(self.mergeable):
            chosen = self.mergeable
        if len(tokens) != len(chosen):
            every = f", or {len(self.mergeable)}, one after each site that may merge"
            raise CountError(
                f"tokens has {len(tokens)} counts; expected {len(chosen)}, one after each of "
                f"{', '.join(site.block for site in chosen)}{every if len(self.mergeable) > len(chosen) else ''}. Name "
                "other blocks in sites="
            )
        return list(zip(chosen, tokens, strict=True))


# ------------------------------------------------------------------------------------------------------- what runs


class Record(nn.Module):
    """What a converted model has under the name for masks; where the model is itself a site, its mask lies in here."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: nn.Module | None = None
        self.conversion = uuid.uuid4().hex  # by which interceptors know that they belong to it


class Interceptor:
    """Stands in for one module's ``forward``.

    A plain object in the module's ``__dict__``: it is pickled and deep-copied with the module, and belongs to the copy.

    Args:
        block: the module it belongs to.
        name: the site it works for.
    """

    #: told of each merge while a trace is on
    listener: Callable[[str, Merge], None] | None = None
    #: or "identity" (nothing merged: proof (e)) or "original"
    mode = "merge"
    #: tokens that it slices to, where it does
    keep: int | None = None
    #: leading tokens that always stay
    prefix = 0
    #: the intercepted block that hands it its tokens, for messages only: a block does not carry others with it
    before: nn.Module | None = None
    #: which conversion it belongs to
    conversion = ""
    #: whether what the host reads next has fewer tokens
    shortens = True

    def __init__(self, block: nn.Module, name: str) -> None:
        self.block, self.name = block, name

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what holds for a while, which nobody would end for a copy or a pickle, and the block before."""
        return {key: value for key, value in vars(self).items() if key not in ("listener", "mode", "before")}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; to a tracer that follows modules (`torch.fx`) it is one operation, as torch's own are.

        Raises:
            UnsupportedBlock: where it is exported for any number of tokens, of which merging needs to know one.
        """
        given = [*args, *kwargs.values()]
        if (proxy := next((value for value in given if isinstance(value, fx.Proxy)), None)) is not None:
            tracer = proxy.tracer
            assert isinstance(tracer, fx.Tracer), "what follows modules knows their paths"
            return tracer.create_proxy("call_module", tracer.path_of_module(self.block), args, kwargs)
        if torch.compiler.is_exporting():
            self.check_sizes(next((value for value in given if isinstance(value, Tensor)), None))
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on numbers."""
        raise NotImplementedError

    def check_sizes(self, x: Tensor | None) -> None:
        """Check that how many tokens there are is a number, and not left open by an export.

        Raises:
            UnsupportedBlock: where it is.
        """
        sizes = () if x is None else x.shape[1:]
        if self.mode == "merge" and any(isinstance(s, torch.SymInt) and s.node.maybe_as_int() is None for s in sizes):
            raise UnsupportedBlock(
                f"block {self.name!r} is exported for images of any height and width: how many tokens merge is written "
                "into the graph, which would be wrong for every other size. Leave the batch alone open, and export "
                "once for each size"
            )

    @property
    def __signature__(self) -> inspect.Signature:
        """The host's own, for whoever inspects ``block.forward``."""
        return inspect.signature(type(self.block).forward.__get__(self.block))

    @property
    def host(self) -> nn.Module:
        """The module on which the site's mask is registered."""
        return self.block

    @property
    def mask(self) -> nn.Module | None:
        """The site's mask; None where the site only slices or hands on."""
        child = self.host._modules.get(CHILD)
        return child.mask if isinstance(child, Record) else child

    def tell(self, merge: Merge) -> None:
        """Let a trace know what the mask did."""
        if self.listener is not None:
            self.listener(self.name, merge)

    def put_in_place(self) -> None:
        """Intercept from now on."""
        self.block.__dict__["forward"] = self

    def take_away(self) -> None:
        """Leave the module as it was."""
        del self.block.__dict__["forward"]

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the host's own forward."""
        return type(self.block).forward(self.block, *args, **kwargs)


def watch(module: nn.Module, watching: Callable[..., None]) -> None:
    """Have the calls of a module watched, once by each kind of watch."""
    unwatch(module, type(watching))
    module.register_forward_pre_hook(watching, with_kwargs=True)


def unwatch(module: nn.Module, kind: type) -> None:
    """Take watches of this kind away.

    By their class, not by the handles that registering gives: those of a deep copy would belong to the original.
    """
    for number in [number for number, kept in module._forward_pre_hooks.items() if isinstance(kept, kind)]:
        del module._forward_pre_hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)


def check_settings(module: nn.Module, settings: Settings, block: str) -> None:
    """Check that the attributes that a block was cut with, or sliced for, are those of now.

    Raises:
        UnsupportedBlock: where one differs.
    """
    if (changed := changed_setting(module, settings)) is not None:
        name, old, new = changed
        raise UnsupportedBlock(
            f"{name!r} of a {type(module).__name__} was {old!r} when block {block!r} was converted and is {new!r} now, "
            "which the conversion would not follow: set it back, or call ltm_retrofit.restore(model), set it, and "
            "retrofit again"
        )


class Planned(Made, Protocol):
    """What a scope reads of a `MergePlan`."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """One a site."""

    @property
    def unmerge(self) -> bool:
        """Whether every token is brought back after the last block."""


#: interceptors in the order of the sites, and the mask of each host
Parts = tuple[list[Interceptor], dict[nn.Module, nn.Module]]


def install(model: nn.Module, record: Record, parts: Parts) -> None:
    """Put interceptors and masks in place, and the record on the model."""
    forwards, masks = parts
    model._modules[CHILD] = record
    for forward in forwards:
        forward.conversion = record.conversion
        forward.put_in_place()
    for host, mask in masks.items():
        if host is model:
            record.mask = mask
        else:
            host._modules[CHILD] = mask


def uninstall(model: nn.Module, forwards: Sequence[Interceptor]) -> None:
    """Take all of it away again."""
    for forward in forwards:
        forward.take_away()
    for module in list(model.modules()):
        module._modules.pop(CHILD, None)  # `retrofit` makes sure that no module has a child of that name


def rows_in(plan: Planned, scope: Scope) -> dict[str, Row]:
    """Return a plan's rows in one scope, by site."""
    return {row.site: row for row in plan.rows if row.scope == scope}


def make_mask(method: str, place: Place, keys: Keys, host: nn.Module) -> nn.Module:
    """Make the mask of a place, on the device of its keys and in the mode of the module beside it.

    Raises:
        CountError: where the mask of somebody's own method does not return what the place asks for.
    """
    # the keys know where the model is: a host may have no parameters of its own
    mask = get_method(method).build(place, keys).to(keys.weight.device).train(host.training)
    if not is_ours(method) and not keys.weight.is_meta:
        _try_mask(method, mask, place, keys)
    return mask


def _try_mask(method: str, mask: nn.Module, place: Place, keys: Keys) -> None:
    """Run a mask on made-up tokens and look at what it returns."""
    tokens = torch.randn(place.cells, place.tokens_in, place.dim, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(keys.weight.device, place.dtype or torch.float32)
    with torch.no_grad():
        if place.grid is not None:
            merged, grid, _ = mask(tokens, place.grid)
            expected: tuple[Any, ...] = (place.tokens_out, place.grid_out)
            given: tuple[Any, ...] = (merged.shape[1], grid)
        else:
            merged, sizes, merge = mask(tokens, tokens, None, keys, place.cells)
            expected = (place.tokens_out, place.tokens_out, place.tokens_in)
            given = (merged.shape[1], sizes.shape[1], merge.assignment.whole)
    what = "tokens, and the grid" if place.grid is not None else "tokens, sizes, and tokens that were there before"
    if given != expected or merged.shape[::2] != tokens.shape[::2]:
        raise CountError(
            f"a mask of method {method!r} was given {place.tokens_in} tokens to make {place.tokens_out} of them: "
            f"{what} should be {expected}, got {given}, tokens of shape {tuple(merged.shape)}"
        )
    if not torch.allclose(merged[:, : place.prefix], tokens[:, : place.prefix]):
        raise CountError(
            f"a mask of method {method!r} changed the first {place.prefix} tokens, or moved them: these are prefix "
            "tokens, which must stay as they are and come first"
        )


# ---------------------------------------------------------------------------------------------------- what is drawn


class Shown(NamedTuple):
    """A pass over one image."""

    merges: Mapping[str, Merge]  # what each site did
    forwards: Mapping[str, Interceptor]  # one of each site
    size: tuple[int, int]  # height and width of the image, in pixels


@dataclass(frozen=True)
class Panel:
    """What one site made of the first image's patches, which lie in a grid of ``groups.shape``.

    ``groups`` are equal where patches are one token; ``share`` is how much of each patch the token that it is drawn
    with got; ``tokens`` is how many are left, and of how many. ``sequences`` says among how many of its kind it is
    one whose place in the image is not known; 1 where it is known.
    """

    groups: np.ndarray
    alive: np.ndarray
    share: np.ndarray
    tokens: tuple[int, int]
    sequences: int = 1


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return height and width, in patches, of an image of ``height`` × ``width`` pixels.

    Raises:
        CountError: where square patches do not divide the image into so many, and the number is no square.
    """
    for size in range(1, min(height, width) + 1):
        if height % size == width % size == 0 and (height // size) * (width // size) == patches:
            return height // size, width // size
    side = round(patches**0.5)
    if patches < 1 or side * side != patches:
        raise CountError(
            f"{patches} patches of a {height}×{width} image make no grid: expected (height / p) × (width / p) for a "
            "whole p, or a square number. Merging can only be drawn where patches lie in a grid"
        )
    return side, side


# --------------------------------------------------------------------------------------------------- the questions


@dataclass(frozen=True)
class ScopeRules:
    """What a scope answers: where is it found, what may be spent, what runs, what is drawn.

    Args:
        name: in configs, plans and methods.
        find: returns the sites that serve each attention, and what was refused.
        budget: makes the search for plans, where there are such sites.
        build: makes the interceptors and masks of the plan's rows in this scope; touches nothing.
        panels: returns what is drawn of rows that merge, by site. Raises `CountError` where patches make no grid.
        legend: returns what a reader of the panels has to know; the flag says that tokens are dropped, not merged.
        stays: whether tokens stay merged, so that what sites did adds up.
        where: how a picture puts where that is, seen from the site's block.
    """

    name: Scope
    find: Callable[[Walk], Found]
    budget: Callable[[Sites, LTMConfig], Budget[Any]]
    build: Callable[[nn.Module, Sites, Planned], Parts]
    panels: Callable[[Sequence[Row], Shown], dict[str, Panel]]
    legend: Callable[[Sequence[Row], bool], str]
    stays: bool = False
    where: str = "after"

    def budget_of(self, sites: Sites, config: LTMConfig) -> Budget[Any] | None:
        """Return what may be spent; None where there are no such sites, or the method does not serve this scope."""
        served = self.name in get_method(config.method).scopes
        return self.budget(sites, config) if served and sites.of(self.name) else None
