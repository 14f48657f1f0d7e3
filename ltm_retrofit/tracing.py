"""What one forward pass produced, and the bound on it: for anyone's own training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.classifier import follow_head
from ltm_retrofit.converted.record import forwards_of, get_retrofit, masks_of
from ltm_retrofit.errors import DataError, TrainingError
from ltm_retrofit.merging.ib import soft_targets
from ltm_retrofit.merging.statistics import of_all_ranks
from ltm_retrofit.merging.tokens import Step, accumulated, carried_by
from ltm_retrofit.scopes.flow.forward import BlockForward
from ltm_retrofit.scopes.masks import LEARNABLE

#: images that statistics learn from at once: at small batches learning from each would be a twentieth of a step
TOGETHER = 128


@dataclass
class MergeTrace:
    """The latest forward pass of a converted model.

    ``sites`` and ``steps`` go together, in the plan's order (the final slice is no step); ``features`` is what each
    module of the classifier read, ``(B, D)`` each.
    """

    model: nn.Module
    sites: tuple[str, ...]
    scopes: tuple[str, ...]
    by_site: dict[str, Step] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What each site did; empty before the first forward pass, and while merging is disabled."""
        found = tuple(self.by_site[site] for site in self.sites if site in self.by_site)
        return found if len(found) == len(self.sites) else ()

    def assignment(self, index: int) -> Tensor:
        """Return where tokens are after site ``index``: ``(B, N, P)``, rows summing to one.

        In scope FLOW W of all FLOW sites so far, accumulated; in GRID this site's own; in LOCAL this site's own, of
        each cell: ``(B · cells, tokens, kept)``.

        Raises:
            TrainingError: where no forward pass was traced yet.
        """
        self._check()
        if self.scopes[index] != "FLOW":
            return self.steps[index].assignment.dense()
        flow = [step for step, scope in zip(self.steps[: index + 1], self.scopes, strict=False) if scope == "FLOW"]
        return accumulated(tuple(flow))

    @property
    def feature(self) -> Tensor:
        """The feature that the classifier reads, ``(B, D)``; where several modules read, theirs side by side.

        Raises:
            TrainingError: where no forward pass was traced yet, or the model has no classifier.
        """
        self._check()
        if not self.features:
            raise TrainingError(
                f"this {type(self.model).__name__} has no linear classifier after its blocks, so there is no feature "
                "to bound: give it one through its reset_classifier, or restore it and convert it with one"
            )
        return torch.cat([self.features[name] for name in get_retrofit(self.model).plan.readouts], dim=-1)

    def _check(self) -> None:
        if not self.steps:
            raise TrainingError("no forward pass was traced: call the model inside `with ltm_retrofit.trace(model):`")


@contextmanager
def trace(model: nn.Module) -> Iterator[MergeTrace]:
    """Let the trace hold what each forward pass inside produces; the latest one wins.

    Where the classifier was replaced since the conversion, statistics begin anew for the classes that it has now.

    Raises:
        NotRetrofitted: where the model is not converted.
        UnsupportedBlock: where its classifier was replaced by one that reads tokens that are gone.
    """
    get_retrofit(model)
    follow_head(model)
    plan = get_retrofit(model).plan
    rows = [row for row in plan.rows if row.action == "merge"]
    traced = MergeTrace(model, tuple(row.site for row in rows), tuple(row.scope for row in rows))
    forwards = list(forwards_of(model))
    flow = [forward for forward in forwards if isinstance(forward, BlockForward)]
    names = tuple(row.site for row in rows if row.scope == "FLOW")
    handles = [forward.block.register_forward_hook(partial(_keep_steps, traced, names)) for forward in flow[-1:]]
    handles += [
        model.get_submodule(name).register_forward_pre_hook(partial(_keep_feature, traced, name))
        for name in plan.readouts
    ]
    handles.append(model.register_forward_pre_hook(partial(_begin, traced)))
    for forward in forwards:
        forward.listener = traced.by_site.__setitem__
    try:
        yield traced
    finally:
        for handle in handles:
            handle.remove()
        for forward in forwards:
            forward.__dict__.pop("listener", None)


def _begin(traced: MergeTrace, model: nn.Module, args: Any) -> None:
    traced.by_site.clear()


def _keep_steps(traced: MergeTrace, names: tuple[str, ...], block: nn.Module, args: Any, output: Any) -> None:
    carried = carried_by(output) if isinstance(output, Tensor) else None
    traced.by_site.update(zip(names, carried.steps if carried is not None else (), strict=False))


def _keep_feature(traced: MergeTrace, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    traced.features[name] = args[0]


def bound_loss(
    traced: MergeTrace,
    labels: Tensor,
    *,
    sites: float = 0.0,
    kind: str = "ceb",
    gamma: float | None = None,
    learn: bool = True,
) -> Tensor:
    """Return CEB_γ (METHOD, "Against collapse") at the feature that the classifier reads, in nats.

    In training mode it also learns the statistics of the feature and of every site from this batch: it fits them as
    soon as it has seen enough images, and is a differentiable zero before. In distributed training every process calls
    it, and all learn from the batches of all.

    Args:
        traced: the trace of a forward pass on these images.
        labels: class indices ``(B,)``, or soft labels ``(B, C)`` summing to one.
        sites: weight of the mean bound on each site's own descriptor, added to the feature's.
        kind: ``"ceb"``, or ``"ibb"``, the part of Wang & Yang's bound that depends on the features.
        gamma: γ of CEB_γ instead of the statistics' own.
        learn: whether the statistics learn right away. With gradient checkpointing they must not before the backward
            pass, which would recompute with other ones: leave it to `learn_from` then, after it.

    Raises:
        DataError: where labels do not fit the classes that the model was converted with.
        TrainingError: where nothing was traced, or there is no learnable mask or no classifier.
    """
    kept = get_retrofit(traced.model)
    feature = traced.feature
    if kept.readout is None:
        raise TrainingError(f"method {kept.plan.config.method!r} has no mask to train, so there is no bound")
    targets = soft_targets(labels, kept.plan.classes).to(feature.device)
    if len(targets) != len(feature):
        raise DataError(f"{len(targets)} labels for {len(feature)} traced images: trace the batch that they belong to")
    loss = kept.readout.bound(feature, targets, kind, gamma)
    if sites:
        for mask, descriptor in _descriptors(traced, len(targets)):
            share = sites / len(traced.sites)
            loss = loss + share * mask.statistics.bound(descriptor, targets, kind, gamma)
    if learn:
        learn_from(traced, targets)
    return loss


@torch.no_grad()
def learn_from(traced: MergeTrace, targets: Tensor) -> None:
    """Let the statistics of the feature and of every site learn from a traced batch, in training mode only."""
    kept = get_retrofit(traced.model)
    if not traced.model.training or kept.readout is None:
        return
    for mask, descriptor in _descriptors(traced, len(targets)):
        mask.statistics.update(*of_all_ranks(descriptor, targets), together=TOGETHER)
    kept.readout.update(*of_all_ranks(traced.feature, targets), together=TOGETHER)


def _descriptors(traced: MergeTrace, images: int) -> Iterator[tuple[Any, Tensor]]:
    """Return each site's mask and its descriptor of each image ``(B, D)``."""
    masks = masks_of(traced.model)
    for name, step in zip(traced.sites, traced.steps, strict=True):
        mask = masks[name]
        assert isinstance(mask, LEARNABLE) and step.descriptor is not None
        descriptor = step.descriptor  # of each sequence: an image may have several (windows)
        yield mask, descriptor.reshape(images, -1, descriptor.shape[-1]).mean(dim=1)
