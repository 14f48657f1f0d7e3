"""What a site learns of its clusters: when it fits, what it averages, what survives copies, casts and checkpoints."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ltm_retrofit.errors import DataError, RecipeError
from ltm_retrofit.merging import ib
from ltm_retrofit.merging.statistics import Statistics

torch.set_num_threads(1)
DIM, CLASSES, CLUSTERS = 6, 3, 8
CENTRES = 2 * torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(5))
BUFFERS = ("centroids", "counts", "beta", "fitted")


def batch(n: int, seed: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    x = CENTRES[labels] + torch.randn(n, DIM, generator=generator) + shift
    return x, ib.soft_targets(labels, CLASSES)


def fresh(**options) -> Statistics:
    return Statistics(DIM, CLASSES, CLUSTERS, **{"perplexity": 3.0, "capacity": 128} | options)


def fitted(**options) -> Statistics:
    statistics = fresh(**options)
    statistics.update(*batch(64))
    return statistics


def same(one: Statistics, other: Statistics) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in BUFFERS)


# ------------------------------------------------------------------------------------------------------- before a fit


def test_nothing_is_fitted_before_four_samples_for_each_cluster():
    statistics = fresh()
    statistics.update(*batch(31))
    assert not bool(statistics.fitted) and same(statistics, fresh())
    statistics.update(*batch(1, seed=1))
    assert bool(statistics.fitted)


def test_the_bound_is_a_zero_that_can_be_differentiated_before_a_fit():
    x, targets = batch(5)
    x.requires_grad_()
    bound = fresh().bound(x, targets)
    bound.backward()
    assert bound.item() == 0 and x.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_step_is_exactly_zero_and_differentiable_before_a_fit(dtype):
    x = (100 * batch(5)[0]).to(dtype).requires_grad_()
    step = fresh().step_direction(x)
    step.sum().backward()
    assert step.abs().max() == 0 and x.grad.abs().max() == 0


def test_the_step_is_zero_whatever_the_buffers_hold_while_the_flag_is_down():
    statistics = fitted()
    assert statistics.step_direction(batch(5)[0]).abs().max() > 0
    statistics.fitted.zero_()
    assert statistics.step_direction(batch(5)[0]).abs().max() == 0


# ------------------------------------------------------------------------------------------------------------ fitting


def test_a_fit_takes_kmeans_the_perplexity_and_the_counts_of_the_same_assignments():
    statistics, (x, targets) = fresh(), batch(64)
    statistics.fit(x, targets, torch.Generator().manual_seed(3))
    centroids = ib.kmeans(x, CLUSTERS, generator=torch.Generator().manual_seed(3))
    assert torch.equal(statistics.centroids, centroids)
    assert float(statistics.perplexity(x)) == pytest.approx(3.0, rel=1e-4)
    phi = ib.log_assign(x, centroids, statistics.beta).exp()
    torch.testing.assert_close(statistics.counts, 2 * phi.t() @ targets)  # 64 samples stand for capacity 128


def test_a_perplexity_beyond_the_clusters_is_capped():
    statistics = fitted(perplexity=100.0)
    assert float(statistics.perplexity(batch(64)[0])) == pytest.approx(0.9 * CLUSTERS, rel=1e-4)


def test_fits_without_a_generator_repeat_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    assert same(fitted(), fitted())
    assert torch.equal(before, torch.get_rng_state())


def test_fewer_distinct_samples_than_clusters_fit_finitely():
    statistics, targets = fresh(), ib.soft_targets(torch.zeros(40, dtype=torch.long), CLASSES)
    statistics.update(torch.ones(40, DIM), targets)
    x = batch(4)[0]
    assert torch.isfinite(statistics.step_direction(x)).all() and torch.isfinite(statistics.bound(x, targets[:4]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_ignored(bad):
    statistics, (x, targets) = fitted(), batch(16, seed=1)
    before = copy.deepcopy(statistics)
    x[3, 2] = bad
    statistics.update(x, targets)
    targets[0, 0] = bad
    statistics.update(batch(16)[0], targets)
    statistics.update(x[:0], targets[:0])
    assert same(statistics, before)
    assert torch.equal(statistics.memory.latest()[0], before.memory.latest()[0])
    with pytest.raises(DataError, match="finite"):
        statistics.fit(x, targets)


# ---------------------------------------------------------------------------------------------------------- averaging


def test_an_update_averages_counts_softly_and_centroids_by_the_nearest_samples():
    statistics, (x, targets) = fitted(decay=0.9), batch(32, seed=1)
    before = copy.deepcopy(statistics)
    statistics.update(x, targets)
    phi = ib.log_assign(x, before.centroids, before.beta).exp()
    scale = 0.1 * 128 / 32
    torch.testing.assert_close(statistics.counts, 0.9 * before.counts + scale * phi.t() @ targets)
    mass = 0.9 * before.counts.sum(1)
    for a, index in enumerate(phi.argmax(1) == a for a in range(CLUSTERS)):
        expected = (mass[a] * before.centroids[a] + scale * x[index].sum(0)) / (mass[a] + scale * index.sum())
        torch.testing.assert_close(statistics.centroids[a], expected)
    assert torch.equal(statistics.beta, before.beta)


def test_the_counts_always_sum_to_the_capacity():
    statistics = fitted()
    for seed, n in enumerate((1, 7, 64, 300)):
        statistics.update(*batch(n, seed=seed))
        assert float(statistics.counts.sum()) == pytest.approx(128, rel=1e-5)


def test_hundreds_of_updates_neither_merge_the_centroids_nor_flatten_the_assignments():
    statistics, (x, targets) = fitted(perplexity=4.0), batch(300, seed=9)
    start, bound = float(statistics.perplexity(x)), float(statistics.bound(x, targets))
    for seed in range(400):
        statistics.update(*batch(32, seed=seed))
    assert float(statistics.perplexity(x)) < 1.5 * start < CLUSTERS
    assert float(statistics.bound(x, targets)) < bound + 0.1


def test_centroids_follow_features_that_drift_and_a_refresh_fetches_those_left_behind():
    statistics, still = fitted(decay=0.9), fitted()
    for step in range(200):
        statistics.update(*batch(32, seed=step, shift=step / 40))
    x, _ = batch(200, seed=999, shift=5.0)

    def distance(statistics: Statistics) -> float:
        return float(torch.cdist(x, statistics.centroids).amin(1).mean())

    assert distance(statistics) < 0.5 * distance(still)
    statistics.refresh()
    assert (statistics.centroids.mean(0) - x.mean(0)).abs().max() < 1.5


def test_a_refresh_is_a_fit_to_the_most_recent_samples():
    statistics = fresh()
    batches = [batch(40, seed=seed) for seed in range(5)]
    for x, targets in batches:
        statistics.update(x, targets)
    assert statistics.refresh(torch.Generator().manual_seed(4))
    recent = (torch.cat([pair[k] for pair in batches])[-128:] for k in (0, 1))
    expected = fresh()
    expected.fit(*recent, torch.Generator().manual_seed(4))
    assert same(statistics, expected)


def test_a_refresh_without_enough_memory_changes_nothing():
    statistics = fresh()
    assert not statistics.refresh() and not bool(statistics.fitted)
    loaded = fresh()
    loaded.load_state_dict(fitted().state_dict())
    loaded.update(*batch(31, seed=1))
    before = copy.deepcopy(loaded)
    assert not loaded.refresh() and same(loaded, before)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 200), max_size=6))
def test_the_memory_holds_the_newest_samples_up_to_its_capacity(sizes):
    statistics, seen = fresh(), torch.zeros(0, DIM)
    for seed, n in enumerate(sizes):
        x, targets = batch(n, seed=seed)
        statistics.update(x, targets)
        seen = torch.cat([seen, x])
    if len(seen):
        assert len(statistics.memory) == min(len(seen), 128)
        if len(seen):
            kept, targets = statistics.memory.latest()
            assert torch.equal(kept, seen[-128:]) and len(targets) == len(kept)
        held = [part for kept in statistics.memory.batches for part in kept]
        assert sum(part.untyped_storage().nbytes() for part in held) <= 2 * 128 * (DIM + CLASSES) * 4


# -------------------------------------------------------------------------------------------------- bound and direction


def test_the_bound_falls_along_the_step_and_sends_gradient_to_the_descriptor_only():
    statistics, (x, targets) = fitted(), batch(50, seed=2)
    x.requires_grad_()
    soft = targets.clone().requires_grad_()
    statistics.bound(x, soft).backward()
    assert x.grad.abs().max() > 0 and soft.grad is None
    assert statistics.bound(x - 0.1 * x.grad, targets) < statistics.bound(x, targets)


def test_the_bound_at_labels_equal_to_pi_has_the_step_as_its_gradient():
    statistics, x = fitted(), batch(20, seed=2)[0].requires_grad_()
    p_y = statistics._read()[3]
    pi = (ib.log_assign(x, statistics.centroids, statistics.beta).exp() @ p_y).detach()
    (gradient,) = torch.autograd.grad(len(x) * statistics.bound(x, pi), x)
    torch.testing.assert_close(statistics.step_direction(x), gradient, atol=1e-4, rtol=1e-3)


def test_a_class_that_was_never_seen_has_a_finite_bound():
    statistics, (x, _) = fresh(), batch(64)
    statistics.update(x, ib.soft_targets(torch.zeros(64, dtype=torch.long), CLASSES))
    unseen = ib.soft_targets(torch.full((64,), 2), CLASSES)
    assert statistics.bound(x, unseen) < 20


def test_an_update_or_refresh_between_forward_and_backward_is_safe():
    statistics, (x, targets) = fitted(), batch(16, seed=1)
    gradients = []
    for disturb in (False, True):
        leaf = x.clone().requires_grad_()
        loss = statistics.bound(leaf, targets) + statistics.step_direction(leaf).square().sum()
        if disturb:
            statistics.update(x, targets)
            statistics.refresh()
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_autocast_changes_nothing():
    statistics, (x, targets) = fitted(), batch(16, seed=1)
    under = copy.deepcopy(statistics)
    expected = statistics.bound(x, targets), statistics.step_direction(x)
    statistics.update(x, targets)
    statistics.refresh()
    with torch.autocast("cpu", torch.bfloat16):
        given_ = under.bound(x, targets), under.step_direction(x)
        under.update(x, targets)
        under.refresh()
    assert torch.equal(given_[0], expected[0]) and torch.equal(given_[1], expected[1])
    assert same(statistics, under)


def test_the_graph_does_not_change_with_training():
    x = batch(4)[0]
    graphs = []
    with torch.no_grad():
        for statistics in (fresh(), fitted()):

            class Step(torch.nn.Module):
                def __init__(self, statistics: Statistics) -> None:
                    super().__init__()
                    self.statistics = statistics

                def forward(self, x: Tensor) -> Tensor:
                    return self.statistics.step_direction(x)

            program = torch.export.export(Step(statistics), (x,))
            torch.testing.assert_close(program.module()(x), statistics.step_direction(x))
            graphs.append([str(node.target) for node in program.graph.nodes])
    assert graphs[0] == graphs[1]
    assert not any("item" in name or "autocast" in name or "cond" in name for name in graphs[0])


# ------------------------------------------------------------------------------------------ copies, casts, checkpoints


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_equal_independent_and_remember(duplicate):
    statistics = fitted()
    other = duplicate(statistics)
    assert same(statistics, other)
    assert other.refresh()
    other.update(*batch(32, seed=8))
    assert not same(statistics, other)


def test_a_state_dict_holds_the_buffers_and_nothing_else():
    statistics, other = fitted(), fresh()
    state = statistics.state_dict()
    assert set(state) == set(BUFFERS)
    other.load_state_dict(state)
    x, targets = batch(9, seed=3)
    assert same(statistics, other)
    assert torch.equal(statistics.bound(x, targets), other.bound(x, targets))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.double(),
        lambda m: m.half().float(),
    ],
)
def test_casting_a_model_keeps_the_buffers_in_float32_to_the_last_digit(cast):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), fitted())
    before = copy.deepcopy(model[1])
    cast(model)
    assert all(getattr(model[1], name).dtype == torch.float32 for name in BUFFERS)
    assert same(model[1], before)
    model[1].update(*batch(8))
    assert model[1].step_direction(batch(2)[0].half()).dtype == torch.float32


def test_buffers_are_float32_under_another_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        statistics = fresh()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(getattr(statistics, name).dtype == torch.float32 for name in BUFFERS)


def test_moving_from_the_meta_device_works():
    with torch.device("meta"):
        statistics = fresh()
    statistics.half().to_empty(device="cpu")
    statistics.load_state_dict(fitted().state_dict())
    assert same(statistics, fitted())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"clusters": 1}, "clusters"), ({"classes": 0}, "classes"), ({"decay": 1.0}, "decay"),
        ({"perplexity": 1.0}, "perplexity"), ({"gamma": -1.0}, "gamma"), ({"gamma": math.nan}, "gamma"),
        ({"capacity": 31}, "capacity must be at least 4 samples for each of 8 clusters, 32, got 31"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(options, name):
    with pytest.raises(RecipeError, match=name):
        Statistics(**{"dim": DIM, "classes": CLASSES, "clusters": CLUSTERS} | options)


def test_shapes_that_do_not_fit_are_refused():
    x, targets = batch(4)
    for bad in ((x[:, 1:], targets), (x, targets[:, 1:]), (x[1:], targets), (x, torch.zeros(4))):
        with pytest.raises(DataError, match="soft_targets makes soft labels"):
            fresh().update(*bad)


def test_small_batches_are_learned_from_together():
    one, several = fitted(), fitted()
    x, targets = batch(48, seed=3)
    one.update(x, targets)
    for part in range(3):
        assert torch.equal(several.counts, fitted().counts)
        several.update(x[16 * part : 16 * part + 16], targets[16 * part : 16 * part + 16], together=48)
    assert same(one, several) and one.memory.fresh == several.memory.fresh == 0
