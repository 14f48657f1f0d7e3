"""Original, converted and tuned side by side: who is right, by class, which images changed, and how sure that is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import mark_finetuned
from ltm_retrofit.errors import BaseMismatch, RecipeError
from ltm_retrofit.reporting.answers import Answers, compare, versions_of, wilson
from ltm_retrofit.tuning.sources import DataSection, load_split


def tuned(model: nn.Module) -> nn.Module:
    """Return a copy with another classifier, marked as tuned."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight.neg_()
    mark_finetuned(model)
    return model


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 1), (713, 2880)])
def test_an_interval_holds_its_share(right: int, count: int) -> None:
    low, high = wilson(right, count)
    assert 0 <= low <= 100 * right / count <= high <= 100 and low < high
    assert wilson(right, count, 0.5)[1] - wilson(right, count, 0.5)[0] < high - low


def test_a_tuned_model_stands_beside_what_it_was(build: Callable, converted: Callable, pictures: Callable) -> None:
    before, data = converted("timm-vit"), pictures(21)
    after = tuned(before)
    found = compare(after, versions_of(after, build("timm-vit")), data, "some", batch_size=6)
    assert list(found.right) == ["original", "converted", "finetuned"]
    models = (build("timm-vit"), before, after)
    for model, right in zip(models, found.right.values(), strict=True):
        assert 100 * right / 21 == ltm.evaluate(model, data)
    assert found.split == "some" and found.images == 21
    assert {name: counts["images"] for name, counts in found.classes.items()} == {f"colour{i}": 3 for i in range(7)}
    for version, right in found.right.items():
        assert sum(counts[version] for counts in found.classes.values()) == right
    assert found.kl["finetuned"] > found.kl["converted"] > 0
    assert all(one["original"] != one["converted"] or one["original"] != one["finetuned"] for one in found.changed)
    lost, gained, _ = found.turned("finetuned")
    assert found.right["finetuned"] - found.right["original"] == gained - lost


def test_images_are_named_by_their_files_and_classes_by_the_data(converted: Callable, tmp_path: Path) -> None:
    for index in range(7):
        (tmp_path / "test" / f"kind {index}").mkdir(parents=True)
        Image.new("RGB", (32, 32), (30 * index, 200, 10)).save(tmp_path / "test" / f"kind {index}" / "a.png")
    data = load_split(DataSection(str(tmp_path)), "test")
    before = converted("timm-vit")
    after = tuned(before)
    found = compare(after, versions_of(after, before), data, "", batch_size=4)
    assert found.split == "test", "as the data set says"
    assert found.changed
    for one in found.changed:
        assert one["image"] == str(tmp_path / "test" / one["class"] / "a.png") and Path(one["image"]).is_file()
    loader = [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))]
    (one, other) = compare(after, versions_of(after, before), loader, "", batch_size=4).changed
    assert (one["image"], other["image"]) == ("image 0", "image 1") and (one["class"], other["class"]) == ("0", "1")


def test_changes_are_counted_as_pairs() -> None:
    kinds = [("a", "a", "b")] * 3 + [("a", "b", "a")] + [("a", "b", "c")] * 2
    changed = [{"image": str(i), "class": c, "original": o, "converted": v} for i, (c, o, v) in enumerate(kinds)]
    found = Answers("test", 100, {"original": 80, "converted": 78}, {"converted": 0.1}, {}, changed)
    assert found.turned("converted") == (3, 1, 2)
    points, error = found.change("converted")
    # the standard error of the mean of -1 (3 times), +1 (once) and 0 (96 times)
    steps = torch.tensor([-1.0] * 3 + [1.0] + [0.0] * 96, dtype=torch.float64)
    assert points == -2.0 and math.isclose(error, 100 * float(steps.std(correction=0)) / 10)
    assert "6 of 100 answers differ; 3 were right and are wrong, 1 were wrong and are right" in found.sentences()[0]


def test_a_tuning_that_was_not_kept_is_measured_in_the_same_words(build: Callable, converted: Callable) -> None:
    """Where no state was better, the model is the converted one, and a script that names the original was refused."""
    model = converted("timm-vit")
    for original in (build("timm-vit"), converted("timm-vit")):
        assert list(versions_of(model, original)) == ["original", "converted"]


def test_what_cannot_be_compared_is_refused(build: Callable, converted: Callable) -> None:
    model = converted("timm-vit")
    with pytest.raises(RecipeError, match="This one was not tuned, and the original has other weights"):
        versions_of(model, build("timm-vit", seed=1))
    with pytest.raises(RecipeError, match="was tuned itself"):
        versions_of(tuned(model), tuned(model))
    with pytest.raises(BaseMismatch):
        versions_of(tuned(model), build("timm-deit"))
