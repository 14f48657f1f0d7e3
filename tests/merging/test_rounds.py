"""Rounds of matching by Ward's cost: a naive reference, who leaves, what is joined, ties and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ltm_retrofit.errors import CountError
from ltm_retrofit.merging.rounds import SAME, add_at, join, leaving_in, rows_at

torch.set_num_threads(1)


def naive(z: Tensor, sizes: Tensor, remain: int, rounds: int) -> tuple[list[int], list[int]]:
    """One image, one group at a time: the group of each token, and the token whose place a group takes."""
    z = z - z.mean(dim=0)
    groups = [([place], z[place].clone(), float(size)) for place, size in enumerate(sizes)]
    while len(groups) > remain:
        left = -(-(len(groups) - remain) // max(1, rounds))
        count, rounds = min(len(groups) // 2, left), rounds - 1
        best = []
        for odd in range(1, len(groups), 2):
            costs = []
            for even in range(0, len(groups), 2):
                (_, a, s), (_, b, t) = groups[odd], groups[even]
                apart = float((a - b).square().sum() - SAME * (a.square().sum() + b.square().sum()))
                costs.append((s * t / (s + t) * max(0.0, apart), even))
            best.append((*min(costs), odd))
        gone = sorted(best)[:count]
        for _, even, odd in gone:
            members, mean, size = groups[even]
            more, other, weight = groups[odd]
            groups[even] = ([*members, *more], (size * mean + weight * other) / (size + weight), size + weight)
        groups = [group for place, group in enumerate(groups) if place not in {odd for *_, odd in gone}]
    of = [0] * len(z)
    for number, (members, _, _) in enumerate(groups):
        for member in members:
            of[member] = number
    return of, [members[0] for members, _, _ in groups]


@pytest.mark.parametrize("sized", [False, True], ids=["ones", "sized"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_joins_are_those_of_the_naive_loop(sized, data):
    n = data.draw(st.integers(1, 24), label="n")
    remain = data.draw(st.integers(1, n), label="remain")
    rounds = data.draw(st.integers(1, 5), label="rounds")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000), label="seed"))
    z = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (2, n), generator=generator).double() if sized else None
    groups = join(z, sizes, leaving_in(n, remain, rounds))
    for image in range(2):
        weights = torch.ones(n) if sizes is None else sizes[image]
        of, first = naive(z[image], weights, remain, rounds)
        assert groups.of[image].tolist() == of and groups.first[image].tolist() == first
        assert sorted(groups.gone[image].tolist()) == sorted(set(range(n)) - set(first))


@settings(max_examples=200, deadline=None)
@given(patches=st.integers(1, 300), rounds=st.integers(1, 6), data=st.data())
def test_any_count_is_reached_in_parts_of_which_none_is_more_than_half(patches, rounds, data):
    remain = data.draw(st.integers(1, patches))
    leaving, present = leaving_in(patches, remain, rounds), patches
    assert patches - sum(leaving) == remain
    for count in leaving:
        assert 1 <= count <= present // 2
        present -= count
    if patches - remain <= patches // 2:  # one round could do it: in parts, none is capped at a half
        assert len(leaving) <= rounds and max(leaving, default=0) - min(leaving, default=0) <= 1


@pytest.mark.parametrize("patches, remain", [(16, 0), (16, 17), (0, 0), (4, -1)])
def test_counts_that_cannot_be_are_refused_with_the_range(patches, remain):
    with pytest.raises(CountError, match=f"into {remain}: choose 1 to {patches}"):
        leaving_in(patches, remain, 3)


def test_one_join_costs_what_ward_says():
    """The rise of the sum of squared distances from the means is the cost, to rounding: exact for one join."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 9, 4, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (1, 9), generator=generator).double()
    groups = join(z, sizes, (1,))
    (source,) = groups.gone[0].tolist()
    target = groups.first[0, groups.of[0, source]].item()
    a, b, s, t = z[0, source], z[0, target], sizes[0, source], sizes[0, target]
    mean = (s * a + t * b) / (s + t)
    rise = s * (a - mean).square().sum() + t * (b - mean).square().sum()
    torch.testing.assert_close(rise, s * t / (s + t) * (a - b).square().sum())
    others = [
        sizes[0, i] * sizes[0, j] / (sizes[0, i] + sizes[0, j]) * (z[0, i] - z[0, j]).square().sum()
        for i in range(1, 9, 2)
        for j in range(0, 9, 2)
    ]
    assert rise <= min(others) + 1e-12


def test_copies_of_a_token_join_in_order_whatever_their_rounding():
    """Tokens that `LOCAL` brought back are copies; which of them leave must not change with the size of the batch."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(1, 6, 48, generator=generator)
    copies = few[:, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]]
    noisy = copies * (1 + 1e-7 * torch.randn(4, 12, 1, generator=generator))
    want = join(copies, None, (3, 3))
    assert want.of[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for image in range(4):
        assert torch.equal(join(noisy[image : image + 1], None, (3, 3)).of, want.of)


def test_of_equal_tokens_the_first_leave_at_every_batch_size():
    flat = torch.ones(5, 16, 3)
    one, many = join(flat[:1], None, (3, 2)), join(flat, None, (3, 2))
    assert all(torch.equal(many.first[image], one.first[0]) for image in range(5))
    assert set(one.gone[0, :3].tolist()) == {1, 3, 5}


@pytest.mark.parametrize("places", [(14, 15), (0, 1), (3, 8), (0, 2, 4)], ids=str)
def test_padding_leaves_first_and_nobody_joins_it(places):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(1, 16, 4, generator=generator, dtype=torch.float64)
    sizes = torch.ones(1, 16, dtype=torch.float64)
    for place in places:
        sizes[0, place] = 0
        z[0, place] = 1e4  # whatever a host leaves there
    groups = join(z, sizes, (5,), padded=True)
    assert torch.isfinite(z).all()
    for place in places:
        members = (groups.of[0] == groups.of[0, place]).nonzero().flatten().tolist()
        assert place % 2 == 0 or place in groups.gone[0].tolist()
        if place % 2 == 0:  # it may not leave in this round, and stays alone or with its like
            assert all(member in places for member in members)


def test_rows_are_taken_and_added_within_each_image():
    x = torch.arange(24.0).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(rows_at(x, index), torch.stack([x[0, [3, 0]], x[1, [1, 1]]]))
    added = add_at(x, index, torch.ones(2, 2, 3))
    assert torch.equal(added - x, torch.tensor([[1.0, 0, 0, 1], [0, 2, 0, 0]]).unsqueeze(-1).expand(-1, -1, 3))
