"""What one forward pass produced, and the bound on it: for anyone's own training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.blocks import CHILD, forwards_of
from ltm_retrofit.convert import get_retrofit
from ltm_retrofit.errors import DataError, TrainingError
from ltm_retrofit.merging.ib import soft_targets
from ltm_retrofit.merging.mask import MaskModule
from ltm_retrofit.merging.tokens import Step, accumulated, carried_by


@dataclass
class MergeTrace:
    """The latest forward pass of a converted model.

    ``sites`` and ``steps`` go together, in depth order (the final slice is no step); ``features`` is what each module
    of the classifier read, ``(B, D)`` each.
    """

    model: nn.Module
    sites: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    features: dict[str, Tensor] = field(default_factory=dict)

    def assignment(self, index: int) -> Tensor:
        """Return W of all sites up to ``index``, accumulated: ``(B, N, P)``, rows summing to one.

        Raises:
            TrainingError: where no forward pass was traced yet.
        """
        self._check()
        return accumulated(self.steps[: index + 1])

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
                "to bound: give it a head before converting"
            )
        return torch.cat([self.features[name] for name in get_retrofit(self.model).plan.readouts], dim=-1)

    def _check(self) -> None:
        if not self.steps:
            raise TrainingError("no forward pass was traced: call the model inside `with ltm_retrofit.trace(model):`")


@contextmanager
def trace(model: nn.Module) -> Iterator[MergeTrace]:
    """Let the trace hold what each forward pass inside produces; the latest one wins.

    Raises:
        NotRetrofitted: where the model is not converted.
    """
    plan = get_retrofit(model).plan
    traced = MergeTrace(model, tuple(row.site for row in plan.rows if row.action == "merge"))
    *_, last = forwards_of(model)
    handles = [last.block.register_forward_hook(partial(_keep_steps, traced))]
    handles += [
        model.get_submodule(name).register_forward_pre_hook(partial(_keep_feature, traced, name))
        for name in plan.readouts
    ]
    try:
        yield traced
    finally:
        for handle in handles:
            handle.remove()


def _keep_steps(traced: MergeTrace, block: nn.Module, args: Any, output: Any) -> None:
    carried = carried_by(output) if isinstance(output, Tensor) else None
    traced.steps = carried.steps if carried is not None else ()


def _keep_feature(traced: MergeTrace, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    traced.features[name] = args[0]


def bound_loss(traced: MergeTrace, labels: Tensor, *, sites: float = 0.0) -> Tensor:
    """Return CEB_γ (METHOD, "Against collapse") at the feature that the classifier reads, in nats.

    In training mode it also learns the statistics of the feature and of every site from this batch: it fits them as
    soon as it has seen enough images, and is a differentiable zero before.

    Args:
        traced: the trace of a forward pass on these images.
        labels: class indices ``(B,)``, or soft labels ``(B, C)`` summing to one.
        sites: weight of the mean bound on each site's own descriptor, added to the feature's.

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
    loss = kept.readout.bound(feature, targets)
    masks = [traced.model.get_submodule(f"{name}.{CHILD}" if name else CHILD) for name in traced.sites]
    for mask, step in zip(masks, traced.steps, strict=True):
        assert isinstance(mask, MaskModule) and step.descriptor is not None
        if sites:
            loss = loss + sites / len(masks) * mask.statistics.bound(step.descriptor, targets)
        if traced.model.training:
            mask.statistics.update(step.descriptor, targets)
    if traced.model.training:
        kept.readout.update(feature, targets)
    return loss
