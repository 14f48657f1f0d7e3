"""What does merging change in what a model answers? Measured on a few images, for plans to be chosen by it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import RecipeError, UnsupportedBlock
from ltm_retrofit.finding.example import Example, logits_of, mapped, run, tensors_of
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.plan import plan_of
from ltm_retrofit.progress import progress
from ltm_retrofit.scopes import build_all, tried
from ltm_retrofit.scopes.base import CHILD, Budget, Option, Row
from ltm_retrofit.scopes.flow import FLOW
from ltm_retrofit.undisturbed import undisturbed

#: images that run at once; of fewer than the least, the noise says more than the images
BATCH, LEAST = 16, 8
#: plans that are compared whole at most, beside the one to begin with
COMPARED = 14
#: standard errors by which a plan has to be better than that of the schedule: of 14 that are no better, one seems so
#: once in twenty times. Images at hand are often those that the model was trained on, and it is sure of them: what
#: seemed a little better on 32 of those was worse on others (`benchmarks/calibrated.py`)
CLEARLY = 2.7
#: share of the images that are recognised as something else from which on it is said that accuracy is lost
LOST = 0.3

Rows = tuple[Row, ...]


class Differ(NamedTuple):
    """By how much the answers to n images differ, and of which the class that comes first is another: ``(n,)``."""

    by: Tensor
    other: Tensor

    @property
    def mean(self) -> float:
        """The mean over the images."""
        return float(self.by.mean())


class Passes:
    """What a model answers to a few images, by itself and with the rows of a plan: how much do they differ?

    Of a model with a classifier it is the Kullback-Leibler divergence KL(original ‖ merged) of the classes'
    probabilities, in nats; of others the squared difference of the outputs in units of their squares.

    Args:
        model: not converted.
        sites: what `find_sites` found in it.
        config: what is asked for.
        images: ``(n, C, H, W)``, or keyword arguments that hold such a tensor.

    Raises:
        RecipeError: where the images do not fit the model, or are too few.
        UnsupportedBlock: where the model is converted already.
    """

    def __init__(self, model: nn.Module, sites: Sites, config: LTMConfig, images: Example) -> None:
        if any(hasattr(module, CHILD) for module in model.modules()):
            raise UnsupportedBlock("plans are calibrated on the model before its conversion: restore it first")
        self.model, self.sites, self.config = model, sites, config
        self.known: dict[Rows, Differ] = {}
        self.batches = list(_batches(images, len(_images_of(images, sites))))
        self.blocks = [site.block for site in sites.of(FLOW.name)]
        self.original: list[list[Tensor]] = []
        self.outputs: list[dict[str, Any]] = []  # of each block, by batch
        with undisturbed(model), torch.no_grad():
            for batch in self.batches:
                kept: dict[str, Any] = {}
                with _told(model, self.blocks, kept.__setitem__):
                    self.original.append(self._answers(batch))
                self.outputs.append(kept)

    def differ(self, rows: Rows) -> Differ:
        """Return how much the answers with these rows in place differ; what was asked once is known. In `undisturbed`.

        Blocks before the first site are not run again: they would return what they returned before.
        """
        if rows not in self.known:
            self.known[rows] = self._measured(rows)
        return self.known[rows]

    def _measured(self, rows: Rows) -> Differ:
        parts = build_all(self.model, self.sites, plan_of(self.sites, self.config, rows))
        places = [self.blocks.index(row.site) if row.site in self.blocks else 0 for row in rows]
        first = min(places)  # what merges elsewhere may lie before all of these blocks
        found = []
        with tried(self.model, parts):
            for batch, outputs, original in zip(self.batches, self.outputs, self.original, strict=True):
                with _given(self.model, {name: outputs[name] for name in self.blocks[:first] if name in outputs}):
                    found.append(difference(original, self._answers(batch)))
        by, other = map(torch.cat, zip(*found, strict=True))
        return Differ(torch.where(by.isfinite(), by, torch.inf), other)  # what is no number is no better plan

    def _answers(self, batch: Example) -> list[Tensor]:
        output = run(self.model, batch)
        logits = logits_of(output) if self.sites.ending.classes else None
        return [logits] if logits is not None else [t for t in tensors_of(output) if t.is_floating_point()]


def calibrate(
    passes: Passes, budget: Budget[Any], change: int, found: Sequence[Option], fits: Callable[[int], bool]
) -> tuple[Rows, dict[str, float]]:
    """Return the rows that change the answers least among all that were tried, and what was measured of them.

    First what each site alone does, at a few counts; then, where the scope allocates by that, its plans; then plans
    around the best of these, as long as one is better. Every comparison is by whole passes over the same images. The
    plan of the schedule is kept where none is clearly better: by 2.7 standard errors of the paired difference.

    Args:
        passes: of the model over a few images.
        budget: of the scope that merges.
        change: by how many MACs rows have to change the model, negative.
        found: plans that meet the budget, that of the schedule ``"auto"`` first.
        fits: says of a change of MACs whether it meets the budget.
    """
    probes = budget.probes()
    bar = progress("calibrating", len(probes) + COMPARED, "plans")
    with undisturbed(passes.model), torch.no_grad(), bar:

        def measured(rows: Rows) -> Differ:
            bar.update()
            return passes.differ(rows)

        losses = {rows: measured(rows).mean for rows in probes}
        start = found[0][0]
        tried_out = {start: measured(start)}
        left = COMPARED

        def compare(options: Sequence[Option]) -> Rows:
            nonlocal left
            for rows, macs in options:
                if rows not in tried_out and left and fits(macs):
                    tried_out[rows] = measured(rows)
                    left -= 1
            return min(tried_out, key=lambda rows: tried_out[rows].mean)

        # a scope that cannot allocate has few plans for a budget: some of them, evenly spread, are compared whole
        options = budget.allocated(change, losses) or found[:: max(1, len(found) // COMPARED)]
        best, before = compare(options), None
        while best != before and left:
            best, before = compare(budget.near(best, change)), best
        bar.total = bar.n
        bar.refresh()
    better = tried_out[start].by - tried_out[best].by
    if not better.mean() > CLEARLY * better.std() / len(better) ** 0.5:
        best = start
    changed = float(tried_out[best].other.float().mean())
    if changed > LOST:
        warnings.warn(
            f"with so few MACs left {changed:.0%} of {len(tried_out[best].by)} images are recognised as another class "
            "than before, by the best plan that was found: accuracy is lost, which a short fine-tune may not bring "
            "back. Ask for a larger share",
            stacklevel=2,
        )
    return best, {
        "images": float(len(tried_out[best].by)),
        "difference": tried_out[best].mean,
        "difference of auto": tried_out[start].mean,
        "other answers": changed,
    }


def _images_of(images: Example, sites: Sites) -> Tensor:
    """Return the tensor of images of what was given.

    Raises:
        RecipeError: where it is not of the size that the sites were found for, or holds too few.
    """
    shape = next(size for size in sites.input_size.values() if len(size) >= 4)
    found = next((tensor for tensor in tensors_of(images) if tensor.ndim == len(shape)), None)
    if found is None or tuple(found.shape[1:]) != shape[1:]:
        given = [tuple(tensor.shape) for tensor in tensors_of(images)] or type(images).__name__
        raise RecipeError(
            f"images to calibrate on must be a tensor (n, {', '.join(map(str, shape[1:]))}), prepared as the model "
            f"wants them and of the size that the sites were found for; got {given}"
        )
    if len(found) < LEAST:
        raise RecipeError(f"{len(found)} images are too few to calibrate on: give {LEAST} or more, 16 to 64 are usual")
    return found


def _batches(images: Example, count: int) -> Iterator[Example]:
    """Go through the images, a batch at a time; tensors that do not hold as many stay as they are."""
    for begin in range(0, count, BATCH):
        part = slice(begin, begin + BATCH)
        yield mapped(images, lambda value, part=part: value[part] if len(value) == count else value)  # type: ignore[misc]


def difference(before: list[Tensor], after: list[Tensor]) -> Differ:
    """Compare outputs: one tensor of logits ``(n, C)`` by its classes, others by their squares, see `Passes`."""
    if len(before) == 1 and before[0].ndim == 2:
        p, q = (each.float().log_softmax(dim=1) for each in (before[0], after[0]))
        by = F.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)
        other = p.argmax(dim=1) != q.argmax(dim=1)
    else:
        shares = []
        for then, now in zip(before, after, strict=True):
            off, whole = (each.float().square().flatten(1).sum(dim=1) for each in (now - then, then))
            shares.append(off / whole.clamp_min(1e-12))
        by = torch.stack(shares).mean(dim=0)
        other = torch.zeros_like(by, dtype=torch.bool)
    return Differ(by, other)


@contextmanager
def _told(model: nn.Module, names: Sequence[str], tell: Callable[[str, Any], None]) -> Iterator[None]:
    """Have each of these modules tell what it returns."""

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: tell(name, _returned(output))

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _given(model: nn.Module, outputs: dict[str, Any]) -> Iterator[None]:
    """Have modules return what is given, without running."""
    modules = [(model.get_submodule(name), output) for name, output in outputs.items()]
    before = [module.__dict__.get("forward") for module, _ in modules]
    for module, output in modules:
        module.__dict__["forward"] = partial(_returned, output)
    try:
        yield
    finally:
        for (module, _), forward in zip(modules, before, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def _returned(output: Any, *_args: Any, **_kwargs: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, output)
