"""Groups of patches as superpixels: arrays in, arrays and lines out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltm_retrofit.reporting import superpixels

GROUPS = np.array([[0, 0, 1], [0, 2, 3]])


def test_lines_lie_where_a_merged_group_meets_another_and_between_single_patches_is_none() -> None:
    assert superpixels.boundaries(np.zeros((3, 4), dtype=int)) == []
    assert superpixels.boundaries(np.arange(12).reshape(3, 4)) == []
    assert set(superpixels.boundaries(GROUPS)) == {((2, 0), (2, 1)), ((1, 1), (1, 2)), ((1, 1), (2, 1))}


def test_an_outline_goes_around_also_at_the_edge_of_the_image() -> None:
    assert set(superpixels.outline(GROUPS == 1)) == {
        ((2, 0), (2, 1)),
        ((3, 0), (3, 1)),
        ((2, 0), (3, 0)),
        ((2, 1), (3, 1)),
    }
    assert len(superpixels.outline(GROUPS == 0)) == 8  # an L of three patches


@pytest.mark.parametrize("size", [(6, 9), (7, 10)])
def test_groups_get_their_mean_and_single_patches_stay(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((*size, 3))
    drawn = superpixels.filled(image, GROUPS)
    pixels = superpixels.at_pixels(GROUPS, size)
    assert pixels.shape == size and set(np.unique(pixels)) == {0, 1, 2, 3}
    np.testing.assert_allclose(drawn[pixels == 0], np.tile(image[pixels == 0].mean(axis=0), ((pixels == 0).sum(), 1)))
    np.testing.assert_array_equal(drawn[pixels > 0], image[pixels > 0])


def test_what_is_dimmed_is_grey_and_paler_than_anything_kept() -> None:
    image = np.random.default_rng(0).random((6, 9, 3)) * 0.7
    drawn = superpixels.dimmed(image, GROUPS == 0)
    kept = superpixels.at_pixels(GROUPS == 0, (6, 9))
    np.testing.assert_array_equal(drawn[kept], image[kept])
    assert np.ptp(drawn[~kept], axis=-1).max() == 0 and drawn[~kept].min() >= 0.72


def test_the_largest_are_counted_by_patches_and_single_ones_are_none() -> None:
    groups = np.array([[5, 5, 5, 9], [7, 7, 8, 1]])
    assert superpixels.largest(groups, 5) == {5: 0, 7: 1}
    assert superpixels.largest(groups, 1) == {5: 0}


def test_a_group_is_followed_back_to_what_it_mostly_came_from() -> None:
    sites = [np.array([[0, 0, 2, 2, 4, 5]]), np.array([[0, 0, 0, 3, 4, 4]]), np.array([[0, 0, 0, 0, 4, 4]])]
    # 2 lost half of its patches on the way to the last site's 0, which comes mostly from 0 anyhow; 4 grew of two
    assert superpixels.followed(sites, 5) == [{0: 0}, {0: 0, 4: 1}, {0: 0, 4: 1}]
    renamed = [np.array([[3, 3, 2, 1]]), np.array([[8, 8, 8, 1]])]
    assert superpixels.followed(renamed, 5) == [{3: 0}, {8: 0}]
    torn = [np.array([[3, 3, 3, 3]]), np.array([[8, 8, 6, 7]])]  # most of 3 went elsewhere, or as much
    assert superpixels.followed(torn, 5) == [{}, {8: 0}]
    assert superpixels.followed([], 5) == []


@given(st.lists(st.lists(st.integers(0, 11), min_size=12, max_size=12), min_size=1, max_size=4))
def test_where_groups_only_grow_a_colour_is_never_handed_to_another(unions: list[list[int]]) -> None:
    label, sites = np.arange(12), []
    for union in unions:  # each site joins some groups to others
        label = np.array(union)[label]
        sites.append(label.reshape(3, 4))
    numbers = superpixels.followed(sites, 5)
    for earlier, later, before, after in zip(sites, sites[1:], numbers, numbers[1:], strict=False):
        assert set(before.values()) <= set(after.values())
        for group, number in before.items():
            held = later[earlier == group]
            assert len(set(held.tolist())) == 1 and after[int(held[0])] == number


def test_a_number_stands_within_its_group_where_most_of_it_is() -> None:
    inside = np.zeros((6, 6), dtype=bool)
    inside[1:4, 2:5] = inside[5, 0] = True
    assert superpixels.middle(inside) == (2, 3)
