"""probe → cut → prove: the whole walk, one call."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError, ExampleError, NoAttentionError, UnsupportedBlock
from ltm_retrofit.finding.example import Example, fixed_of, in_float, on_meta, prepare_example, run
from ltm_retrofit.finding.layouts import find_axes
from ltm_retrofit.finding.prefix import note_constant_tokens
from ltm_retrofit.finding.recording import Recording, record
from ltm_retrofit.finding.sites import AttentionSite, FlowSite, GridSite, LocalSite, Sites, TokenLayout
from ltm_retrofit.finding.twin import expand, is_empty, kept_of, make_twin, stands_for
from ltm_retrofit.macs import count_macs_again, count_macs_quick
from ltm_retrofit.merging.methods import Scope
from ltm_retrofit.scopes.flow.find import find_ending, find_flow, flow_sites
from ltm_retrofit.scopes.grid.find import find_grids
from ltm_retrofit.scopes.grid.maps import MapPoint, maps_around
from ltm_retrofit.scopes.local.chains import Chain, Link, find_chains
from ltm_retrofit.scopes.local.find import local_sites
from ltm_retrofit.scopes.local.mixers import find_mixers
from ltm_retrofit.undisturbed import undisturbed

#: MACs above which the twin of a model without numbers is cut short
SHORTENED = 3e9
#: MACs above which it is cut short in any case, and then has no sites in scope GRID
WHOLE = 12e9


def find_sites(model: nn.Module, example: Example | None = None) -> Sites:
    """Find the blocks in which tokens may be merged, and prove it. Touches nothing.

    Args:
        model: any ``nn.Module``. Where its parameters are on the meta device, the proofs run on a twin with random
            numbers, in which runs of equal blocks are cut short; `retrofit` proves again on the real ones.
        example: a tensor or a dict of keyword arguments, of any batch size; made from what the model says of its
            input where it is left out.

    Returns:
        The sites in depth order, each attention in the best scope that the proofs allow; ``.excluded`` names every
        other attention with its reason, ``.narrowed`` says of the others why they are not in a better scope.

    Raises:
        NoAttentionError: where the model attends nowhere.
        ExampleError: where there is no example, or the model cannot be run on it.
        UnsupportedBlock: under ``torch.inference_mode()``.
    """
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedBlock(
            f"this {type(model).__name__} is looked at, or was built, under torch.inference_mode(), whose tensors no "
            "gradient can go through, and where keys come from is read off gradients: build and convert it outside of "
            "inference_mode; torch.no_grad() does no harm"
        )
    return _find(model, prepare_example(model, example))


def _find(model: nn.Module, example: Example, whole: bool = False) -> Sites:
    """Walk; where there are no numbers on a twin that is ``whole``, or as short as may be."""
    shapes = (
        {"": tuple(example.shape)}
        if isinstance(example, Tensor)
        else {key: tuple(value.shape) for key, value in example.items() if isinstance(value, Tensor)}
    )
    base, full, removed = identify(model), (model, example), dict[str, str]()
    recording: Recording | None = None
    total = 0
    if is_empty(model):
        total = _total(*full)
        model, example, removed, recording = _record_twin(*full, total, whole)
    elif any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        # rounding in half precision is as large as what the proofs look for; sites hold names and code, no modules
        model, example = copy.deepcopy(model).float(), in_float(example)
        full = model, example
    with undisturbed(model), torch.no_grad():
        recording = recording or record(model, example)
        if not recording.attended:
            raise NoAttentionError(
                f"{type(model).__name__} attends nowhere: no scaled dot-product, no softmax of a product and no "
                "kernelised attention was seen in a forward pass of the example. Token merging needs a transformer "
                "with attention blocks"
            )
        narrowed: dict[str, str] = {}
        candidates, prefix = find_flow(model, example, recording, narrowed)
        cut = {candidate.name for candidate in candidates}
        uncut = {n for n, attended in enumerate(recording.attended) if not cut & set(attended.chain)}
        # in large models without numbers, other scopes than the best one are not looked for
        chains: dict[int, list[Chain] | str] = {}
        mixers: dict[int, Link] = {}
        if uncut or total <= SHORTENED:
            axes = find_axes(model, example, recording)
            chains = find_chains(model, example, recording, axes)
            mixers = find_mixers(model, recording, uncut, axes.folded)
            note_constant_tokens(model, example, recording)
        total = total or count_macs_again(*full, recording.macs)
        flow = flow_sites(candidates, prefix, recording)
        ending = find_ending(model, example, recording, candidates, prefix)
        points: list[MapPoint] = []
        no_grid = ""
        if any(len(event.shape_in) == 4 for event in recording.events):
            with undisturbed(full[0]):
                points, no_grid = find_grids(model, partial(_countable, *full), example, recording, chains, removed)
    local = local_sites(model, recording, chains, mixers)
    if removed and any(_crosses(site, removed) for several in local.values() for site in several):
        return _find(*full, whole=True)
    grid = {point.number: _grid_site(model, recording, point) for point in points}
    best, other, excluded = _best(recording, flow, grid, local, narrowed, no_grid)
    if removed:
        best, other = expand(best, removed, full[0]), expand(other, removed, full[0])
    owners = [attended.chain[-1] for attended in recording.attended]
    counts = [stands_for(name, removed) for name in owners]  # a block of a twin stands for those that were cut away
    missed = sum(count for name, count in zip(owners, counts, strict=True) if name in excluded)
    return Sites(
        found=tuple(best),
        excluded=excluded,
        total_macs=total,
        ending=ending,
        input_size=shapes,
        fixed_inputs=fixed_of(example),
        base=base,
        alternatives=tuple(other),
        attentions=sum(counts),
        covered=sum(counts) - missed,
        narrowed=narrowed,
    )


def identify(model: nn.Module) -> dict[str, str]:
    """Say which library a model comes from, its class and, where it knows it, its architecture's name."""
    library = type(model).__module__.partition(".")[0]
    named = {"library": library, "class": type(model).__name__}
    declared = getattr(model, "pretrained_cfg", None)
    if library == "timm" and isinstance(declared, Mapping) and declared.get("architecture"):
        named["architecture"] = str(declared["architecture"])
    if library == "transformers":
        named["architecture"] = str(getattr(getattr(model, "config", None), "model_type", ""))
    return named


def _record_twin(
    model: nn.Module, example: Example, total: int, whole: bool
) -> tuple[nn.Module, Example, dict[str, str], Recording]:
    """Make a twin that runs, as short as may be, and record it."""
    kept = kept_of(total) if total > SHORTENED and not whole else None
    twin, inputs, removed = make_twin(model, example, kept=kept)
    try:
        with undisturbed(twin), torch.no_grad():
            recording = record(twin, inputs)
            whole = bool(removed) and total < WHOLE and maps_around(twin, recording)
        whole = whole or (bool(removed) and not _faithful(model, example, recording, removed))
    except ExampleError:  # something counts its blocks
        whole = bool(removed)
        if not removed:
            raise
    if whole:  # grids are found in models that are whole
        twin, inputs, removed = make_twin(model, example, kept=None)
        with undisturbed(twin), torch.no_grad():
            recording = record(twin, inputs)
    return twin, inputs, removed, recording


def _faithful(model: nn.Module, example: Example, recording: Recording, removed: Mapping[str, str]) -> bool:
    """Say whether the blocks that stay in a twin receive what they receive in the full model, and are read alike.

    ConViT joins its class token before the eleventh block: in a twin of four there is none. VitPose's head may read
    what the fourth of twelve blocks puts out: in a twin of four that would be the last one.
    """
    lists = {name.rpartition(".")[0] for name in removed}
    wanted = {e.name: e.shape_in for e in recording.events if e.name.rpartition(".")[0] in lists and e.shape_in}
    try:
        full = record(*on_meta(model, example))
    except Exception:  # something looks at values, which the meta device has none of
        return False
    given = {event.name: event for event in full.events}

    def readers(name: str) -> frozenset[str]:
        own = f"{name.rpartition('.')[0]}."
        return frozenset(user for user in full.used.get(given[name].result or 0, ()) if not user.startswith(own))

    for path in lists:
        blocks = [name for name in given if name.rpartition(".")[0] == path]
        if len({readers(name) for name in blocks[:-1]}) > 1:
            return False
    return all(given[name].shape_in == shape for name, shape in wanted.items())


def _crosses(site: LocalSite | str, removed: Mapping[str, str]) -> bool:
    """Say whether a site spans several of the blocks that a twin was cut among: a copy of it would be of another."""
    if isinstance(site, str):
        return False
    lists = {name.rpartition(".")[0] for name in removed}

    def child(name: str) -> set[str]:
        return {".".join(name.split(".")[: len(path.split(".")) + 1]) for path in lists if name.startswith(f"{path}.")}

    return len({frozenset(child(name)) for name in (site.attention, *site.chain)}) > 1


def _countable(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Return copies without numbers, on which counting is cheap, or where those do not run, others with numbers."""
    empty, inputs = on_meta(model, example)
    try:
        with undisturbed(empty), torch.no_grad():
            run(empty, inputs)
    except Exception:  # something looks at values, or a constant lives on a device
        return make_twin(model, example, kept=None)[:2] if is_empty(model) else (model, example)
    return empty, inputs


def _total(model: nn.Module, example: Example) -> int:
    empty, inputs = on_meta(model, example)
    try:
        with undisturbed(empty), torch.no_grad():
            return count_macs_quick(lambda: run(empty, inputs))
    except CountError:
        raise
    except Exception:  # something looks at values, which the meta device has none of
        twin, numbers, _ = make_twin(model, example, kept=None)
        with undisturbed(twin), torch.no_grad():
            return count_macs_quick(lambda: run(twin, numbers))


def _grid_site(model: nn.Module, recording: Recording, point: MapPoint) -> GridSite:
    return GridSite(
        block=point.name,
        attention=recording.attended[point.number].chain[-1],
        kind=type(model.get_submodule(point.name)).__name__,
        dim=point.dim,
        key_dim=min(point.dim, max(16, min(64, point.dim // 8))),
        layout=TokenLayout(point.grid[0] * point.grid[1], 0, point.grid, point.order),
        scope=Scope.GRID,
        proofs=("c", "d"),
        macs=point.segment[point.grid],
        where=point.where,
        weight=point.weight,
        segment=point.segment,
    )


def _best(
    recording: Recording,
    flow: Sequence[FlowSite],
    grid: Mapping[int, GridSite],
    local: Mapping[int, list[LocalSite] | str],
    narrowed: dict[str, str],
    no_grid: str,
) -> tuple[list[AttentionSite], list[AttentionSite], dict[str, str]]:
    """List each attention in the best scope that it has: FLOW before GRID before LOCAL; the rest with reasons."""
    best: list[AttentionSite] = []
    other: list[AttentionSite] = []
    excluded: dict[str, str] = {}
    for number, attended in enumerate(recording.attended):
        own: list[Any] = [site for site in flow if site.block in attended.chain]
        # the map that an attention reads is the last one that was put out before it, or around it
        own += [grid[max(place for place in grid if place <= number)]] if grid and number >= min(grid) else []
        mine = local.get(number, [])
        if own:
            best += [own[0]] if own[0] not in best else []
            other += [site for site in (*own[1:], *(mine if isinstance(mine, list) else ())) if site not in other]
            continue
        if isinstance(mine, list):
            behind = [site for site in mine if not site.mixes]
            best += behind or mine
            other += [site for site in mine if behind and site.mixes]
            continue
        name = attended.chain[-1]
        reason = next((narrowed[n] for n in reversed(attended.chain) if n in narrowed), "")
        excluded[name] = "; ".join(part for part in (reason, no_grid, mine) if isinstance(part, str) and part)
    served = {site.attention for site in (*best, *other)}  # by what is behind the last time that a module attends
    excluded = {name: why for name, why in excluded.items() if name not in served}
    return best, [site for site in other if site not in best], excluded
