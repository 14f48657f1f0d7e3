"""Where a token map passes, and may go on smaller: the rest of the network takes a smaller grid (scope GRID).

For each attention a module around it, or before it, is taken whose map is merged. The network is then run with that
map cropped, which changes shapes as any merging does, and must put out the same shapes. Costs are counted by stretches,
from one such point to the next: whatever is merged before, a stretch costs the same for the same grid that enters it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError, in_words
from ltm_retrofit.finding.example import Example, run, tensors_of
from ltm_retrofit.finding.layouts import key_width, spatial_of, width_of
from ltm_retrofit.finding.proofs import CONTAINERS
from ltm_retrofit.finding.recording import Attended, Call, replaced
from ltm_retrofit.finding.sites import Found, Refused, TokenLayout
from ltm_retrofit.finding.walk import Walk
from ltm_retrofit.macs import count_macs_quick, counting
from ltm_retrofit.merging.methods import Scope
from ltm_retrofit.scopes.grid.site import Grid, GridSite, smaller
from ltm_retrofit.undisturbed import undisturbed

SMALLEST = 3  # height and width of a map that is worth merging
LEVELS = 4  # how far around an attention a map is looked for
BEFORE = 6  # how many of the maps that were put out before it
SHARES = 6  # how many smaller sizes are tried
ATTEMPTS = 5  # how many sets of points are tried

#: block → what enters it, and the MACs from there to the next
Stretches = dict[str, tuple[Grid, int]]


def find(walk: Walk) -> Found:
    """Find the points after which the network takes a smaller grid, with their costs."""
    if not any(len(call.shape_in) == 4 for call in walk.recording.calls):
        return Found({}, [])
    if walk.removed:
        return Found({}, [Refused("", "grids are looked for in models that are whole")])
    refused = Refused("", "no module around it passes a map (B, C, H, W) on")
    with undisturbed(walk.full):
        for points in _sets(walk):
            held = _hold(walk, list(points.values()))
            if isinstance(held, Refused):
                refused = held
                continue
            sites = {number: held[site.block] for number, site in points.items() if site.block in held}
            # the map that an attention reads is the last one that was put out before it, or around it
            numbers = [n for n in range(min(sites), len(walk.recording.attended)) if n not in walk.views]
            return Found({number: [sites[max(n for n in sites if n <= number)]] for number in numbers}, [])
    return Found({}, [refused])


def passes_maps(walk: Walk) -> bool:
    """Say whether any attention lies in a module that passes a map on."""
    return bool(next(_levels(walk, {})))


# --------------------------------------------------------------------------------------------------- where a map passes


def _sets(walk: Walk) -> Iterator[dict[int, GridSite]]:
    """Go through sets of points to try: all maps first, then without those of the largest grid."""
    inside = {number: chains[0][0].call.end for number, chains in walk.chains.items() if isinstance(chains, list)}
    levels, tried = list(_levels(walk, inside)), list[list[str]]()
    while any(levels):
        for points in filter(None, levels):
            names = [site.block for site in points.values()]
            if names not in tried and len(tried) < ATTEMPTS:
                tried.append(names)
                yield points
        firsts = [next(iter(points.values())).grid if points else None for points in levels]
        levels = [
            {number: site for number, site in points.items() if site.grid != first}
            for points, first in zip(levels, firsts, strict=True)
        ]


def _levels(walk: Walk, inside: Mapping[int, int]) -> Iterator[dict[int, GridSite]]:
    """Go through sets of points, by the number of the first attention that each serves.

    First the innermost module around each attention that keeps its map, then those further out, then the output of a
    module before it, the last one first.

    Args:
        walk: the search.
        inside: when the first module of the MLP behind an attention ends, by number.
    """
    numbers = range(len(walk.recording.attended))
    around = {number: sites for number in numbers if (sites := _around(walk, number, inside.get(number)))}
    for level in range(LEVELS):
        yield _distinct({number: sites[min(level, len(sites) - 1)] for number, sites in around.items()})
    before, nearest = dict[int, list[Call]](), ""
    for number, attended in enumerate(walk.recording.attended):
        maps = _maps_before(walk, attended)
        if maps and maps[-1].name != nearest:  # not the same map as for the attention before
            before[number], nearest = maps, maps[-1].name
    for back in range(1, BEFORE + 1):
        calls = {number: maps[-back] for number, maps in before.items() if back <= len(maps)}
        yield _distinct(
            {number: _site(walk, call, number, "output") for number, call in calls.items() if _may_host(walk, call)}
        )


def _distinct(points: Mapping[int, GridSite | None]) -> dict[int, GridSite]:
    """Leave out what is no site or too small, and all but the first of the same module."""
    found: dict[str, tuple[int, GridSite]] = {}
    for number, site in points.items():
        if site is not None and min(site.grid) >= SMALLEST:
            found.setdefault(site.block, (number, site))
    return dict(found.values())


def _around(walk: Walk, number: int, inside: int | None) -> list[GridSite]:
    """Return the modules around an attention that keep its map, innermost first, up to the first that is too small."""
    found: list[GridSite] = []
    for name in reversed(walk.recording.attended[number].around):
        call = walk.recording.by_name[name][0]
        if not name or not _may_host(walk, call) or len(call.shape_in) != 4 or call.shape_in != call.shape_out:
            continue
        # a module that holds the MLP, too, saves on that only where its input is merged
        where = "input" if inside is not None and inside <= call.end else "output"
        if site := _site(walk, call, number, where):
            found.append(site)
            if min(site.grid) < SMALLEST or len(found) == LEVELS:
                break
    return found


def _may_host(walk: Walk, call: Call) -> bool:
    """Say whether a mask may be registered on a module: it is called once, and does not call its children in turn."""
    once = len(walk.recording.by_name[call.name]) == 1
    return once and not isinstance(walk.model.get_submodule(call.name), CONTAINERS)


def _maps_before(walk: Walk, attended: Attended) -> list[Call]:
    """Return the calls that put out a map before an attention, those within others left out."""
    maps: list[Call] = []
    for call in walk.recording.calls:
        if call.end < attended.time and len(call.shape_out) == 4 and call.result is not None:
            if not (maps and call.end < maps[-1].end):
                maps.append(call)
    return maps


def _site(walk: Walk, call: Call, number: int, where: str) -> GridSite | None:
    """Make the site of a call that puts out a map, its costs left open; None where nothing reads the map."""
    reader = _reader(walk, call, where)
    if reader is None:
        return None
    weight, order = reader
    height, width = spatial_of(call.shape_out, order)
    dim = width_of(call.shape_out, order)
    return GridSite(
        block=call.name,
        attention=walk.recording.attended[number].owner,
        kind=type(walk.model.get_submodule(call.name)).__name__,
        dim=dim,
        key_dim=key_width(dim),
        layout=TokenLayout(height * width, 0, (height, width), order),
        scope=Scope.GRID,
        proofs=("c", "d"),
        where=where,
        weight=weight,
        segment={},
    )


def _reader(walk: Walk, call: Call, where: str) -> tuple[str, str] | None:
    """Find the weight that reads the map, within the module or behind it, and how the map lies."""
    start = call.start if where == "input" else call.end
    for other in walk.recording.calls:
        if other.start <= start or len(other.shape_in) != 4 or other.shape_in != call.shape_out:
            continue
        module = walk.model.get_submodule(other.name)
        if isinstance(module, nn.Conv2d) and module.in_channels == call.shape_out[1]:
            return f"{other.name}.weight", "BCHW"
        if isinstance(module, nn.Linear) and module.in_features == call.shape_out[3]:
            return f"{other.name}.weight", "BHWC"
    return None


# ---------------------------------------------------------------------------------------- what holds, and what it costs


def _hold(walk: Walk, points: list[GridSite]) -> dict[str, GridSite] | Refused:
    """Prove and measure smaller grids from the first point on; return the points that hold, or why none does."""
    costs, counted = dict[Fraction, Stretches](), walk.countable
    reason = "its grids have no common smaller size"
    shares = _shares([point.grid for point in points])
    for tried, share in enumerate(shares[-1:] + shares[:-1]):
        if tried == 2 and not costs:
            break  # neither the smallest nor the largest
        try:
            _prove(walk, points[0], share)
            costs[share] = _measure(*counted, points, share)
        except CountError:
            raise
        except Exception as error:
            reason = f"proof (c): it does not take a smaller grid: {type(error).__name__}: {in_words(error)}"[:300]
    if not costs:
        return Refused("", reason)
    kept = _sound(walk, points, min(costs))
    while True:  # a point that is left out joins two stretches, so the others are measured again
        if len(kept) < len(points):
            points, costs = kept, {share: _measure(*counted, kept, share) for share in costs}
        costs[Fraction(1)] = _measure(*counted, points, Fraction(1))
        kept = _additive(*counted, points, costs)
        if len(kept) == len(points):
            break
    segments = [dict(cost[point.block] for cost in costs.values()) for point in points]
    return {
        point.block: replace(point, segment=segment, macs=segment[point.grid])
        for point, segment in zip(points, segments, strict=True)
    }


def _sound(walk: Walk, points: Sequence[GridSite], share: Fraction) -> list[GridSite]:
    """Return the points after which a smaller grid is taken, tried once for each kind of place."""
    holds: dict[Any, bool] = {}
    for point in points:
        kind = _kind(walk, point)
        if kind not in holds:
            holds[kind] = False
            with suppress(Exception):
                _prove(walk, point, share)
                holds[kind] = True
    return [point for point in points if holds[_kind(walk, point)]]


def _kind(walk: Walk, point: GridSite) -> Any:
    """What places have in common that take a smaller grid alike: classes, and what the module is to the one around."""
    around, _, name = point.block.rpartition(".")
    classes = tuple(type(walk.model.get_submodule(path)) for path in (point.block, around))
    return classes, point.where, "" if name.isdigit() else name


def _additive(
    model: nn.Module, example: Example, points: list[GridSite], costs: Mapping[Fraction, Stretches]
) -> list[GridSite]:
    """Return the points up to the first whose costs depend on where the map was merged.

    What reads the maps of several stages (a feature pyramid) costs what the largest of them makes it cost.
    """
    share, before = min(costs), points[0].grid
    total = count_macs_quick(lambda: run(model, example))
    for place, point in enumerate(points):
        if point.grid != before or (place and point is points[-1]):
            try:
                with replaced({model.get_submodule(point.block): _cropped(model, point, share)}):
                    given = count_macs_quick(lambda: run(model, example))
            except CountError:
                raise
            except Exception:  # not every place of a kind takes a smaller grid
                return [other for other in points if other is not point]
            saved = sum(costs[Fraction(1)][other.block][1] - costs[share][other.block][1] for other in points[place:])
            if given != total - saved:
                return [other for other in points[:place] if other.grid != point.grid] or points[:place]
        before = point.grid
    return points


def _shares(grids: Sequence[Grid]) -> list[Fraction]:
    """Return the shares of height and width to try: those that all maps can keep; even sizes stay even."""
    smallest = min(min(grid) for grid in grids)
    step = 2 if smallest % 2 == 0 and smallest > 4 else 1  # strided convolutions halve what they are given
    shares = [Fraction(kept, smallest) for kept in range(smallest - step, (smallest - 1) // 2, -step)]
    whole = [s for s in shares if all((size * s).denominator == 1 for grid in grids for size in grid)]
    stride = -(-len(whole) // SHARES) or 1
    return whole[stride - 1 :: stride] or whole


def _cropped(model: nn.Module, point: GridSite, share: Fraction) -> Callable[..., Any]:
    """Stand in for the point's module; keep the upper left of its map, which costs what any merging costs."""
    module, order = model.get_submodule(point.block), point.layout.order
    height, width = smaller(point.grid, share)

    def crop(x: Tensor) -> Tensor:
        return x[:, :, :height, :width] if order == "BCHW" else x[:, :height, :width]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if point.where == "input":
            return type(module).forward(module, crop(x), *args, **kwargs)
        return crop(type(module).forward(module, x, *args, **kwargs))

    return forward


def _prove(walk: Walk, point: GridSite, share: Fraction) -> None:
    """(c) the rest of the network takes a smaller grid: same output shapes, finite values."""
    with replaced({walk.model.get_submodule(point.block): _cropped(walk.model, point, share)}):
        outputs = tensors_of(run(walk.model, walk.example))
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in tensors_of(walk.recording.output)]:
        raise ValueError(f"its outputs change their shapes to {[tuple(tensor.shape) for tensor in outputs]}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
        raise ValueError("its outputs are not finite")


def _measure(model: nn.Module, example: Example, points: Sequence[GridSite], share: Fraction) -> Stretches:
    """Count the MACs of each stretch of the network from one point to the next where the first one is merged."""
    marks: list[tuple[str, Grid, int]] = []
    with ExitStack() as stack:
        if share != 1:
            module = model.get_submodule(points[0].block)
            stack.enter_context(replaced({module: _cropped(model, points[0], share)}))
        counter = counting()

        def mark(point: GridSite, x: Tensor) -> None:
            height, width = (int(size) for size in spatial_of(tuple(x.shape), point.layout.order))
            grid = (height, width)
            if point is points[0] and point.where == "input":  # its hook sees the map before it is cropped
                grid = smaller(grid, share)
            marks.append((point.block, grid, int(counter.get_total_flops()) // 2))

        for point in points:
            module = model.get_submodule(point.block)
            if point.where == "input":
                handle = module.register_forward_pre_hook(lambda m, a, point=point: mark(point, a[0]))
            else:
                handle = module.register_forward_hook(lambda m, a, o, point=point: mark(point, o))
            stack.callback(handle.remove)
        stack.enter_context(counter)
        run(model, example)
    total = int(counter.get_total_flops()) // 2
    ends = [macs for _, _, macs in marks[1:]] + [total]
    return {name: (grid, end - macs) for (name, grid, macs), end in zip(marks, ends, strict=True)}
