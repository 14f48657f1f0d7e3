"""Which images do the versions of a model recognise: original, converted, tuned; and whose answer changed?"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor, nn

from ltm_retrofit.calibrate import difference
from ltm_retrofit.convert import retrofit
from ltm_retrofit.converted.record import disabled, get_plan, is_retrofitted, was_finetuned
from ltm_retrofit.errors import RecipeError
from ltm_retrofit.tuning.classes import Version, answers, check_data, count_classes, itself, names_in
from ltm_retrofit.tuning.data import Data, is_table, name_of, undecoded

ORIGINAL, CONVERTED = "original", "converted"
#: the versions of a model, and what they are called
ACCURACIES = {
    "original": "original",
    "original_finetuned": "original, same fine-tune",
    "converted": "converted",
    "finetuned": "converted, fine-tuned",
    "sliced_finetuned": "sliced to the same counts, same fine-tune",
}


@dataclass(frozen=True)
class Answers:
    """What the versions of a model answered to the same images.

    Args:
        split: what the images are called.
        images: how many there are.
        right: of each version, how many it recognised.
        kl: of each version but the original, the mean Kullback–Leibler divergence of its answers from the original's,
            in nats.
        classes: of each class its ``images``, and how many of them each version recognised.
        changed: of each image that not all versions gave the same answer, ``image`` (its file, where that is known),
            ``class``, and the answer of each version.
    """

    split: str
    images: int
    right: dict[str, int]
    kl: dict[str, float] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    changed: list[dict[str, str]] = field(default_factory=list)

    def turned(self, version: str) -> tuple[int, int, int]:
        """Count a version's answers that were right for the original and are wrong, the other way round, and others."""
        pairs = [
            (one[ORIGINAL] == one["class"], one[version] == one["class"])
            for one in self.changed
            if one[ORIGINAL] != one[version]
        ]
        lost, gained = pairs.count((True, False)), pairs.count((False, True))
        return lost, gained, len(pairs) - lost - gained

    def change(self, version: str) -> tuple[float, float]:
        """Return the points of top-1 that a version has beyond the original, and the standard error (paired)."""
        lost, gained, _ = self.turned(version)
        error = math.sqrt(lost + gained - (gained - lost) ** 2 / self.images) / self.images
        return 100 * (gained - lost) / self.images, 100 * error

    def sentences(self) -> list[str]:
        """Say how many answers changed, version by version."""
        said = []
        for version in self.kl:
            lost, gained, others = self.turned(version)
            points, error = self.change(version)
            said.append(
                f"{ACCURACIES[version]} against original: {lost + gained + others} of {self.images} answers differ; "
                f"{lost} were right and are wrong, {gained} were wrong and are right. "
                f"Top-1 {points:+.2f} ± {error:.2f} points"
            )
        return said


def wilson(right: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share, in percent (Wilson 1927).

    Example:
        >>> from ltm_retrofit.reporting.answers import wilson
        >>> [round(end, 1) for end in wilson(68, 80)]
        [75.6, 91.2]
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = right / count
    centre = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = (100 * (centre + sign * reach) / (1 + z * z / count) for sign in (-1, 1))
    return low if right else 0.0, high if right < count else 100.0  # what rounding makes of the ends


def entry_of(model: nn.Module) -> str:
    """Say which version a model is."""
    if is_retrofitted(model):
        if get_plan(model).config.method == "slice" and was_finetuned(model):
            return "sliced_finetuned"
        return "finetuned" if was_finetuned(model) else CONVERTED
    return "original_finetuned" if was_finetuned(model) else ORIGINAL


def versions_of(model: nn.Module, original: nn.Module | None) -> dict[str, Version]:
    """Return the versions of a model that are at hand, the original first.

    Args:
        model: converted or not, tuned or not.
        original: of a tuned model, what it was before: the original, or converted and not tuned. It is not changed.

    Raises:
        RecipeError: where there is nothing that ``original`` could say.
        BaseMismatch: where it is of another architecture.
    """
    own = entry_of(model)
    alone = {own: itself(model)}
    # a fine-tune that did no good leaves the converted model as it was, and whoever measures may not know
    if original is None or (own == CONVERTED and _same_weights(model, original)):
        return {ORIGINAL: partial(disabled, model), **alone} if own == CONVERTED else alone
    if not was_finetuned(model):
        raise RecipeError(
            "original is what a tuned model was before. This one was not tuned, and the original has other weights: "
            "leave it out"
        )
    if was_finetuned(original):
        raise RecipeError("original was tuned itself: give the checkpoint as it was before")
    if not is_retrofitted(model):
        return {ORIGINAL: itself(original), **alone}
    if not is_retrofitted(original):
        original = retrofit(copy.deepcopy(original), plan=get_plan(model))
    return {ORIGINAL: partial(disabled, original), CONVERTED: itself(original), **alone}


def _same_weights(model: nn.Module, original: nn.Module) -> bool:
    ours, theirs = model.state_dict(), original.state_dict()
    return all(key in ours and torch.equal(ours[key], value.to(ours[key].device)) for key, value in theirs.items())


def compare(model: nn.Module, versions: Mapping[str, Version], data: Data, split: str, batch_size: int) -> Answers:
    """Ask all versions of a model of the same images, in one pass through the data.

    Raises:
        DataError, TrainingError: as from `evaluate`.
    """
    logits: Tensor
    guesses: dict[str, list[int]] = {version: [] for version in versions}
    sums = {version: 0.0 for version in versions if ORIGINAL in versions and version != ORIGINAL}
    truths: list[int] = []
    classes = 0
    for given, labels in answers(model, list(versions.values()), data, batch_size):
        by_version = dict(zip(versions, given, strict=True))
        truths += labels.tolist()
        for version, logits in by_version.items():
            guesses[version] += logits.argmax(dim=-1).tolist()
            classes = logits.shape[1]
        for version in sums:
            sums[version] += float(difference([by_version[ORIGINAL]], [by_version[version]]).by.sum())
    names = _names(model, data, classes)
    table = {
        names[index]: {"images": truths.count(index)}
        | {v: sum(a == b == index for a, b in zip(g, truths, strict=True)) for v, g in guesses.items()}
        for index in sorted(set(truths))
    }
    first, *others = guesses.values()
    differing = [place for place in range(len(truths)) if any(one[place] != first[place] for one in others)]
    stored = undecoded(data.with_format(None))[0] if is_table(data) and differing else None
    return Answers(
        split=split or str(getattr(data, "split", None) or "the images given"),
        images=len(truths),
        right={v: sum(a == b for a, b in zip(g, truths, strict=True)) for v, g in guesses.items()},
        kl={version: total / len(truths) for version, total in sums.items()},
        classes=table,
        changed=[
            {
                "image": f"image {place}" if stored is None else name_of(stored[place], place),
                "class": names[truths[place]],
                **{version: names[guess[place]] for version, guess in guesses.items()},
            }
            for place in differing
        ],
    )


def _names(model: nn.Module, data: Data, classes: int) -> list[str]:
    """Return what the model's classes are called: by the data, else by the model's config, else by number."""
    said = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(said.get(index, index)) for index in range(classes)]
    given = names_in(data) if is_table(data) else None
    if given:
        class_of = check_data(model, data, "evaluation", count_classes(model)) or range(len(given))
        for index, name in zip(class_of, given, strict=False):
            names[index] = name
    return names if len(set(names)) == len(names) else [f"{index} {name}" for index, name in enumerate(names)]
