"""What one forward pass produced, and the bound on it: for anyone's own training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.classifier import follow_classifier
from ltm_retrofit.converted.record import converted_part, forwards_of, get_retrofit, has_step, masks_of
from ltm_retrofit.errors import DataError, TrainingError
from ltm_retrofit.merging.ib import soft_targets
from ltm_retrofit.merging.statistics import of_all_ranks
from ltm_retrofit.merging.tokens import Merge, accumulated
from ltm_retrofit.scopes import rules_of

#: images that statistics learn from at once: at small batches learning from each would be a twentieth of a step
TOGETHER = 128


@dataclass
class MergeTrace:
    """The latest forward pass of a converted model.

    ``sites`` and ``merges`` go together, in the plan's order (the final slice is no merge); ``features`` is what each
    module of the classifier read, ``(B, D)`` each.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> model = ltm.retrofit(model, ltm.LTMConfig(tokens=(12, 9)))
        >>> with ltm.trace(model) as traced:
        ...     logits = model(torch.randn(2, 3, 32, 32))
        >>> traced.sites, traced.assignment(1).shape, traced.feature.shape
        (('blocks.1', 'blocks.2'), torch.Size([2, 17, 9]), torch.Size([2, 192]))
    """

    model: nn.Module
    sites: tuple[str, ...]
    scopes: tuple[str, ...]
    by_site: dict[str, Merge] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def merges(self) -> tuple[Merge, ...]:
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
        scope, so_far = self.scopes[index], self.merges[: index + 1]
        if not rules_of(scope).stays:
            return so_far[-1].assignment.dense()
        return accumulated(tuple(merge for merge, own in zip(so_far, self.scopes, strict=False) if own == scope))

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
        if not self.merges:
            raise TrainingError("no forward pass was traced: call the model inside `with ltm_retrofit.trace(model):`")


@contextmanager
def trace(model: nn.Module) -> Iterator[MergeTrace]:
    """Let the trace hold what each forward pass inside produces; the latest one wins.

    Where the classifier was replaced since the conversion, statistics begin anew for the classes that it has now.

    Raises:
        NotRetrofitted: where the model is not converted.
        UnsupportedBlock: where its classifier was replaced by one that reads tokens that are gone.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> with ltm.trace(ltm.retrofit(model)) as traced:
        ...     logits = model(torch.randn(2, 3, 32, 32))
        >>> len(traced.merges) == len(traced.sites)
        True
    """
    model = converted_part(model)
    follow_classifier(model)
    plan = get_retrofit(model).plan
    rows = [row for row in plan.rows if not row.slices]
    traced = MergeTrace(model, tuple(row.site for row in rows), tuple(row.scope for row in rows))
    forwards = list(forwards_of(model))
    handles = [
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


def _keep_feature(traced: MergeTrace, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    traced.features[name] = args[0]


def bound_loss(
    traced: MergeTrace, labels: Tensor, *, kind: str = "ceb", gamma: float | None = None, learn: bool = True
) -> Tensor:
    """Return CEB_γ (docs/method.md, "Against collapse") at the feature that the classifier reads, in nats.

    In training mode it also learns the statistics from this batch, of the feature and of masks with an IB step: it fits
    them as soon as it has seen enough images, and is a differentiable zero before. In distributed training every
    process calls it, and all learn from the batches of all.

    Args:
        traced: the trace of a forward pass on these images.
        labels: class indices ``(B,)``, or soft labels ``(B, C)`` summing to one.
        kind: ``"ceb"``, or ``"ibb"``, the part of Wang & Yang's bound that depends on the features.
        gamma: γ of CEB_γ instead of the statistics' own.
        learn: whether the statistics learn right away. With gradient checkpointing they must not before the backward
            pass, which would recompute with other ones: leave it to `learn_from` then, after it.

    Raises:
        DataError: where labels do not fit the classes that the model was converted with.
        TrainingError: where nothing was traced, or there is no learnable mask or no classifier.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
        >>> with ltm.trace(ltm.retrofit(model).train()) as traced:
        ...     loss = torch.nn.functional.cross_entropy(model(images), labels)
        >>> bound = ltm.bound_loss(traced, labels)  # zero until 256 images were seen
        >>> (loss + 0.1 * bound).backward()
    """
    targets = _targets(traced, labels)
    readout = get_retrofit(traced.model).readout
    assert readout is not None
    loss = readout.bound(traced.feature, targets, kind, gamma)
    if learn:
        _learn(traced, targets)
    return loss


def learn_from(traced: MergeTrace, labels: Tensor) -> None:
    """Let the statistics of the feature and of masks with a step learn from a traced batch, in training mode only.

    `bound_loss` does so by itself. Only with gradient checkpointing this is called after the backward pass, and
    `bound_loss` with ``learn=False`` before it.

    Args:
        traced: the trace of a forward pass on these images.
        labels: class indices ``(B,)``, or soft labels ``(B, C)`` summing to one.

    Raises:
        DataError, TrainingError: as `bound_loss` does.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> model.set_grad_checkpointing()
        >>> images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
        >>> with ltm.trace(ltm.retrofit(model).train()) as traced:
        ...     loss = torch.nn.functional.cross_entropy(model(images), labels)
        >>> (loss + 0.1 * ltm.bound_loss(traced, labels, learn=False)).backward()
        >>> ltm.learn_from(traced, labels)
    """
    _learn(traced, _targets(traced, labels))


def _targets(traced: MergeTrace, labels: Tensor) -> Tensor:
    """Return soft labels ``(B, C)`` beside the traced feature."""
    record, feature = get_retrofit(traced.model), traced.feature
    if record.readout is None:
        raise TrainingError(f"method {record.plan.config.method!r} has no mask to train, so there is no bound")
    targets = soft_targets(labels, record.plan.classes).to(feature.device)
    if len(targets) != len(feature):
        raise DataError(f"{len(targets)} labels for {len(feature)} traced images: trace the batch that they belong to")
    return targets


@torch.no_grad()
def _learn(traced: MergeTrace, targets: Tensor) -> None:
    readout = get_retrofit(traced.model).readout
    if not traced.model.training or readout is None:
        return
    masks: dict[str, Any] = masks_of(traced.model)
    for name, merge in zip(traced.sites, traced.merges, strict=True):
        if has_step(masks[name]):
            assert merge.descriptor is not None
            # of each sequence: an image may have several (windows), and has one label
            own = merge.descriptor.reshape(len(targets), -1, merge.descriptor.shape[-1]).mean(dim=1)
            masks[name].statistics.update(*of_all_ranks(own, targets), together=TOGETHER)
    readout.update(*of_all_ranks(traced.feature, targets), together=TOGETHER)
