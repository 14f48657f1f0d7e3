"""Chains behind attentions → LOCAL sites: how their tokens lie, and in which cells they are merged."""

from __future__ import annotations

from itertools import takewhile
from math import prod

from torch import Tensor, nn

from ltm_retrofit.finding.chains import Chain, Link
from ltm_retrofit.finding.layouts import key_width, spatial_of, width_of
from ltm_retrofit.finding.proofs import CONTAINERS
from ltm_retrofit.finding.sites import AttentionSite, Found, Refused, TokenLayout
from ltm_retrofit.finding.walk import Walk
from ltm_retrofit.merging.methods import Scope
from ltm_retrofit.scopes.local.mixers import find_mixers
from ltm_retrofit.scopes.local.site import (
    FEWEST,
    Grid,
    LocalSite,
    Number,
    SideInputs,
    cell_within,
    choose_cell,
    names_of,
    side_tensors,
)

PADDED = (
    "by its attention's mask some tokens of the example are padding, and nothing tells an MLP which: pass an example "
    "without padding"
)


def find(walk: Walk) -> Found:
    """Make sites of the chains behind each attention, and of attentions that take their tokens as a set."""
    shapes = [call.shape_out for call in walk.recording.calls if len(call.shape_out) == 4]
    maps = {(shape[2], shape[3]) for shape in shapes} | {(shape[1], shape[2]) for shape in shapes}
    sites: dict[int, list[AttentionSite]] = {}
    refused: list[Refused] = []
    taken: set[str] = set()  # a module has one mask, and a block one row in a plan

    def add(number: int, chain: Chain, side_inputs: SideInputs, mixes: bool) -> str:
        made = _site(walk, number, chain, side_inputs, maps, taken, mixes)
        if isinstance(made, Refused):
            return made.reason
        taken.update((made.block, made.host))
        sites.setdefault(number, []).append(made)
        return ""

    for number, chains in walk.chains.items():
        beside = _side_inputs(walk, number)
        if isinstance(beside, Refused) or isinstance(chains, Refused):
            refused += [reason for reason in (beside, chains) if isinstance(reason, Refused)][:1]
            continue
        reasons = [add(number, chain, beside, False) for chain in chains]
        if number not in sites:
            why = "; ".join(filter(None, dict.fromkeys(reasons)))
            refused.append(Refused(walk.recording.attended[number].owner, why))
    for number, link in find_mixers(walk).items():
        beside = _side_inputs(walk, number)
        if not walk.recording.attended[number].seen.padded and not isinstance(beside, Refused):
            add(number, [link], beside, True)
    return Found(sites, refused)


def _side_inputs(walk: Walk, number: int) -> SideInputs | Refused:
    """Return what an attention gets besides its tokens, unless that hides tokens of the example."""
    attended = walk.recording.attended[number]
    owner, call = attended.owner, walk.recording.attending[attended.owner][0]
    if attended.seen.hides and number not in walk.views:
        return Refused(owner, f"{owner}: {PADDED}")
    free: list[str] = []
    fixed: list[tuple[str, Number]] = []
    for path, value in side_tensors(names_of(walk.model.get_submodule(owner)), call.args, call.kwargs):
        if not walk.recording.flagged(value):
            free.append(path)
        elif (same := _only_value(value)) is None:
            return Refused(owner, f"{owner}: {PADDED} ({path})")
        else:
            fixed.append((path, same))
    return SideInputs(tuple(free), tuple(fixed))


def _only_value(value: Tensor) -> Number | None:
    """Return the one value that all entries of a tensor have; None where there are others."""
    first = value.flatten()[:1]
    return first.item() if value.numel() and bool((value == first).all()) else None


def _site(
    walk: Walk, number: int, chain: Chain, side_inputs: SideInputs, maps: set[Grid], taken: set[str], mixes: bool
) -> LocalSite | Refused:
    first, last, names = chain[0], chain[-1], tuple(link.call.name for link in chain)
    name = names[0]
    owner = walk.recording.attended[number].owner
    module = walk.model.get_submodule(name)
    dim = width_of(first.call.shape_in, first.order)
    layout = _layout(walk, first, maps)
    grid = layout.grid
    assert grid is not None
    if prod(grid) < FEWEST:
        return Refused(owner, f"{name}: {prod(grid)} tokens leave nothing to merge")
    cell, views = choose_cell(grid, dim), walk.views.get(number)
    if views is not None:
        fitting = cell_within(views.groups, layout, dim)
        if fitting is None:
            return Refused(owner, f"{owner}: {views.reason}")
        layout, cell = fitting
    weight = _reading_weight(module, dim)
    if weight is None:
        return Refused(owner, f"{name} ({type(module).__name__}): no weight matrix of it reads the tokens")
    host = f"{name}.{weight.rpartition('.')[0]}" if first.calls_children else name
    if host in taken:
        return Refused(owner, f"{name}: shared with another attention")
    # the module around both is the block that a reader knows, where it is one, and has no row yet
    block = _common(owner, names[-1])
    once = len(walk.recording.by_name.get(block, ())) == 1
    if not block or block in taken or not once or isinstance(walk.model.get_submodule(block), CONTAINERS):
        block = name
    fixed, linear, square = (sum(link.cost[power] for link in chain) // layout.sequences for power in range(3))
    each = fixed + linear * layout.tokens + square * layout.tokens**2
    return LocalSite(
        block=block,
        attention=owner,
        kind=type(walk.model.get_submodule(block)).__name__,
        dim=dim,
        key_dim=key_width(dim),
        layout=layout,
        scope=Scope.LOCAL,
        proofs=("b", "d"),
        macs=layout.sequences * each,
        chain=names,
        host=host,
        cell=cell,
        bound=views is not None,
        cost=(fixed, linear, square),
        width=width_of(last.call.shape_out, last.order),
        weight=weight,
        mixes=mixes,
        side_inputs=side_inputs,
    )


def _layout(walk: Walk, first: Link, maps: set[Grid]) -> TokenLayout:
    """Say how the tokens lie that enter a chain: on the map itself, or on one of the maps that the model has."""
    shape, order = first.call.shape_in, first.order
    spatial = spatial_of(shape, order)
    tokens, sequences = prod(spatial), shape[1] if order == "NBC" else shape[0]
    if order not in ("BNC", "NBC"):
        grid = (spatial[0], spatial[1]) if len(spatial) == 2 else (1, tokens)
        return TokenLayout(tokens, 0, grid, order, 0, sequences)
    lead, trail = walk.constant_tokens.get(tokens, (0, 0))
    known = [grid for grid in maps if prod(grid) == tokens - lead - trail]
    if not known and lead == trail == 0:  # a class token that was taken apart and joined again
        known = [grid for grid in maps if prod(grid) == tokens - 1 and min(grid) > 1]
        lead = int(bool(known))
    patches = tokens - lead - trail
    side = round(patches**0.5)
    square = (side, side) if side * side == patches else (1, patches)
    grid = min(known, key=lambda grid: abs(grid[0] - grid[1]), default=square)
    return TokenLayout(tokens, lead, grid, order, trail, sequences)


def _reading_weight(module: nn.Module, dim: int) -> str | None:
    """Return the first parameter that maps ``dim`` features: ``(out, dim)`` or a 1×1 convolution's."""
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and parameter.shape[1] == dim and parameter.numel() > dim:
            return name
    return None


def _common(one: str, other: str) -> str:
    """Return the path of the innermost module around two."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
