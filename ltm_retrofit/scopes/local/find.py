"""Chains → LOCAL sites: how their tokens lie, and in which cells they are merged."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from ltm_retrofit.finding.layouts import spatial_of, width_of
from ltm_retrofit.finding.recording import Recording
from ltm_retrofit.finding.sites import LocalSite, TokenLayout
from ltm_retrofit.merging.methods import Scope
from ltm_retrofit.scopes.grid.maps import CONTAINERS
from ltm_retrofit.scopes.local.cells import FEWEST, choose_cell
from ltm_retrofit.scopes.local.chains import Chain, Link
from ltm_retrofit.scopes.local.padding import Companions, companions

Grid = tuple[int, int]
PADDED = (
    "by its attention's mask some tokens of the example only fill up, and nothing tells an MLP which: pass an example "
    "without padding"
)


def local_sites(
    model: nn.Module, recording: Recording, chains: Mapping[int, list[Chain] | str], mixers: Mapping[int, Link]
) -> dict[int, list[LocalSite] | str]:
    """Make sites of the chains behind each attention, and of attentions, by number; a string says why not."""
    shapes = [event.shape_out for event in recording.events if len(event.shape_out) == 4]
    maps = {(shape[2], shape[3]) for shape in shapes} | {(shape[1], shape[2]) for shape in shapes}
    found: dict[int, list[LocalSite] | str] = {}
    names: set[str] = set()
    for number, several in chains.items():
        beside = _beside(model, recording, number)
        if isinstance(beside, str):
            found[number] = beside
            continue
        if isinstance(several, str):
            found[number] = several
            continue
        made = [_site(model, recording, number, chain, beside, maps, names) for chain in several]
        sites = [site for site in made if isinstance(site, LocalSite)]
        found[number] = sites or "; ".join(reason for reason in made if isinstance(reason, str))
    for number, link in mixers.items():
        beside = _beside(model, recording, number)
        if not recording.attended[number].found.padded and not isinstance(beside, str):
            site = _site(model, recording, number, Chain([link]), beside, maps, names, mixes=True)
            have = found.get(number)
            if isinstance(site, LocalSite):
                found[number] = [*(have if isinstance(have, list) else []), site]
    return found


def _beside(model: nn.Module, recording: Recording, number: int) -> Companions | str:
    """Return what an attention gets beside its tokens; a string says that some of those only fill up."""
    owner = recording.attended[number].chain[-1]
    if recording.attended[number].found.hides:
        return f"{owner}: {PADDED}"
    call = recording.calls[owner][0]
    found = companions(model.get_submodule(owner), call.args, call.kwargs, recording.flagged)
    return f"{owner}: {PADDED} ({found})" if isinstance(found, str) else found


def _site(
    model: nn.Module,
    recording: Recording,
    number: int,
    chain: Chain,
    beside: Companions,
    maps: set[Grid],
    taken: set[str],
    mixes: bool = False,
) -> LocalSite | str:
    first, last = chain.links[0], chain.links[-1]
    owner = recording.attended[number].chain[-1]
    shape, order = first.event.shape_in, first.order
    dim = width_of(shape, order)
    spatial = spatial_of(shape, order)
    tokens = prod(spatial)
    lead = trail = 0
    if order in ("BNC", "NBC"):
        lead, trail = recording.joined.get(tokens, (0, 0))
        known = [grid for grid in maps if prod(grid) == tokens - lead - trail]
        if not known and lead == trail == 0:  # a class token that was taken apart and joined again
            known = [grid for grid in maps if prod(grid) == tokens - 1 and min(grid) > 1]
            lead = int(bool(known))
        side = round((tokens - lead - trail) ** 0.5)
        patches = tokens - lead - trail
        square = (side, side) if side * side == patches else (1, patches)
        grid = min(known, key=lambda g: abs(g[0] - g[1]), default=square)
    else:
        grid = spatial if len(spatial) == 2 else (1, tokens)
    rows = shape[1] if order == "NBC" else shape[0]
    name = chain.names[0]
    if prod(grid) < FEWEST:
        return f"{name}: {prod(grid)} tokens leave nothing to merge"
    weight = reading_weight(model.get_submodule(name), dim)
    if weight is None:
        return f"{name} ({type(model.get_submodule(name)).__name__}): no weight matrix of it reads the tokens"
    host = f"{name}.{weight.rpartition('.')[0]}" if first.calls_children else name
    if host in taken:
        return f"{name}: shared with another attention"
    block = _common(owner, chain.names[-1])
    parts = [event.name for event in recording.events if event.name == block]
    shared = not block or len(parts) != 1 or isinstance(model.get_submodule(block), CONTAINERS)
    block = name if block in taken or shared else block
    taken |= {block, host}
    cost = [sum(link.cost[power] for link in chain.links) // rows for power in range(3)]
    return LocalSite(
        block=block,
        attention=owner,
        kind=type(model.get_submodule(block)).__name__,
        dim=dim,
        key_dim=min(dim, max(16, min(64, dim // 8))),
        layout=TokenLayout(tokens, lead, (grid[0], grid[1]), order, trail, rows),
        scope=Scope.LOCAL,
        proofs=("b", "d"),
        macs=rows * (cost[0] + cost[1] * tokens + cost[2] * tokens * tokens),
        chain=chain.names,
        host=host,
        cell=choose_cell((grid[0], grid[1]), dim),
        cost=(cost[0], cost[1], cost[2]),
        width=width_of(last.event.shape_out, last.order),
        weight=weight,
        mixes=mixes,
        companions=beside,
    )


def reading_weight(module: nn.Module, dim: int) -> str | None:
    """Return the first parameter that maps ``dim`` features: ``(out, dim)`` or a 1×1 convolution's."""
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2 and parameter.shape[1] == dim and parameter.numel() > dim:
            return name
    return None


def _common(one: str, other: str) -> str:
    a, b = one.split("."), other.split(".")
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return ".".join(a[:same])


def principal_keys(weight: Tensor, width: int) -> Tensor:
    """Return the ``(width, D)`` map of tokens that best keeps the distances of ``weight``'s outputs: its leading SVD.

    Two tokens that are alike to the first weight matrix of an MLP get nearly the same update from it.
    """
    if weight.is_meta:
        return weight.new_zeros(width, weight.shape[1])
    matrix = weight.detach().float().flatten(2).sum(-1) if weight.ndim > 2 else weight.detach().float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, values, right = torch.svd_lowrank(matrix, q=min(width + 8, *matrix.shape), niter=2)
    keys = matrix.new_zeros(width, matrix.shape[1])
    keys[: min(width, len(values))] = (values[:, None] * right.T)[:width]
    return keys
