"""Where a token map may go on smaller (scope GRID): found by running the rest of the network on a smaller one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.example import Example, run, tensors_of
from ltm_retrofit.finding.recording import Recording, replaced
from ltm_retrofit.macs import count_macs_quick, counting
from ltm_retrofit.scopes.grid.maps import BEFORE, LEVELS, MapPoint, points_at
from ltm_retrofit.scopes.local.chains import Chain

Grid = tuple[int, int]
SHARES = 6  # how many smaller sizes are tried
ATTEMPTS = 5  # how many of these are tried


def find_grids(
    model: nn.Module,
    countable: Callable[[], tuple[nn.Module, Example]],
    example: Example,
    recording: Recording,
    chains: Mapping[int, list[Chain] | str],
    removed: Mapping[str, str],
) -> tuple[list[MapPoint], str]:
    """Find the points after which the network takes a smaller grid, with their costs; and why not more.

    Args:
        model: with numbers, to prove it on.
        countable: makes the full model and example to count on, which may be on the meta device.
        example: for ``model``.
        recording: of ``model``.
        chains: the MLP behind each attention.
        removed: blocks of the full model that ``model`` lacks, with those that stand for them.
    """
    if removed:
        return [], "grids are looked for in models that are whole"
    shapes, reason = [tensor.shape for tensor in tensors_of(recording.output)], ""
    tried: list[list[str]] = [[]]
    levels = [points_at(model, recording, chains, level) for level in range(LEVELS + BEFORE)]
    if not any(levels):
        return [], "no module around it passes a map (B, C, H, W) on"
    counted = countable()
    while any(levels):  # all maps first; then without those of the largest grid
        for points in levels:
            if [point.name for point in points] in tried or len(tried) > ATTEMPTS:
                continue
            tried.append([point.name for point in points])
            reason = _fill(model, counted, example, points, shapes)
            if not reason:
                return points, ""
        levels = [[point for point in points if point.grid != points[0].grid] for points in levels]
    return [], reason


def _fill(
    model: nn.Module, counted: tuple[nn.Module, Example], example: Example, points: list[MapPoint], shapes: list[Any]
) -> str:
    """Prove and measure smaller grids from the first point on; return why there are none."""
    costs: dict[Fraction, dict[str, tuple[Grid, int]]] = {}
    reason = "its grids have no common smaller size"
    shares = _shares([point.grid for point in points])
    for tried, share in enumerate(shares[-1:] + shares[:-1]):
        if tried == 2 and not costs:
            break  # neither the smallest nor the largest
        try:
            _prove(model, example, points[0], share, shapes)
            costs[share] = _measure(*counted, points, share)
        except CountError:
            raise
        except Exception as error:
            reason = f"proof (c): it does not take a smaller grid: {type(error).__name__}: {error}"[:300]
    if not costs:
        return reason
    sound = _sound(model, example, points, min(costs), shapes)
    while True:
        if len(sound) < len(points):
            points[:] = sound
            costs = {share: _measure(*counted, points, share) for share in costs}
        costs[Fraction(1)] = _measure(*counted, points, Fraction(1))
        sound = _additive(*counted, points, costs)
        if len(sound) == len(points):
            break
    for cost in costs.values():
        for point in points:
            grid, macs = cost[point.name]
            point.segment[grid] = macs
    return ""


def _sound(
    model: nn.Module, example: Example, points: Sequence[MapPoint], share: Fraction, shapes: list[Any]
) -> list[MapPoint]:
    """Return the points after which a smaller grid is taken, tried once for each kind of place."""
    holds: dict[Any, bool] = {}
    sound: list[MapPoint] = []
    for point in points:
        path = point.name.split(".")
        kind = (
            type(model.get_submodule(point.name)),
            type(model.get_submodule(".".join(path[:-1]))),
            point.where,
            "" if path[-1].isdigit() else path[-1],
        )
        if kind not in holds:
            try:
                _prove(model, example, point, share, shapes)
                holds[kind] = True
            except Exception:
                holds[kind] = False
        if holds[kind]:
            sound.append(point)
    return sound


def _additive(
    model: nn.Module, example: Example, points: list[MapPoint], costs: Mapping[Fraction, dict[str, tuple[Grid, int]]]
) -> list[MapPoint]:
    """Return the points up to the first whose costs depend on where the map was merged.

    What reads the maps of several stages (a feature pyramid) costs what the largest of them makes it cost.
    """
    share, before = min(costs), points[0].grid
    total = count_macs_quick(lambda: run(model, example))
    for place, point in enumerate(points):
        if point.grid != before or (place and point is points[-1]):
            try:
                with replaced({model.get_submodule(point.name): _sliced(model, point, share)}):
                    given = count_macs_quick(lambda: run(model, example))
            except CountError:
                raise
            except Exception:  # not every place of a kind takes a smaller grid
                return [other for other in points if other is not point]
            saved = sum(costs[Fraction(1)][other.name][1] - costs[share][other.name][1] for other in points[place:])
            if given != total - saved:
                return [other for other in points[:place] if other.grid != point.grid] or points[:place]
        before = point.grid
    return points


def _shares(grids: Sequence[Grid]) -> list[Fraction]:
    """Return the shares of rows and columns to try: those that all maps can keep; even sizes stay even."""
    smallest = min(min(grid) for grid in grids)
    step = 2 if smallest % 2 == 0 and smallest > 4 else 1
    shares = [Fraction(kept, smallest) for kept in range(smallest - step, (smallest - 1) // 2, -step)]
    whole = [s for s in shares if all((size * s).denominator == 1 for grid in grids for size in grid)]
    stride = -(-len(whole) // SHARES) or 1
    return whole[stride - 1 :: stride] or whole


def smaller(grid: Grid, share: Fraction) -> Grid:
    """Return the grid that keeps this share of rows and columns."""
    return -int(-grid[0] * share // 1), -int(-grid[1] * share // 1)


def _sliced(model: nn.Module, point: MapPoint, share: Fraction) -> Callable[..., Any]:
    """Stand in for the point's module; keep the upper left of its map, which costs what any merging costs."""
    module = model.get_submodule(point.name)
    rows, columns = smaller(point.grid, share)

    def crop(x: Tensor) -> Tensor:
        return x[:, :, :rows, :columns] if point.order == "BCHW" else x[:, :rows, :columns]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if point.where == "input":
            return type(module).forward(module, crop(x), *args, **kwargs)
        return crop(type(module).forward(module, x, *args, **kwargs))

    return forward


def _prove(model: nn.Module, example: Example, point: MapPoint, share: Fraction, shapes: list[torch.Size]) -> None:
    """(c) the rest of the network takes a smaller grid: same output shapes, finite values."""
    with replaced({model.get_submodule(point.name): _sliced(model, point, share)}):
        outputs = tensors_of(run(model, example))
    if [tensor.shape for tensor in outputs] != shapes:
        raise ValueError(f"its outputs change their shapes to {[tuple(tensor.shape) for tensor in outputs]}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
        raise ValueError("its outputs are not finite")


def _measure(
    model: nn.Module, example: Example, points: Sequence[MapPoint], share: Fraction
) -> dict[str, tuple[Grid, int]]:
    """Count the MACs of each stretch of the network from one point to the next where the first one is merged."""
    marks: list[tuple[str, Grid, int]] = []
    with ExitStack() as stack:
        if share != 1:
            module = model.get_submodule(points[0].name)
            stack.enter_context(replaced({module: _sliced(model, points[0], share)}))
        counter = counting()

        def mark(point: MapPoint, x: Tensor) -> None:
            shape = x.shape[2:] if point.order == "BCHW" else x.shape[1:3]
            grid = (int(shape[0]), int(shape[1]))
            if point is points[0] and point.where == "input":
                grid = smaller(grid, share)
            marks.append((point.name, grid, int(counter.get_total_flops()) // 2))

        for point in points:
            module = model.get_submodule(point.name)
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
