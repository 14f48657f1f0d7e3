"""``"tome"``: equality with the published algorithm, and the partition that it shares with pooling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import double_inputs
from torch import Tensor

from ltm_retrofit.merging.tokens import Merged
from ltm_retrofit.merging.tome import ToMeMask, partition

torch.set_num_threads(1)
DIM, KEY, BATCH = 10, 4, 2


def published_tome(keys: Tensor, x: Tensor, size: Tensor, r: int, class_token: bool, distill_token: bool) -> dict:
    """Bolya et al., "Token Merging: Your ViT but faster", appendix D: one image, written anew for this test."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    scores = keys[::2] @ keys[1::2].T
    if class_token:
        scores[0, :] = -math.inf
    if distill_token:
        scores[:, 0] = -math.inf
    return _match(scores, x, size, r, sort=class_token, first=1 if class_token else 0, second=1 if distill_token else 0)


def masked_tome(keys: Tensor, x: Tensor, size: Tensor, r: int, prefix: int) -> dict:
    """The same with every prefix token protected, on whichever side it falls."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    scores = keys[::2] @ keys[1::2].T
    even, odd = math.ceil(prefix / 2), prefix // 2
    scores[:even, :] = -math.inf
    scores[:, :odd] = -math.inf
    return _match(scores, x, size, r, sort=True, first=even, second=odd)


def _match(scores: Tensor, x: Tensor, size: Tensor, r: int, *, sort: bool, first: int, second: int) -> dict:
    best, target = scores.max(dim=-1)
    edges = best.argsort(descending=True)
    sources, unmerged = edges[:r], edges[r:]
    if sort:
        unmerged = unmerged.sort().values
    weighted, sizes = x * size[:, None], size.clone()
    new_size = sizes[1::2].clone().scatter_reduce(0, target[sources], sizes[::2][sources], "sum")
    summed = weighted[1::2].clone()
    for a in sources.tolist():
        summed[target[a]] += weighted[::2][a]
    merged = summed / new_size[:, None]
    a_tokens, a_sizes = x[::2][unmerged], sizes[::2][unmerged]
    order_prefix = [
        entry
        for index in range(max(first, second))
        for entry in ([("a", index)] if index < first else []) + ([("b", index)] if index < second else [])
    ]
    pick = {"a": (a_tokens, a_sizes), "b": (merged, new_size)}
    tokens = [pick[side][0][index] for side, index in order_prefix] + [*a_tokens[first:], *merged[second:]]
    counts = [pick[side][1][index] for side, index in order_prefix] + [*a_sizes[first:], *new_size[second:]]
    return {
        "tokens": torch.stack(tokens),
        "sizes": torch.stack(counts),
        "pairs": {(2 * a, 2 * int(target[a]) + 1) for a in sources.tolist()},
    }


def reference(prefix: int, *args) -> dict:
    if prefix <= 2:
        return published_tome(*args, class_token=prefix >= 1, distill_token=prefix == 2)
    return masked_tome(*args, prefix)


def pairs_of(merged: Merged, image: int) -> set[tuple[int, int]]:
    """Who went where, as positions among all N tokens."""
    assignment = merged.merge.assignment
    destinations = assignment.weights.shape[-1]
    goal = assignment.weights[image].argmax(dim=-1)
    lasts = assignment.kept[image, -destinations:]
    return {(int(a), int(lasts[b])) for a, b in zip(assignment.merged[image], goal, strict=True)}


@pytest.mark.parametrize("prefix", [0, 1, 2, 5], ids=["none", "class", "distillation", "registers"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_merge_equals_published_tome(prefix, data):
    n = data.draw(st.integers(prefix + 2, prefix + 23), label="N")
    sources = len(range(prefix + prefix % 2, n, 2))
    r = data.draw(st.integers(0, min((n - prefix) // 2, sources)), label="r")
    dim = data.draw(st.integers(KEY, 12), label="D")
    seed = data.draw(st.integers(0, 10_000), label="seed")
    inner, tokens, sizes = double_inputs(n, dim, seed, sized=data.draw(st.booleans(), label="sizes given"))
    weight, bias = torch.randn(KEY, dim, dtype=torch.float64), torch.randn(KEY, dtype=torch.float64)
    merged = ToMeMask(dim, n, n - r, prefix)(inner, tokens, sizes, (weight, bias))
    given_sizes = torch.ones(BATCH, n, dtype=torch.float64) if sizes is None else sizes
    for image in range(BATCH):
        want = reference(prefix, inner[image] @ weight.T + bias, tokens[image], given_sizes[image], r)
        assert pairs_of(merged, image) == want["pairs"]
        ours = torch.cat([merged.tokens[image], merged.sizes[image, :, None]], dim=1)
        theirs = torch.cat([want["tokens"], want["sizes"][:, None]], dim=1)
        if prefix == 0:  # the paper leaves the unmerged in order of similarity: compare as sets
            ours, theirs = (rows[rows[:, 0].argsort()] for rows in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_reference_protects_class_and_distillation_tokens():
    inner, tokens, _ = double_inputs(12, DIM, 0, False)
    inner[:, 0] = inner[:, 3]  # the class token is the most similar of all, and token 4 is closest to the second
    inner[:, 4] = inner[:, 1]
    plain = published_tome(inner[0], tokens[0], torch.ones(12).double(), 2, False, False)
    guarded = published_tome(inner[0], tokens[0], torch.ones(12).double(), 2, True, True)
    assert {(0, 3), (4, 1)} == plain["pairs"]
    assert all(a != 0 and b != 1 for a, b in guarded["pairs"])


@pytest.mark.parametrize("n, p, prefix", [(12, 9, 0), (13, 6, 0), (17, 12, 1), (21, 16, 5), (17, 6, 1), (9, 9, 1)])
def test_each_input_token_is_kept_or_merged_exactly_once(n, p, prefix):
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    key = (torch.randn(KEY, DIM).double(), None)
    assignment = ToMeMask(DIM, n, p, prefix)(inner, tokens, sizes, key).merge.assignment
    kept, left = assignment.kept, assignment.merged
    for image in range(BATCH):
        assert sorted([*kept[image].tolist(), *left[image].tolist()]) == list(range(n))
        unmerged = kept[image, prefix : p - partition(n, p, prefix).destinations].tolist()
        assert unmerged == sorted(unmerged)


@settings(max_examples=300, deadline=None)
@given(prefix=st.integers(0, 6), patches=st.integers(1, 70), data=st.data())
def test_a_partition_leaves_enough_sources_and_enough_places(prefix, patches, data):
    remain = data.draw(st.integers(1, patches))
    stride, offset, sources, destinations = partition(prefix + patches, prefix + remain, prefix)
    positions = range(offset, patches, stride)
    assert len(positions) == destinations and sources + destinations == patches
    assert 1 <= destinations <= remain and patches - remain <= sources
    if patches > 1 and patches - remain <= len([i for i in range(prefix, prefix + patches) if i % 2 == 0]):
        if any((prefix + i) % 2 for i in range(patches)):
            assert [prefix + i for i in positions] == [i for i in range(prefix, prefix + patches) if i % 2]
    else:
        assert offset == 0 and stride == math.ceil(patches / remain)
