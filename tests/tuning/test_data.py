"""Labels checked before anything is trained, batches in every usual form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import ltm_retrofit as ltm
from ltm_retrofit.errors import DataError
from ltm_retrofit.tuning.classes import check_labels, classes_in
from ltm_retrofit.tuning.data import batches_on, has_labels, size_of, split_batch

# ------------------------------------------------------------------------------------------------------------ labels


def table(labels: list[int], **columns: object) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": [0] * len(labels), "label": labels, **columns})


def test_right_labels_pass_and_are_not_needed_to_be_class_labels() -> None:
    assert check_labels(table([2, 0, 1, 1]), 3, "training") is None


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    data = table([0, 1]).rename_column("label", "digit")
    with pytest.raises(DataError, match="the test split has columns image, digit; expected image and label"):
        check_labels(data, 2, "test")


@pytest.mark.parametrize("name", ["labels", "target", "kind"])
def test_labels_of_another_name_are_not_passed_over(name: str, converted, pictures) -> None:
    """They were, with a teacher: the model then learned from it alone. A column of classes is one by any name."""
    data = pictures(14).rename_column("label", name)
    with pytest.raises(DataError, match=rf"no column 'label', but '{name}': data\.rename_column\('{name}', 'label'\)"):
        ltm.finetune(converted("timm-vit"), data, config=ltm.TrainConfig(epochs=1, distill=1.0))
    assert not has_labels(data.remove_columns(name)) and has_labels(pictures(14))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda data: "photos", r"is the path 'photos': load it, datasets\.load_dataset\('imagefolder'"),
        (lambda data: Path("photos"), "is the path 'photos'"),
        (lambda data: datasets.DatasetDict(train=data, test=data), "is a dict of 'train', 'test': pass one of them"),
        (lambda data: ltm.TrainConfig(), r"is a TrainConfig: pass it by name, config=TrainConfig"),
    ],
    ids=["text", "path", "splits", "config"],
)
def test_what_is_no_data_is_named_with_the_way(given: Callable[[Any], Any], message: str, converted, pictures) -> None:
    model = converted("timm-vit")
    with pytest.raises(DataError, match="train " + message):
        ltm.finetune(model, given(pictures(7)))
    with pytest.raises(DataError, match="val " + message):
        ltm.finetune(model, pictures(7), given(pictures(7)))
    with pytest.raises(DataError, match="data " + message):
        ltm.evaluate(model, given(pictures(7)))


def test_images_that_are_not_prepared_are_refused() -> None:
    """transformers' hosts would cast them."""
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2).long()
    for one in ((images, labels), {"pixel_values": images, "labels": labels}):
        with pytest.raises(DataError, match="images of uint8, 0 to 255: prepare them"):
            split_batch(one)


@pytest.mark.parametrize(("labels", "named"), [([0, 1, 2, 7], "7"), ([0, 1, -1, 2], "-1")])
def test_labels_outside_the_classes_are_named(labels, named: str) -> None:
    with pytest.raises(DataError, match=rf"training split has labels \[{named}\] outside the model's 3 classes"):
        check_labels(table(labels), 3, "training")


@pytest.mark.parametrize(
    ("labels", "named"), [([0, 1, None, 9], "None"), (["cat", "dog"], "'cat', 'dog'"), ([0.0, 1.5], "0.0, 1.5")]
)
def test_labels_that_are_no_whole_numbers_are_refused(labels, named: str) -> None:
    data = datasets.Dataset.from_dict({"image": [0] * len(labels), "label": labels})
    with pytest.raises(DataError, match=rf"training split has labels that are no whole numbers: \[{named}\]: .*encode"):
        check_labels(data, 2, "training")


@pytest.mark.parametrize("kind", ["numpy", "torch", None])
def test_labels_of_any_format_are_whole_numbers(kind: str | None) -> None:
    data = table([0, 2, 1]).with_format(kind)
    assert check_labels(data, 3, "training") is None
    assert classes_in(data, "training") == 3


def test_classes_are_named_where_they_have_names(pictures) -> None:
    assert classes_in(pictures(7, classes=2), "training") == ["colour0", "colour1"]
    assert classes_in(table([1, 0, 2, 1]), "training") == 3


def test_a_class_without_images_is_named(pictures) -> None:
    data = pictures(7).filter(lambda row: row["label"] != 3)
    with pytest.raises(DataError, match=r"no image of the validation split has class colour3 \(1 of the model's 7"):
        check_labels(data, 7, "validation")
    with pytest.raises(DataError, match=r"has class 2, 3, 4, 5, 6 … \(6 of the model's 8 classes\)"):
        check_labels(table([0, 1]), 8, "validation")


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="the training split is empty"):
        check_labels(table([]), 3, "training")


# ----------------------------------------------------------------------------------------------------------- batches


def test_split_batch_takes_pairs_and_mappings() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    for pair in ((x, y), [x, y]):
        assert split_batch(pair)[0] is x and split_batch(pair)[1] is y
    for name in ("labels", "label"):
        inputs, labels = split_batch({"pixel_values": x, name: y, "flag": True})
        assert labels is y and set(inputs) == {"pixel_values", "flag"} and inputs["pixel_values"] is x


@pytest.mark.parametrize("batch", [torch.zeros(2, 3), (1, 2, 3), {"pixel_values": 1}, None, 5])
def test_split_batch_refuses_the_rest(batch) -> None:
    expected = r"\['pixel_values'\]" if isinstance(batch, dict) else type(batch).__name__
    with pytest.raises(DataError, match=rf"a batch is \(images, labels\) or a dict with 'labels', got {expected}"):
        split_batch(batch)


def test_batches_on_moves_everything() -> None:
    device = torch.device("meta")
    (inputs, labels), (pixels, _) = batches_on(
        [
            {"pixel_values": torch.zeros(1), "text": "as it is", "labels": torch.zeros(1)},
            (torch.zeros(2), torch.ones(1)),
        ],
        device,
    )
    assert inputs["pixel_values"].device == labels.device == pixels.device == device
    assert inputs["text"] == "as it is"


def test_labels_may_be_a_list() -> None:
    inputs, labels = split_batch((torch.zeros(2, 3), [4, 5]))
    assert inputs.shape == (2, 3) and torch.equal(labels, torch.tensor([4, 5]))


@pytest.mark.parametrize(
    ("labels", "message"), [(["cat", "dog"], r"of a batch are no numbers: \['cat'"), (None, "has None for labels")]
)
def test_labels_that_are_none_or_text_are_named(labels, message: str) -> None:
    for batch in ((torch.zeros(2, 3), labels), {"pixel_values": torch.zeros(2, 3), "labels": labels}):
        with pytest.raises(DataError, match=message):
            split_batch(batch)


def test_a_batch_is_as_large_as_its_first_tensor_with_rows() -> None:
    assert size_of({"names": ["a"], "scale": torch.tensor(2.0), "pixel_values": torch.zeros(5, 3)}) == 5


@pytest.mark.parametrize("labels", [[-1, -1], [0, 2, 5], [1, 2, 3], []], ids=str)
def test_numbers_that_leave_classes_out_name_none(labels: list[int]) -> None:
    with pytest.raises(DataError, match="number the classes from 0 on without gaps"):
        classes_in(table(labels), "training")


def test_labels_are_read_without_a_transform_of_the_images() -> None:
    data = table([0, 1])
    data.set_transform(lambda rows: pytest.fail("transformed"))
    assert check_labels(data, 2, "training") is None
