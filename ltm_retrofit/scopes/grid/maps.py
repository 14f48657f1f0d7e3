"""Where a token map passes: the modules around and before each attention at which it might be merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from ltm_retrofit.finding.recording import Attended, Event, Recording
from ltm_retrofit.scopes.local.chains import Chain

Grid = tuple[int, int]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # they would call a mask as one of their own
SMALLEST = 3  # rows and columns of a map that is worth merging
LEVELS = 4  # how far around an attention a map is looked for
BEFORE = 6  # how many of the maps that were put out before it


@dataclass
class MapPoint:
    """A module around an attention through which a token map passes, at whose input or output it may be merged."""

    name: str
    number: int  # of the attention
    where: str
    order: str
    grid: Grid
    dim: int
    weight: str
    segment: dict[Grid, int] = field(default_factory=dict)


def maps_around(model: nn.Module, recording: Recording) -> bool:
    """Say whether any attention lies in a module that passes a map on."""
    return bool(points_at(model, recording, {}, 0))


def points_at(
    model: nn.Module, recording: Recording, chains: Mapping[int, list[Chain] | str], level: int
) -> list[MapPoint]:
    """Take the module around each attention that keeps its map: the innermost at level 0, else one further out."""
    events: dict[str, list[Event]] = {}
    for event in recording.events:
        events.setdefault(event.name, []).append(event)
    found: dict[str, MapPoint] = {}
    nearest: list[str] = []
    for number, attended in enumerate(recording.attended):
        if level < LEVELS:
            point = _point(model, recording, events, number, attended, chains.get(number), level)
        else:
            maps = _maps_before(recording, attended)
            if not maps or maps[-1].name in nearest[-1:] or level - LEVELS >= len(maps):
                continue  # the same map as for the attention before
            nearest.append(maps[-1].name)
            point = _before(model, recording, events, number, maps[LEVELS - level - 1])
        if point is not None and point.name not in found:
            found[point.name] = point
    return list(found.values())


def _point(
    model: nn.Module,
    recording: Recording,
    events: Mapping[str, Sequence[Event]],
    number: int,
    attended: Attended,
    chain: list[Chain] | str | None,
    level: int,
) -> MapPoint | None:
    point: MapPoint | None = None
    for name in reversed(attended.chain):
        if len(events[name]) != 1 or not name or isinstance(model.get_submodule(name), CONTAINERS):
            continue
        (event,) = events[name]
        if len(event.shape_in) != 4 or event.shape_in != event.shape_out:
            continue
        within = isinstance(chain, list) and chain[0].links[0].event.end <= event.end
        where = "input" if within else "output"
        reader = _reader(model, recording, event, where)
        if reader is None:
            continue
        point = _made(event, number, where, *reader)
        if point is None or level == 0:
            break
        level -= 1
    return point


def _maps_before(recording: Recording, attended: Attended) -> list[Event]:
    """Return the calls that put out a map before an attention, those within others left out."""
    maps: list[Event] = []
    for event in recording.events:
        if event.end < attended.time and len(event.shape_out) == 4 and event.result is not None:
            if not (maps and event.end < maps[-1].end):
                maps.append(event)
    return maps


def _before(
    model: nn.Module, recording: Recording, events: Mapping[str, Sequence[Event]], number: int, event: Event
) -> MapPoint | None:
    """Take the output of a module that was called before the attention."""
    reader = _reader(model, recording, event, "output")
    if reader is None or len(events[event.name]) != 1 or isinstance(model.get_submodule(event.name), CONTAINERS):
        return None
    return _made(event, number, "output", *reader)


def _made(event: Event, number: int, where: str, weight: str, order: str) -> MapPoint | None:
    """Make the point of a call that puts out a map; None where the map is too small to merge."""
    shape = event.shape_out
    grid, dim = (shape[2:], shape[1]) if order == "BCHW" else (shape[1:3], shape[3])
    if min(grid) < SMALLEST:
        return None
    return MapPoint(event.name, number, where, order, (grid[0], grid[1]), dim, weight)


def _reader(model: nn.Module, recording: Recording, event: Event, where: str) -> tuple[str, str] | None:
    """Find the weight that reads the map, within the module or behind it, and how the map lies."""
    start = event.start if where == "input" else event.end
    for other in recording.events:
        if other.start <= start or len(other.shape_in) != 4 or other.shape_in != event.shape_out:
            continue
        module = model.get_submodule(other.name)
        if isinstance(module, nn.Conv2d) and module.in_channels == event.shape_out[1]:
            return f"{other.name}.weight", "BCHW"
        if isinstance(module, nn.Linear) and module.in_features == event.shape_out[3]:
            return f"{other.name}.weight", "BHWC"
    return None
