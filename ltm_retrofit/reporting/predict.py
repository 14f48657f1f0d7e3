"""predict(): what a model answers to a few images, before merging and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.record import converted_part, in_mode
from ltm_retrofit.errors import RecipeError, TrainingError
from ltm_retrofit.finding.example import logits_of, run
from ltm_retrofit.tuning.classes import count_classes, labels_of
from ltm_retrofit.tuning.images import Images, Prepared, gathered, prepare
from ltm_retrofit.undisturbed import undisturbed

#: images that are looked at together
AT_ONCE = 16


@dataclass(frozen=True)
class Chance:
    """The probability of a class, 0 to 1, before merging and after."""

    label: str
    before: float
    after: float


@dataclass(frozen=True)
class Prediction:
    """What a model answers to one image.

    Args:
        image: the name of its file, or which of several it is.
        before: the most probable class where nothing merges.
        after: that of the converted model.
        classes: the most probable ones, by the larger of the two probabilities.

    Example:
        >>> from ltm_retrofit.reporting.predict import Chance, Prediction
        >>> cat, dog = Chance("cat", before=0.7, after=0.4), Chance("dog", before=0.3, after=0.6)
        >>> print(Prediction("pet.jpg", cat, dog, (cat, dog)))
        pet.jpg                          before    after
          cat                            70.0 %   40.0 %
          dog                            30.0 %   60.0 %
          another answer: dog instead of cat
    """

    image: str
    before: Chance
    after: Chance
    classes: tuple[Chance, ...]

    def in_short(self) -> str:
        """Return both answers in two lines."""
        before, after = self.before, self.after
        return (
            f"answer before merging: {before.label}, {percent(before.before)}\n"
            f"after merging: {after.label}, {percent(after.after)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "before": self.before.label, "after": self.after.label}

    def __str__(self) -> str:
        """Return a table of the classes, and say where the answer is another one after merging."""
        width = max(len(self.image), 30, *(len(one.label) + 2 for one in self.classes))
        lines = [f"{self.image:{width}}   before    after"]
        lines += [
            f"{'  ' + one.label:{width}} {percent(one.before):>8} {percent(one.after):>8}" for one in self.classes
        ]
        if self.before.label != self.after.label:
            lines.append(f"  another answer: {self.after.label} instead of {self.before.label}")
        return "\n".join(lines)


def percent(probability: float) -> str:
    """Write a probability as people do.

    Example:
        >>> from ltm_retrofit.reporting.predict import percent
        >>> percent(0.98765)
        '98.8 %'
    """
    return f"{100 * probability:.1f} %"


def predict(model: nn.Module, images: Images, *, top: int = 5) -> list[Prediction]:
    """Return what a converted model answers to images, and what it answered before.

    *Before* is the original path, as within `disabled`: of a model that was tuned, with the weights that it has now.

    Args:
        model: a converted classifier. It is run in eval mode, and left as it was.
        images: a path of an image or of a folder with images, at any depth; a PIL image; several of these; or a tensor
            ``(C, H, W)`` or ``(B, C, H, W)`` that is normalised already.
        top: how many classes each prediction has, at most.

    Raises:
        NotRetrofitted: where the model is not converted.
        TrainingError: where it puts out no logits.
        DataError: where a file is no image, or there is none.
        ExampleError: where an image is of another kind or size.
        RecipeError: where ``top`` is below one.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> (found,) = ltm.predict(ltm.retrofit(model), torch.randn(3, 32, 32), top=3)
        >>> found.image, len(found.classes), round(found.after.after, 2) >= round(found.classes[-1].after, 2)
        ('image 0', 3, True)
    """
    if top < 1:
        raise RecipeError(f"top={top} would show no class: give a number from 1 on")
    model = converted_part(model)
    count_classes(model)  # refuses what has none
    found, predictions = gathered(images), list[Prediction]()
    for start in range(0, len(found), AT_ONCE):
        given = predictions_of(model, prepare(model, found[start : start + AT_ONCE], first=start), top)
        if not given:
            raise TrainingError(f"{type(model).__name__} puts out no class logits (B, C): give it a classifier first")
        predictions += given
    return predictions


def predictions_of(model: nn.Module, prepared: Prepared, top: int = 5) -> list[Prediction]:
    """Return what a converted model answers to images that are prepared, see `predict`; nothing without logits."""
    inputs = {prepared.argument: prepared.pixels} if prepared.argument else prepared.pixels
    given = []
    with undisturbed(model), torch.no_grad():
        for mode in ("original", "merge"):  # whatever mode it is in, as within `disabled`
            with in_mode(model, mode):
                logits = logits_of(run(model, inputs))
            if logits is None:
                return []
            given.append(_probabilities(model, logits))
    before, after = given
    labels = labels_of(model, before.shape[1])
    return [
        _prediction(name, labels, first.tolist(), other.tolist(), top)
        for name, first, other in zip(prepared.names, before, after, strict=True)
    ]


def _probabilities(model: nn.Module, logits: Tensor) -> Tensor:
    """Return probabilities ``(B, C)``: each class by itself where transformers' config says that several may hold."""
    several = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    return logits.double().sigmoid() if several else logits.double().softmax(dim=-1)


def _prediction(
    name: str, labels: Sequence[str], before: Sequence[float], after: Sequence[float], top: int
) -> Prediction:
    chances = list(map(Chance, labels, before, after))
    ordered = sorted(chances, key=lambda one: -max(one.before, one.after))
    return Prediction(
        name,
        max(chances, key=lambda one: one.before),
        max(chances, key=lambda one: one.after),
        tuple(ordered[:top]),
    )
