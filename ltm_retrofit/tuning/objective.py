"""What a step minimises: the task, the bound on what is kept of the image, and the distance to a teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from ltm_retrofit.convert import restore
from ltm_retrofit.converted.record import get_retrofit, is_retrofitted
from ltm_retrofit.errors import DataError, TrainingError
from ltm_retrofit.finding.example import logits_of, run
from ltm_retrofit.finding.recording import record
from ltm_retrofit.merging.ib import soft_targets
from ltm_retrofit.merging.statistics import SAMPLES_PER_CLUSTER, Statistics
from ltm_retrofit.tracing import MergeTrace, bound_loss, learn_from, trace
from ltm_retrofit.tuning.information import Information
from ltm_retrofit.tuning.settings import TrainConfig


class Objective:
    """Cross-entropy, λ times the bound, and distillation; images may be mixed.

    Args:
        model: what is trained.
        config: weights and kinds.
        classes: C.
        accelerator: of the run: where the teacher computes, and how precisely; None is where the model is, in full.

    The teacher is the network before conversion, with the weights that it has when training begins.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, classes: int, accelerator: Accelerator | None = None
    ) -> None:
        self.model, self.config, self.classes = model, config, classes
        self.bounded = config.bound != "none" and is_retrofitted(model) and get_retrofit(model).readout is not None
        self.teacher = teacher_of(model) if config.distill or config.distill_token else None
        if self.teacher is not None and accelerator is not None:
            self.teacher.to(accelerator.device)
        self.accelerator = accelerator
        self.readouts: tuple[str, ...] = ()
        self.pending: tuple[MergeTrace, Tensor] | None = None
        self.information = Information(model) if self.bounded else None
        kinds = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
        mixes = [
            kind(alpha=getattr(config, name), num_classes=classes)
            for name, kind in kinds.items()
            if getattr(config, name) > 0
        ]
        self.mixes = v2.RandomChoice(mixes) if mixes else None

    def mix(self, inputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
        """Return images, mixed with others of the batch where the settings want it, and soft labels ``(B, C)``."""
        targets = None if labels is None else soft_targets(labels, self.classes)
        if self.mixes is None:
            return inputs, targets
        name = (
            next((key for key, value in inputs.items() if images_in(value)), "") if isinstance(inputs, Mapping) else ""
        )
        images = inputs[name] if name else inputs
        if not images_in(images):
            raise DataError("mixup and cutmix mix images (B, C, H, W), and this batch holds none: set both to 0")
        if targets is None:
            images, _ = self.mixes(images, torch.zeros(len(images), dtype=torch.long, device=images.device))
        else:
            images, targets = self.mixes(images, targets)
        return ({**inputs, name: images} if name else images), targets

    def __call__(self, wrapped: nn.Module, inputs: Any, labels: Tensor | None, *, bound: bool) -> dict[str, Tensor]:
        """Return ``loss`` and what it is made of: ``task``, ``bound`` and, with a teacher, ``distill``.

        Args:
            wrapped: the model as Accelerate wraps it.
            inputs: of a batch.
            labels: class indices, soft labels, or None where there are none and a teacher says what is there.
            bound: whether the bound joins the loss already; its statistics are learned in any case.

        Raises:
            DataError: where there are neither labels nor a teacher, or nothing to mix.
            TrainingError: where the model puts out no logits.
        """
        inputs, targets = self.mix(inputs, labels)
        if targets is None and not self.config.distill:
            raise DataError(
                "these images have no labels: set distill, so that the unconverted model says what they are"
            )
        if self.config.distill_token and not self.readouts:
            self.readouts = self._find_readouts(inputs)
        with self._teaching(inputs) as (taught, token), trace(self.model) if self.bounded else nullcontext() as traced:
            with reading(self.model, self.readouts) as read:
                logits = logits_of(run(wrapped, inputs))
        if logits is None:
            raise TrainingError(f"{type(self.model).__name__} puts out no class logits (B, C): give it a classifier")
        logits = logits.float()
        losses = {"task": logits.new_zeros(()) if targets is None else self._task(logits, targets)}
        loss = losses["task"]
        losses["bound"] = logits.new_zeros(())
        if traced is not None:
            soft = targets if targets is not None or taught is None else taught.softmax(dim=-1)
            assert soft is not None
            losses["bound"] = bound_loss(
                traced,
                soft,
                kind=self.config.bound,
                gamma=self.config.gamma,
                learn=False,
            )
            self.pending = traced, soft
            if self.information is not None and self.model.training:
                self.information.add(traced, soft)
            if bound:
                loss = loss + self.config.bound_weight * losses["bound"]
        if taught is not None:
            losses["distill"] = self.config.distill * self._distance(logits, taught)
            if token is not None:
                near = F.cosine_similarity(torch.cat(read, dim=-1).float(), token, dim=-1)
                losses["distill"] = losses["distill"] + self.config.distill_token * (1 - near).mean()
            loss = loss + losses["distill"]
        return {"loss": loss, **losses}

    def ready(self) -> bool:
        """Say whether there is a bound: whether the statistics of the feature have been fitted."""
        return self.bounded and bool(self._statistics().fitted)

    def needed(self) -> int:
        """Return how many images it takes until there is a bound."""
        return SAMPLES_PER_CLUSTER * len(self._statistics().centroids)

    def _statistics(self) -> Statistics:
        statistics = get_retrofit(self.model).readout
        assert statistics is not None
        return statistics

    def learn(self) -> None:
        """Let the statistics learn from the latest batch: after its backward pass, which may run parts anew."""
        if self.pending is not None:
            learn_from(*self.pending)
            self.pending = None

    @contextmanager
    def informed(self) -> Iterator[None]:
        """Let the forward passes inside say what the network was given, so that `estimate` knows."""
        with nullcontext() if self.information is None else self.information.listening():
            yield

    def estimate(self) -> dict[str, float]:
        """Return what the feature knows of image and class: see `Information.estimate`."""
        return {} if self.information is None else self.information.estimate()

    def _task(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        if self.config.loss == "bce":
            wanted = targets.to(logits.dtype) * (1 - smoothing) + smoothing / self.classes
            return F.binary_cross_entropy_with_logits(logits, wanted)
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def _distance(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Return T²·KL(teacher ‖ student) at temperature T (Hinton et al. 2015), mean over images."""
        warmth = self.config.distill_temperature
        ours, theirs = (F.log_softmax(values / warmth, dim=-1) for values in (logits, taught))
        return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * warmth**2

    @contextmanager
    def _teaching(self, inputs: Any) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Ask the teacher: its logits, and the feature that its classifier reads."""
        if self.teacher is None:
            yield None, None
            return
        precision = nullcontext() if self.accelerator is None else self.accelerator.autocast()
        with torch.no_grad(), precision, reading(self.teacher, self.readouts) as read:
            taught = logits_of(run(self.teacher, inputs))
        assert taught is not None
        yield taught.float(), torch.cat(read, dim=-1).float() if read else None

    def _find_readouts(self, inputs: Any) -> tuple[str, ...]:
        assert self.teacher is not None
        found = record(self.teacher, inputs).readouts(self.classes)
        if not found:
            raise TrainingError(
                f"distill_token: {type(self.model).__name__} has no linear classifier, so no feature to compare"
            )
        return found


def images_in(value: Any) -> bool:
    """Say whether a value of a batch is its images ``(B, C, H, W)``."""
    return isinstance(value, Tensor) and value.ndim == 4


def teacher_of(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model without what a conversion added."""
    teacher = copy.deepcopy(model)
    if is_retrofitted(teacher):
        restore(teacher)
    return teacher.eval().requires_grad_(False)


@contextmanager
def reading(model: nn.Module, names: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """Collect what these modules read in a forward pass."""
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        read.append(args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(keep) for name in names]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
