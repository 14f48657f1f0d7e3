"""Preprocessing as the model has it, labels checked before anything is trained, batches in every usual form."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import timm
import torch
import transformers as tr
from PIL import Image
from torch import nn

from ltm_retrofit.errors import DataError
from ltm_retrofit.tuning.data import (
    Preprocessing,
    batches_on,
    check_labels,
    make_transform,
    preprocessing_of,
    split_batch,
)

# ---------------------------------------------------------------------------------------------------- preprocessing


def test_timm_says_its_normalisation_and_the_live_model_its_size() -> None:
    arguments = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = timm.create_model("vit_base_patch16_clip_224", **arguments)
    declared = model.pretrained_cfg
    assert tuple(declared["input_size"]) == (3, 224, 224), "otherwise this test says nothing"
    wanted = preprocessing_of(model)
    assert wanted.size == (32, 48)
    assert wanted.mean == tuple(declared["mean"]) and wanted.std == tuple(declared["std"])
    assert (wanted.interpolation, wanted.crop_pct) == (declared["interpolation"], declared["crop_pct"])


def hf_model(**changes: object) -> nn.Module:
    options = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24}
    return tr.ViTForImageClassification(tr.ViTConfig(image_size=32, patch_size=8, **options, **changes))


def test_hf_without_an_image_processor_gets_one_half() -> None:
    wanted = preprocessing_of(hf_model())
    assert wanted.size == (32, 32)
    assert wanted.mean == wanted.std == (0.5, 0.5, 0.5)
    assert preprocessing_of(hf_model(num_channels=1)).mean == (0.5,)


def test_hf_image_processor_is_read_from_the_models_folder(tmp_path) -> None:
    hf_model().save_pretrained(tmp_path)
    processor = tr.ViTImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size={"height": 224, "width": 224}
    )
    processor.save_pretrained(tmp_path)
    wanted = preprocessing_of(tr.ViTForImageClassification.from_pretrained(tmp_path))
    assert wanted.mean == (0.1, 0.2, 0.3) and wanted.std == (0.4, 0.5, 0.6)
    assert wanted.size == (32, 32), "the live model's, not the processor's"


def test_a_model_that_says_nothing_is_asked_for_a_loader() -> None:
    with pytest.raises(DataError, match=r"Linear does not say its input size.*pass a loader"):
        preprocessing_of(nn.Linear(3, 3))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
@pytest.mark.parametrize("size", [(50, 20), (20, 50), (7, 7), (32, 32)])
def test_transform_of_any_image_has_the_wanted_size(mode: str, size: tuple[int, int]) -> None:
    wanted = Preprocessing((32, 24), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_pct=0.9)
    image = Image.new(mode, size, 1)
    for augment in ("none", "crop"):
        pixels = make_transform(wanted, augment)(image)
        assert pixels.shape == (3, 32, 24) and pixels.dtype == torch.float32
        assert torch.isfinite(pixels).all()


def test_transform_normalises() -> None:
    wanted = Preprocessing((16, 16), (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    pixels = make_transform(wanted)(Image.new("RGB", (40, 30), (255, 0, 51)))
    expected = torch.tensor([1.0, -1.0, 0.1]).view(3, 1, 1).expand(3, 16, 16)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_transform_of_one_channel_is_grey() -> None:
    pixels = make_transform(Preprocessing((16, 16), (0.5,), (0.5,)))(Image.new("RGB", (40, 30), (255, 255, 255)))
    torch.testing.assert_close(pixels, torch.ones(1, 16, 16))


def test_transform_keeps_the_middle_share_of_crop_pct() -> None:
    """A white frame of 1/4 on each side is exactly what crop_pct 0.5 cuts off."""
    array = np.full((64, 64, 3), 255, np.uint8)
    array[16:48, 16:48] = 0
    whole, middle = (
        make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, "nearest", share))(Image.fromarray(array))
        for share in (1.0, 0.5)
    )
    assert whole.max() == 1 and middle.max() == 0


def test_crop_shifts_by_up_to_a_sixteenth() -> None:
    array = np.zeros((32, 32, 3), np.uint8)
    array[16, 16] = 255
    transform = make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, "nearest"), "crop")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        places = {tuple(transform(Image.fromarray(array))[0].nonzero()[0].tolist()) for _ in range(200)}
    assert places == {(row, column) for row in range(14, 19) for column in range(14, 19)}


# ------------------------------------------------------------------------------------------------------------ labels


def table(labels: list[int], **columns: object) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": [0] * len(labels), "label": labels, **columns})


def test_right_labels_pass_and_are_not_needed_to_be_class_labels() -> None:
    assert check_labels(table([2, 0, 1, 1]), 3, "training") is None


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    data = table([0, 1]).rename_column("label", "digit")
    with pytest.raises(DataError, match="the test split has columns image, digit; expected image and label"):
        check_labels(data, 2, "test")


@pytest.mark.parametrize(("labels", "named"), [([0, 1, 2, 7], "7"), ([0, 1, -1, 2], "-1"), ([0, 1, 2, None], "None")])
def test_labels_outside_the_classes_are_named(labels, named: str) -> None:
    with pytest.raises(DataError, match=rf"training split has labels \[{named}\] outside the model's 3 classes"):
        check_labels(table(labels), 3, "training")


def test_labels_outside_of_two_kinds_are_named_too() -> None:
    with pytest.raises(DataError, match="outside the model's 3 classes"):
        check_labels(table([0, 1, 2, None, 9]), 3, "training")


def test_text_labels_are_refused() -> None:
    data = datasets.Dataset.from_dict({"image": [0, 0], "label": ["cat", "dog"]})
    with pytest.raises(DataError, match="outside the model's 2 classes"):
        check_labels(data, 2, "training")


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
