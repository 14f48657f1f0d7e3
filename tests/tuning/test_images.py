"""Loaders: the order of images and their augmentation follow from seed, epoch and place; damaged images are counted."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import pytest
import torch
from pieces import encoded
from PIL import Image
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.errors import DataError
from ltm_retrofit.tuning.classes import evaluate
from ltm_retrofit.tuning.data import is_stream, is_table, make_loader, seed_of


def test_a_loader_passes_through_untouched() -> None:
    model = nn.Linear(3, 3)
    for loader in ([(torch.zeros(1, 3), torch.zeros(1))], iter(())):
        assert make_loader(model, loader, ltm.TrainConfig(), shuffle=True) is loader
        assert not is_table(loader)


def test_loader_of_a_table_goes_through_all_images_in_order(pictures, build) -> None:
    data = pictures(11)
    assert is_table(data)
    batches = list(make_loader(build("timm-vit"), data, ltm.TrainConfig(batch_size=4), shuffle=False))
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == data["label"][:]
    assert batches[0][0].shape == (4, 3, 32, 32)


def test_training_loader_shuffles_by_its_seed_and_drops_a_rest(pictures, build) -> None:
    model, data = build("timm-vit"), pictures(30)

    def order(seed: int) -> list[int]:
        loader = make_loader(model, data, ltm.TrainConfig(batch_size=8, seed=seed), shuffle=True)
        return torch.cat([labels for _, labels in loader]).tolist()

    assert len(order(0)) == 24
    assert order(0) == order(0) != order(1)
    few = make_loader(model, pictures(7), ltm.TrainConfig(batch_size=8), shuffle=True)
    assert len(list(few)) == 1, "fewer images than a batch"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_the_same_from_any_place_on(workers: int, pictures, build) -> None:
    model, data = build("timm-vit"), pictures(30)
    shared = {"batch_size": 8, "augment": "crop", "seed": 3}
    whole = make_loader(model, data, ltm.TrainConfig(workers=0, **shared), shuffle=True)
    later = make_loader(model, data, ltm.TrainConfig(workers=workers, **shared), shuffle=True)
    torch.manual_seed(workers)  # of no consequence
    for epoch in (0, 1):
        whole.sampler.begin(epoch)
        before = list(whole)
        torch.rand(3)
        later.sampler.begin(epoch, 8)
        after = list(later)
        assert len(before) == 3 and len(after) == 2
        for (x, y), (again, label) in zip(before[1:], after, strict=True):
            assert torch.equal(x, again) and torch.equal(y, label)
    whole.sampler.begin(0)
    first = next(iter(whole))[0]
    whole.sampler.begin(2)
    assert not torch.equal(first, next(iter(whole))[0]), "another epoch, another order"


def test_augmentation_leaves_the_processs_own_random_numbers_alone(pictures, build) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    list(make_loader(build("timm-vit"), pictures(16), ltm.TrainConfig(batch_size=8, augment="crop"), shuffle=True))
    assert torch.equal(torch.rand(4), expected)


def test_seeds_differ_in_every_number() -> None:
    seeds = {seed_of(a, b, c) for a in range(6) for b in range(6) for c in range(6)}
    assert len(seeds) == 216 and all(0 <= seed < 2**63 for seed in seeds)


# ---------------------------------------------------------------------------------------------------- damaged images


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_counted_and_replaced_by_the_next(workers: int, converted) -> None:
    model = converted("timm-vit")
    config = ltm.TrainConfig(batch_size=8, unreadable=0.1, workers=workers, held_out=0.0)
    history = ltm.finetune(model, encoded(40, damaged=(3, 4)), config=config)
    assert history.epochs[-1]["unreadable"] == 2 and len(history.losses) == 5
    config = ltm.TrainConfig(batch_size=8, unreadable=0.04, workers=workers, held_out=0.0)
    with pytest.raises(DataError, match=r"2 of 40 images cannot be read, the last one found is image [34] \(OSError"):
        ltm.finetune(model, encoded(40, damaged=(3, 4)), config=config)


def test_what_replaces_a_damaged_image_brings_its_own_label(build) -> None:
    config = ltm.TrainConfig(batch_size=6, unreadable=0.5)
    loader = make_loader(build("timm-vit"), encoded(6, damaged=(1, 5)), config, shuffle=False)
    ((images, labels),) = loader
    assert labels.tolist() == [0, 2, 2, 3, 4, 0]
    assert torch.equal(images[1], images[2]) and torch.equal(images[5], images[0])


def test_an_evaluation_accepts_no_damaged_image(build) -> None:
    with pytest.raises(DataError, match="1 of 14 images cannot be read, the last one found is image 3"):
        evaluate(build("timm-vit"), encoded(14, damaged=(3,)))


# ----------------------------------------------------------------------------------------------------------- streams


def test_a_stream_trains_for_as_many_steps_as_it_is_told(converted) -> None:
    model, stream = converted("timm-vit"), encoded(40, damaged=()).to_iterable_dataset(num_shards=2)
    assert is_stream(stream) and not is_stream(encoded(4, damaged=()))
    history = ltm.finetune(model, stream, config=ltm.TrainConfig(batch_size=8, steps=7, epochs=2, lr=1e-3))
    assert len(history.losses) == 14 and sum(history.losses[-4:]) < sum(history.losses[:4])


def test_a_stream_asks_for_its_length(build) -> None:
    stream = encoded(16, damaged=()).to_iterable_dataset()
    with pytest.raises(DataError, match=r"set TrainConfig\.steps"):
        ltm.finetune(build("timm-vit"), stream, config=ltm.TrainConfig(batch_size=8))


def test_a_damaged_image_of_a_stream_is_named(build) -> None:
    stream = encoded(16, damaged=(5,)).to_iterable_dataset()
    config = ltm.TrainConfig(batch_size=8, steps=2, unreadable=0.0)
    with pytest.raises(DataError, match=r"1 of the stream's first \d+ images cannot be read.*TrainConfig.unreadable"):
        ltm.finetune(build("timm-vit"), stream, config=config)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_of_a_stream_are_left_out_and_counted(workers: int, build) -> None:
    stream = encoded(44, damaged=(5, 6, 30)).to_iterable_dataset(num_shards=2)
    config = ltm.TrainConfig(batch_size=8, steps=5, workers=workers)
    history = ltm.finetune(build("timm-vit"), stream, config=config)
    assert len(history.losses) == 5 and history.epochs[-1]["unreadable"] == 3


def test_the_damaged_images_of_a_whole_pass_stay_counted_when_the_next_begins(build) -> None:
    stream = encoded(44, damaged=(5, 6, 30)).to_iterable_dataset()
    config = ltm.TrainConfig(batch_size=4, unreadable=0.5)
    dataset = make_loader(build("timm-vit"), stream, config, shuffle=False).dataset
    for _ in range(2):
        assert len(list(dataset)) == 41 and int(dataset.unreadable.sum()) == 3
        assert next(iter(dataset)) is not None and int(dataset.unreadable.sum()) == 3


@pytest.mark.slow
def test_labels_of_a_stream_are_checked_as_they_come(build) -> None:
    stream = encoded(16, damaged=()).map(lambda row: {"label": row["label"] + 5}).to_iterable_dataset()
    with pytest.raises(DataError, match=r"expected class indices \(n,\) from 0 to 6"):
        ltm.finetune(build("timm-vit"), stream, config=ltm.TrainConfig(batch_size=8, steps=2))


@pytest.mark.parametrize("steps", [2, 9])
def test_an_epoch_of_a_table_may_be_cut_or_repeated(steps: int, converted) -> None:
    history = ltm.finetune(converted("timm-vit"), encoded(40, ()), config=ltm.TrainConfig(batch_size=8, steps=steps))
    assert len(history.losses) == steps


def test_nothing_but_damaged_images_is_an_error(build) -> None:
    with pytest.raises(DataError, match="7 of 7 images cannot be read"):
        config = ltm.TrainConfig(batch_size=7, unreadable=1.0)
        list(make_loader(build("timm-vit"), encoded(7, tuple(range(7))), config, shuffle=False))


@pytest.mark.parametrize("label", [None, -2, "ant"], ids=str)
def test_a_row_of_a_stream_without_a_label_is_named(label: object, build) -> None:
    def rows() -> Iterator[dict[str, object]]:
        yield from ({"image": Image.new("RGB", (32, 32)), "label": label} for _ in range(16))

    stream = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(DataError, match=f"an image has the label {label!r}, and labels are whole numbers"):
        ltm.finetune(build("timm-vit"), stream, config=ltm.TrainConfig(batch_size=8, steps=1))


@pytest.mark.parametrize("converts", [False, True], ids=["original", "converted"])
@pytest.mark.parametrize("family", ["timm-vit", "hf-vit"])
def test_images_come_in_the_dtype_of_the_model(family: str, converts: bool, build) -> None:
    model = build(family).bfloat16()
    model = ltm.retrofit(model, ltm.LTMConfig(flops=0.7)) if converts else model
    data = encoded(16, damaged=())
    assert len(ltm.finetune(model, data, data, config=ltm.TrainConfig(batch_size=8)).losses) == 2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_transform_that_leaves_no_image_is_named(build, pictures) -> None:
    data = pictures(14).with_transform(lambda rows: {"pixel_values": rows["image"], "labels": rows["label"]})
    with pytest.raises(DataError, match="own transform gives pixel_values, labels, no image"):
        ltm.finetune(build("timm-vit"), data, config=ltm.TrainConfig(batch_size=7))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_images_of_any_format_are_the_same(kind: str, build, pictures) -> None:
    model, data = build("timm-vit"), pictures(7, size=40)
    expected, given = (
        next(iter(make_loader(model, images, ltm.TrainConfig(batch_size=7), shuffle=False)))
        for images in (data, data.with_format(kind))
    )
    assert torch.equal(expected[1], given[1]) and torch.allclose(expected[0], given[0], atol=1e-5)
