"""The embedded data: no digit of one split is ever seen in another, and what is drawn depends on the seed alone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from sklearn.datasets import load_digits

import ltm_retrofit as ltm
from ltm_retrofit.tuning import sources
from ltm_retrofit.tuning.sources import CANVAS, SPLITS, draw_canvas, draw_split, source_digits


def test_splits_are_disjoint_ranges_that_cover_every_source_digit() -> None:
    covered = sorted(index for start, stop in SPLITS.values() for index in range(start, stop))
    assert covered == list(range(1797))


def test_every_source_digit_is_in_exactly_one_split() -> None:
    """Identified by content: the multiset of all splits is the multiset of all digits, and no picture is in two."""
    found = {split: [image.tobytes() for image in source_digits(split)[0]] for split in SPLITS}
    everything = (load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(key for keys in found.values() for key in keys) == sorted(image.tobytes() for image in everything)
    for one, other in combinations(found, 2):
        assert not set(found[one]) & set(found[other]), (one, other)


def test_labels_belong_to_their_source_digits() -> None:
    truth = {
        (image * (255 / 16)).astype(np.uint8).tobytes(): label
        for image, label in zip(load_digits().images, load_digits().target, strict=True)
    }
    for split in SPLITS:
        images, labels = source_digits(split)
        assert images.dtype == np.uint8 and labels.dtype == np.int64 and images.shape[1:] == (8, 8)
        assert all(truth[image.tobytes()] == label for image, label in zip(images, labels, strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_a_canvas_is_drawn_from_its_own_split_only(split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clutter too: every digit and every pool of fragments handed to the drawing is the split's."""
    pool, _ = source_digits(split)
    seen: list[tuple[bytes, bytes]] = []

    def spy(digit, others, rng):
        seen.append((digit.tobytes(), others.tobytes()))
        return np.zeros((CANVAS, CANVAS), np.uint8)

    monkeypatch.setattr(sources, "draw_canvas", spy)
    draw_split(split, 2, seed=0)
    assert [digit for digit, _ in seen] == 2 * [image.tobytes() for image in pool]
    assert {others for _, others in seen} == {pool.tobytes()}


def test_canvases_have_the_said_shape_and_labels() -> None:
    canvases, labels = draw_split("validation", 2, seed=3)
    assert canvases.shape == (360, CANVAS, CANVAS) and canvases.dtype == np.uint8
    assert labels.shape == (360,)
    np.testing.assert_array_equal(labels, np.tile(source_digits("validation")[1], 2))
    assert set(labels) == set(range(10))
    assert canvases.std(axis=(1, 2)).min() > 5, "an empty canvas"


@pytest.mark.parametrize("canvas", [32, 64, 128])
def test_a_digit_is_as_large_on_every_canvas(canvas) -> None:
    """Without clutter and noise, what is drawn is the digit alone: of 20 to 32 pixels."""
    full, rng = np.full((8, 8), 255, np.uint8), np.random.default_rng(0)
    for _ in range(20):
        drawn = draw_canvas(full, full[None] * 0, rng, canvas=canvas)
        assert drawn.shape == (canvas, canvas)
        assert 20**2 * 0.9 < (drawn > 120).sum() < 32**2 * 1.1


def test_a_canvas_too_small_for_a_digit_is_refused() -> None:
    with pytest.raises(ltm.RecipeError, match="canvas is 31: digits are up to 32 pixels high"):
        ltm.load_digits("validation", canvas=31)


def test_same_seed_same_canvases_other_seed_other_canvases() -> None:
    one, again, other = (draw_split("validation", 1, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not (one == other).all(axis=(1, 2)).any()


def test_splits_with_one_seed_are_drawn_independently() -> None:
    """Where both drew from the same random stream, the noise of the n-th canvas would be the same."""
    pool = source_digits("test")[0]
    streams = [np.random.default_rng([0, index]) for index in (1, 2)]
    blank = np.zeros((8, 8), np.uint8)
    drawn = [draw_canvas(blank, pool * 0, rng).astype(int) for rng in streams]
    assert (drawn[0] != drawn[1]).mean() > 0.3


def test_drawing_leaves_global_random_state() -> None:
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    draw_split("validation", 1, seed=0)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_the_data_set_is_a_shuffled_table_of_rgb_images() -> None:
    table = ltm.load_digits("validation", per_digit=1, seed=4)
    assert table.column_names == ["image", "label"] and len(table) == 180
    assert table.features["label"].names == [str(digit) for digit in range(10)]
    image = table[0]["image"]
    assert image.mode == "RGB" and image.size == (CANVAS, CANVAS)
    canvases, labels = draw_split("validation", 1, seed=4)
    by_content = {canvas.tobytes(): label for canvas, label in zip(canvases, labels, strict=True)}
    for row in table:
        grey = np.asarray(row["image"])
        assert (grey[..., 0] == grey[..., 1]).all()
        assert by_content[np.ascontiguousarray(grey[..., 0]).tobytes()] == row["label"]
    assert table["label"][:] != labels.tolist(), "not shuffled"


def test_a_split_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ltm.RecipeError, match="a split of the embedded digits must be one of 'train', 'validation'"):
        ltm.load_digits("testing")


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_is_in_every_split(split) -> None:
    assert set(source_digits(split)[1]) == set(range(10))
