"""Masks on a grid and average pooling: exact overlaps, columns and rows that sum to one, other sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_retrofit.merging.mask import GridMask
from ltm_retrofit.merging.methods import Place, get_method
from ltm_retrofit.merging.pool import PoolGrid, PoolMask, grid_at, grid_overlaps, overlaps
from ltm_retrofit.merging.slice import CropGrid
from ltm_retrofit.merging.statistics import Statistics

torch.set_num_threads(1)
DIM, KEY, CLASSES, CLUSTERS = 8, 4, 3, 6


@given(size=st.integers(1, 40), data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_box_gives_itself_away_whole_and_every_larger_box_is_full(size, data):
    kept = data.draw(st.integers(1, size))
    index, share = overlaps(size, kept)
    assert torch.allclose(share.sum(dim=1), torch.ones(kept, dtype=share.dtype))
    given_away = torch.zeros(size, dtype=share.dtype).index_add(0, index.flatten(), share.flatten())
    assert torch.allclose(given_away, torch.full((size,), kept / size, dtype=share.dtype))


@pytest.mark.parametrize("size, kept", [(8, 4), (12, 3), (6, 6)])
def test_whole_numbered_overlaps_are_average_pooling(size, kept):
    x = torch.randn(2, size * size, DIM)
    pooled, grid, _ = PoolGrid(DIM, (size, size), (kept, kept))(x, (size, size))
    image = x.transpose(1, 2).reshape(2, DIM, size, size)
    expected = torch.nn.functional.avg_pool2d(image, size // kept)
    assert grid == (kept, kept)
    assert torch.allclose(pooled, expected.flatten(2).transpose(1, 2), atol=1e-6)


def test_a_fresh_mask_is_average_pooling_and_a_trained_one_is_not():
    x, mask = torch.randn(2, 14 * 10, DIM), GridMask(DIM, KEY, (14, 10), (11, 8))
    pooled, _, _ = PoolGrid(DIM, (14, 10), (11, 8))(x, (14, 10))
    merged, grid, step = mask(x, (14, 10))
    assert grid == (11, 8) and torch.allclose(merged, pooled, atol=1e-6)
    with torch.no_grad():
        mask.alpha.fill_(3.0)
    other, _, step = mask(x, (14, 10))
    assert not torch.allclose(other, pooled, atol=1e-3)
    assert torch.allclose(step.assignment.mask.sum(-1), torch.ones(2, 88), atol=1e-6)  # columns of G
    assert torch.allclose(step.assignment.dense().sum(-1), torch.ones(2, 140), atol=1e-6)  # rows of W


@pytest.mark.parametrize("kind", [PoolGrid, CropGrid, GridMask])
def test_a_constant_survives_merging_and_unmerging(kind):
    more = (KEY, (9, 7), (5, 4)) if kind is GridMask else ((9, 7), (5, 4))
    x = torch.full((1, 63, DIM), 2.5)
    merged, _, step = kind(DIM, *more)(x, (9, 7))
    assert torch.allclose(merged, torch.full_like(merged, 2.5), atol=1e-6)
    if kind is not CropGrid:  # what is cropped away is gone
        assert torch.allclose(step.assignment.unmerge(merged), x, atol=1e-5)


@given(height=st.integers(1, 30), width=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_at_another_size_the_same_share_is_kept(height, width):
    mask = GridMask(DIM, KEY, (8, 8), (6, 6))
    merged, grid, _ = mask(torch.randn(1, height * width, DIM), (height, width))
    assert grid == grid_at((height, width), (8, 8), (6, 6))
    assert merged.shape[1] == grid[0] * grid[1] and grid[0] <= height and grid[1] <= width
    assert height < 4 or grid[0] < height


def test_every_weight_of_a_grid_mask_gets_a_gradient():
    mask = GridMask(DIM, KEY, (8, 8), (6, 6), Statistics(DIM, CLASSES, CLUSTERS))
    with torch.no_grad():
        mask.alpha.fill_(0.5)
    mask(torch.randn(2, 64, DIM), (8, 8))[0].square().sum().backward()
    assert mask.key.weight.grad is not None and float(mask.key.weight.grad.abs().sum()) > 0
    assert mask.alpha.grad is not None and mask.eta.grad is not None


def test_a_crop_costs_nothing_and_pooling_its_products():
    place = Place("GRID", DIM, KEY, 64, 36, 0, CLASSES, CLUSTERS, (8, 8), (6, 6))
    assert get_method("slice").macs(place) == 0
    places, width = grid_overlaps((8, 8), (6, 6))[0].shape
    assert get_method("pool").macs(place) == places * width * DIM


@given(tokens=st.integers(2, 40), prefix=st.integers(0, 3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_pooled_tokens_conserve_sizes_and_keep_prefix_tokens(tokens, prefix, data):
    kept = data.draw(st.integers(1, tokens))
    x = torch.randn(2, prefix + tokens, DIM)
    out = PoolMask(prefix + tokens, prefix + kept, prefix)(x, x, None)
    assert torch.equal(out.tokens[:, :prefix], x[:, :prefix])
    assert torch.allclose(out.sizes.sum(1), torch.full((2,), float(prefix + tokens)), rtol=1e-4)
    assert torch.allclose((out.tokens * out.sizes[..., None]).sum(1), x.sum(1), atol=1e-4)
