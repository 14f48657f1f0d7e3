"""What a step minimises: a list of terms.

Each `Term` is a function from what a step has seen to one number, with a weight and a place in the run where it joins
the loss. To add one, write the function here and an entry in `terms_of`; the history then logs it under its name:

    def certainty(seen: Seen) -> Tensor:
        '''Return minus the entropy of the predictions, in nats (Pereyra et al. 2017): sure guesses cost something.'''
        log_p = seen.logits.log_softmax(dim=-1)
        return (log_p.exp() * log_p).sum(dim=-1).mean()

    Term("certainty", certainty, weight=0.1, after=0.2)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from ltm_retrofit.convert import restore
from ltm_retrofit.converted.record import get_retrofit, is_retrofitted, masks_of
from ltm_retrofit.errors import DataError, RecipeError, TrainingError
from ltm_retrofit.finding.example import logits_of, run
from ltm_retrofit.finding.recording import record
from ltm_retrofit.merging import ib
from ltm_retrofit.merging.statistics import Memory, of_all_ranks
from ltm_retrofit.tracing import MergeTrace, bound_loss, learn_from, trace
from ltm_retrofit.tuning.processes import Accelerator
from ltm_retrofit.tuning.settings import TrainConfig

#: what the history of a run logs besides the terms
TAKEN = ("loss", "images", "seconds", "waiting", "bounded")
#: samples that an estimate of the information is made of
SAMPLES = 1024


@dataclass(frozen=True)
class Seen:
    """What one step has seen of ``B`` images and ``C`` classes; None is what this run does not have.

    Args:
        logits: of the model, ``(B, C)``, float32.
        targets: soft labels ``(B, C)``; None where the images have none.
        traced: the forward pass, where the model has learnable masks and a bound.
        feature: what the model's classifier read, ``(B, D)``; the teacher's is beside it.
        taught: the teacher's logits ``(B, C)``.
        taught_feature: what the teacher's classifier read, ``(B, D)``.
    """

    logits: Tensor
    targets: Tensor | None
    traced: MergeTrace | None = None
    feature: Tensor | None = None
    taught: Tensor | None = None
    taught_feature: Tensor | None = None

    @property
    def word(self) -> Tensor:
        """The labels; where the images have none, the teacher's word for them."""
        if self.targets is not None:
            return self.targets
        assert self.taught is not None, "images without labels are refused where there is no teacher"
        return self.taught.softmax(dim=-1)


@dataclass(frozen=True)
class Term:
    """One summand of the loss.

    Args:
        name: that it is logged under, without its weight.
        value: from what a step has seen to a scalar.
        weight: in the loss.
        after: share of the steps before it joins the loss; it is computed and logged from the first one.
    """

    name: str
    value: Callable[[Seen], Tensor]
    weight: float = 1.0
    after: float = 0.0


def terms_of(config: TrainConfig) -> list[Term]:
    """Return the terms that the settings ask for."""
    terms = [
        Term("task", partial(task, kind=config.loss, smoothing=config.label_smoothing)),
        Term("bound", partial(bound, kind=config.bound, gamma=config.gamma), config.bound_weight, config.bound_warmup),
    ]
    if config.distill or config.distill_token:
        value = partial(distillation, weight=config.distill or 0.0, feature_weight=config.distill_token or 0.0)
        terms.append(Term("distill", partial(value, temperature=config.distill_temperature)))
    return terms


def task(seen: Seen, *, kind: str, smoothing: float) -> Tensor:
    """Return the cross-entropy to the labels, or a binary one for each class; zero without labels."""
    if seen.targets is None:
        return seen.logits.new_zeros(())
    if kind == "bce":
        wanted = seen.targets.to(seen.logits.dtype) * (1 - smoothing) + smoothing / seen.targets.shape[1]
        return F.binary_cross_entropy_with_logits(seen.logits, wanted)
    return F.cross_entropy(seen.logits, seen.targets, label_smoothing=smoothing)


def bound(seen: Seen, *, kind: str, gamma: float) -> Tensor:
    """Return the bound on the information bottleneck (docs/method.md, "Against collapse"); zero without a mask."""
    if seen.traced is None:
        return seen.logits.new_zeros(())
    # the statistics learn after the backward pass: gradient checkpointing would recompute with changed ones
    return bound_loss(seen.traced, seen.word, kind=kind, gamma=gamma, learn=False)


def distillation(seen: Seen, *, weight: float, feature_weight: float, temperature: float) -> Tensor:
    """Return the distance to the teacher: T²·KL(teacher ‖ student) at temperature T (Hinton et al. 2015), and 1 − cos.

    The second is between what the two classifiers read. Both are means over the images, with their weights.
    """
    assert seen.taught is not None
    ours, theirs = (F.log_softmax(logits / temperature, dim=-1) for logits in (seen.logits, seen.taught))
    distance = weight * (F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2)
    if seen.feature is not None and seen.taught_feature is not None:
        near = F.cosine_similarity(seen.feature, seen.taught_feature, dim=-1)
        distance = distance + feature_weight * (1 - near).mean()
    return distance


class Objective:
    """Shows a batch to the model and its teacher, and sums the terms of the loss; images may be mixed.

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
        self.model, self.config, self.classes, self.accelerator = model, config, classes, accelerator
        self.terms = terms_of(config)
        names = [*TAKEN, *(term.name for term in self.terms)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"terms of the loss need names of their own, and {', '.join(twice)} is taken twice")
        wanted = config.bound != "none" and is_retrofitted(model)
        #: of the feature; None where there is no bound
        self.statistics = get_retrofit(model).readout if wanted else None
        self.teacher = teacher_of(model) if config.distill or config.distill_token else None
        if self.teacher is not None and accelerator is not None:
            self.teacher.to(accelerator.device)
        self.readouts: tuple[str, ...] = ()
        self.pending: tuple[MergeTrace, Tensor] | None = None
        self.information = Information(model, wanted=self.statistics is not None)
        kinds = {v2.MixUp: config.mixup, v2.CutMix: config.cutmix}
        mixes = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds.items() if alpha > 0]
        self.mixes = v2.RandomChoice(mixes) if mixes else None

    def __call__(
        self, wrapped: nn.Module, inputs: Any, labels: Tensor | None, step: int = 0, total: int = 0
    ) -> dict[str, Tensor]:
        """Return ``loss``, and the terms that it is the sum of, by name and without their weights.

        Args:
            wrapped: the model as Accelerate wraps it.
            inputs: of a batch.
            labels: class indices, soft labels, or None where there are none and a teacher says what is there.
            step: of the run.
            total: of its steps; a term joins the loss after its share of them.

        Raises:
            DataError: where there are neither labels nor a teacher, or nothing to mix.
            TrainingError: where the model puts out no logits.
        """
        inputs, targets = self.mix(inputs, labels)
        if targets is None and not self.config.distill:
            raise DataError(
                "these images have no labels: set distill, so that the unconverted model says what they are"
            )
        taught, taught_feature = (None, None) if self.teacher is None else self.teach(inputs)
        with nullcontext() if self.statistics is None else trace(self.model) as traced:
            with reading(self.model, self.readouts) as read:
                logits = logits_of(run(wrapped, inputs))
        if logits is None:
            raise TrainingError(f"{type(self.model).__name__} puts out no class logits (B, C): give it a classifier")
        seen = Seen(logits.float(), targets, traced, beside(read), taught, taught_feature)
        losses = {term.name: term.value(seen) for term in self.terms}
        if traced is not None:
            self.pending = traced, seen.word
            if self.model.training:
                self.information.add(*self.pending)
        joined = [term for term in self.terms if step >= term.after * total]
        loss = sum((term.weight * losses[term.name] for term in joined), seen.logits.new_zeros(()))
        return {"loss": loss, **losses}

    def mix(self, inputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
        """Return images, mixed with others of the batch where the settings want it, and soft labels ``(B, C)``."""
        targets = None if labels is None else ib.soft_targets(labels, self.classes)
        if self.mixes is None:
            return inputs, targets
        images, name = inputs, None
        if isinstance(inputs, Mapping):
            name = next((key for key, value in inputs.items() if is_images(value)), None)
            images = inputs.get(name)
        if not is_images(images):
            raise DataError("mixup and cutmix mix images (B, C, H, W), and this batch holds none: set both to 0")
        # torchvision mixes no images without labels
        given = torch.zeros(len(images), dtype=torch.long, device=images.device) if targets is None else targets
        images, mixed = self.mixes(images, given)
        return images if name is None else {**inputs, name: images}, None if targets is None else mixed

    @torch.no_grad()
    def teach(self, inputs: Any) -> tuple[Tensor, Tensor | None]:
        """Ask the teacher: its logits, and the feature that its classifier reads where that is compared."""
        assert self.teacher is not None
        if self.config.distill_token and not self.readouts:
            self.readouts = record(self.teacher, inputs).readouts(self.classes)
            if not self.readouts:
                raise TrainingError(
                    f"distill_token: {type(self.model).__name__} has no linear classifier, so no feature to compare"
                )
        precision = nullcontext() if self.accelerator is None else self.accelerator.autocast()
        with precision, reading(self.teacher, self.readouts) as read:
            taught = logits_of(run(self.teacher, inputs))
        assert taught is not None
        return taught.float(), beside(read)

    def learn(self) -> None:
        """Let the statistics learn from the latest batch: after its backward pass, which may run parts anew."""
        if self.pending is not None:
            learn_from(*self.pending)
            self.pending = None

    def ready(self) -> bool:
        """Say whether there is a bound: whether the statistics of the feature have been fitted."""
        return self.statistics is not None and bool(self.statistics.fitted)


def is_images(value: Any) -> bool:
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
    with called(model, names, lambda name, args: read.append(args[0])):
        yield read


@contextmanager
def called(model: nn.Module, names: Sequence[str], tell: Callable[[str, list[Any]], None]) -> Iterator[None]:
    """Tell of each call of these modules, while inside: the module's name, and all arguments."""

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tell(name, [*args, *kwargs.values()])

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(partial(hook, name), with_kwargs=True))
        yield


def beside(read: list[Tensor]) -> Tensor | None:
    """Put what several modules read side by side, ``(B, D)`` in float32; None where nothing was read."""
    return torch.cat(read, dim=-1).float() if read else None


class Information:
    """Estimates the information bottleneck I(X̃;X) − I(X̃;Y) of the latest images (docs/method.md, "Statistics").

    X̃ is the cluster of the feature that the classifier reads, Y the class, and X the cluster of the image's input: the
    mean of its patch embeddings, as the first block of the first merging site's list reads them. Where that block folds
    images into the batch (windows), the nearest module around it says what was read. Plug-in estimates are too high,
    I(a;b) by about (A − 1)(B − 1) / 2n nats: compare them within a run, or with equal numbers of clusters and samples.
    """

    def __init__(self, model: nn.Module, *, wanted: bool = True) -> None:
        self.model = model
        self.entrances: list[str] = []
        self.dim: Any = 0
        if wanted:
            site, mask = next(iter(masks_of(model).items()))
            self.entrances = entrances_of(model, site)
            self.dim = mask.dim if hasattr(mask, "dim") else mask.statistics.centroids.shape[1]
        self.memory = Memory(SAMPLES)  # of inputs, features and soft labels
        self.latest: dict[str, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember the input of each forward pass, while inside."""

        def keep(name: str, args: list[Any]) -> None:
            tokens = next((value for value in args if isinstance(value, Tensor)), None)
            if tokens is not None and tokens.ndim > 2 and name in self.entrances:
                self.latest[name] = self._mean(tokens.detach())

        with called(self.model, self.entrances, keep):
            yield

    def _mean(self, tokens: Tensor) -> Tensor:
        """Average over all but the batch and the width, which is the last dimension or, of a map, the second."""
        shape = tokens.shape
        if tokens.ndim != 4:
            width = tokens.ndim - 1
        elif self.dim in (shape[1], shape[3]):
            width = 3 if shape[3] == self.dim else 1
        else:
            width = 1 if shape[2] == shape[3] else 3
        return tokens.movedim(width, -1).flatten(1, -2).float().mean(dim=1)

    @torch.no_grad()
    def add(self, traced: MergeTrace, targets: Tensor) -> None:
        """Remember a batch: the input of its forward pass, its feature, its soft labels ``(B, C)``."""
        fitting = [name for name in self.entrances if len(self.latest.get(name, ())) == len(targets)]
        if fitting:
            self.entrances = fitting[:1]  # the same from now on, and no other needs to be averaged
            self.memory.add(self.latest[fitting[0]], traced.feature.float(), targets.float())
        self.latest.clear()

    @torch.no_grad()
    def estimate(self) -> dict[str, float]:
        """Return ``ib``, ``i_input`` I(X̃;X), ``i_label`` I(X̃;Y) in nats, ``perplexity`` and ``beta``; {} before a fit.

        In distributed training all processes call it.
        """
        statistics = get_retrofit(self.model).readout if self.memory else None
        if statistics is None or not bool(statistics.fitted):
            return {}
        clusters, width = statistics.centroids.shape
        inputs, features, targets = self.memory.latest()
        both, targets = of_all_ranks(torch.cat([inputs, features], dim=1), targets)
        inputs, features = both[:, :-width], both[:, -width:]
        # inputs have no statistics of their own: clustered anew, always from the same seed, at the same perplexity
        centroids = ib.kmeans(inputs, clusters, generator=torch.Generator().manual_seed(0))
        beta = ib.beta_for_perplexity(inputs, centroids, statistics.target_perplexity)
        phi_x = ib.log_assign(inputs, centroids, beta).exp()
        phi = ib.log_assign(features, statistics.centroids, statistics.beta).exp()
        i_input, i_label = (value.item() for value in ib.informations(phi, phi_x, targets))
        return {
            "ib": i_input - i_label,
            "i_input": i_input,
            "i_label": i_label,
            "perplexity": statistics.perplexity(features).item(),
            "beta": statistics.beta.item(),
        }


def entrances_of(model: nn.Module, site: str) -> list[str]:
    """Name the first block of the list that a site's block is in, or the block itself, and the modules around it."""
    parent, _, last = site.rpartition(".")
    if last.isdigit() and parent:
        first = next(iter(dict(model.get_submodule(parent).named_children())))
        site = f"{parent}.{first}"
    parts = site.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
