"""The bounds on random instances, in float64, hard and soft labels alike; the gradient; the fit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ltm_retrofit.errors import DataError, RecipeError
from ltm_retrofit.merging import ib

torch.set_num_threads(1)
quick = settings(deadline=None, max_examples=40)
CLOSE = 1e-9


def simplex(*shape: int, generator: torch.Generator, sharp: float) -> Tensor:
    return torch.softmax(sharp * torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


@st.composite
def instances(draw) -> SimpleNamespace:
    """Images, their assignments on both sides, and labels; ``free_q`` and ``free_p`` are any conditionals at all."""
    n, a, b, c = (draw(st.integers(low, high)) for low, high in ((1, 30), (2, 7), (1, 7), (1, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sharp = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    soft = draw(st.booleans())
    phi, phi_x = (simplex(n, k, generator=generator, sharp=sharp) for k in (a, b))
    if soft:
        targets = simplex(n, c, generator=generator, sharp=2.0)
    else:
        targets = ib.soft_targets(torch.randint(c, (n,), generator=generator), c).double()
    counts = phi.t() @ targets
    return SimpleNamespace(
        n=n, phi=phi, phi_x=phi_x, targets=targets, counts=counts, soft=soft, sharp=sharp,
        log_phi=phi.log(), log_phi_x=phi_x.log(), h_b=ib.entropy(phi_x.mean(0)), h_y=ib.entropy(targets.mean(0)),
        q=ib.q_given_y(counts, 0.0), p_y=ib.p_y_given_a(counts, 0.0),
        free_q=simplex(c, a, generator=generator, sharp=sharp).t(),
        free_p=simplex(a, c, generator=generator, sharp=sharp),
        gamma=draw(st.sampled_from([0.0, 0.3, 1.0, 4.0])),
    )  # fmt: skip


def mutual_information_with_index(phi: Tensor) -> Tensor:
    """I(a;i) of uniformly drawn images."""
    return ib.entropy(phi.mean(0)) - ib.entropy(phi).mean()


# --------------------------------------------------------------------------------------------------------- the bounds


@quick
@given(instances())
def test_ib_is_below_ceb_is_below_the_papers_bound(case):
    bottleneck = ib.information_bottleneck(case.phi, case.phi_x, case.targets)
    ceb = ib.ceb(case.log_phi, case.q, case.targets)
    paper = ib.ibb(case.log_phi, case.log_phi_x, case.q, case.targets) + case.h_b
    assert bottleneck <= ceb + CLOSE
    assert ceb <= paper + CLOSE


@quick
@given(instances())
def test_the_bounds_hold_for_any_q_that_is_a_distribution(case):
    bottleneck = ib.information_bottleneck(case.phi, case.phi_x, case.targets)
    ceb = ib.ceb(case.log_phi, case.free_q, case.targets)
    paper = ib.ibb(case.log_phi, case.log_phi_x, case.free_q, case.targets) + case.h_b
    assert bottleneck <= ceb + CLOSE <= paper + 2 * CLOSE


def test_a_positive_q_that_is_no_distribution_breaks_the_bounds():
    phi, targets = torch.full((4, 2), 0.5), torch.ones(4, 1)
    q = torch.full((2, 1), 3.0)
    assert ib.ceb(phi.log(), q, targets) < 0 == ib.information_bottleneck(phi, phi, targets)


@quick
@given(instances())
def test_the_gap_to_the_papers_bound_is_entropy_plus_information_on_the_input(case):
    gap = ib.entropy(case.phi).mean() + mutual_information_with_index(case.phi_x)
    for q in (case.q, case.free_q):
        paper = ib.ibb(case.log_phi, case.log_phi_x, q, case.targets) + case.h_b
        torch.testing.assert_close(ib.ceb(case.log_phi, q, case.targets), paper - gap, atol=CLOSE, rtol=CLOSE)


@quick
@given(instances())
def test_the_tight_ceb_is_the_information_on_the_image_that_the_class_does_not_have(case):
    expected = mutual_information_with_index(case.phi) - ib.mutual_information(case.counts / case.n)
    torch.testing.assert_close(ib.ceb(case.log_phi, case.q, case.targets), expected, atol=CLOSE, rtol=CLOSE)


@quick
@given(instances())
def test_ceb_is_tight_at_the_conditional_of_the_counts_and_never_negative(case):
    tight = ib.ceb(case.log_phi, case.q, case.targets)
    assert -CLOSE <= tight <= ib.ceb(case.log_phi, case.free_q, case.targets) + CLOSE
    one = ib.ceb(case.log_phi, case.q, case.targets, case.p_y, case.gamma)
    other = ib.ceb(case.log_phi, case.free_q, case.targets, case.free_p, case.gamma)
    assert -CLOSE <= one <= other + CLOSE


@quick
@given(instances())
def test_ceb_gamma_bounds_information_weighted_for_the_class(case):
    with_class = ib.mutual_information(case.counts / case.n)
    left = ib.information_bottleneck(case.phi, case.phi_x, case.targets) - case.gamma * with_class
    for q, p in ((case.q, case.p_y), (case.free_q, case.free_p)):
        assert left <= ib.ceb(case.log_phi, q, case.targets, p, case.gamma) - case.gamma * case.h_y + CLOSE


@quick
@given(instances())
def test_ceb_is_the_label_weighted_mean_divergence_from_q(case):
    divergence = (case.phi.unsqueeze(2) * (case.log_phi.unsqueeze(2) - case.free_q.log())).sum(1)  # (n, C)
    expected = (divergence * case.targets).sum(1).mean()
    torch.testing.assert_close(ib.ceb(case.log_phi, case.free_q, case.targets), expected, atol=CLOSE, rtol=CLOSE)


def test_one_cluster_for_everything_is_optimal_for_ceb_and_pure_subclusters_cost_their_logarithm():
    y = torch.arange(5).repeat(60)
    targets = ib.soft_targets(y, 5).double()
    parts = torch.arange(300) // 5 % 10

    def cost(index: Tensor, gamma: float = 0.0) -> float:
        phi = torch.nn.functional.one_hot(index).double()
        counts = phi.t() @ targets
        return float(ib.ceb(phi.log(), ib.q_given_y(counts, 0.0), targets, ib.p_y_given_a(counts, 0.0), gamma))

    assert cost(torch.zeros_like(y)) == pytest.approx(0, abs=1e-9)
    assert cost(y) == pytest.approx(0, abs=1e-9)
    assert cost(10 * y + parts) == pytest.approx(math.log(10))
    assert cost(torch.zeros_like(y), gamma=1.0) == pytest.approx(math.log(5))
    assert cost(y, gamma=1.0) == pytest.approx(0, abs=1e-9)


def test_one_cluster_is_not_optimal_for_ib_itself_where_the_input_clusters_miss_the_class():
    targets = phi = torch.eye(4, dtype=torch.float64)
    blind = torch.ones(4, 1, dtype=torch.float64)
    assert ib.information_bottleneck(blind, blind, targets) == pytest.approx(0, abs=1e-9)
    assert float(ib.information_bottleneck(phi, blind, targets)) == pytest.approx(-math.log(4))


def test_soft_labels_make_even_perfect_clusters_cost():
    phi = torch.eye(2, dtype=torch.float64).repeat(10, 1)
    soft = 0.8 * phi + 0.1
    assert ib.ceb(phi.log(), ib.q_given_y(phi.t() @ soft, 0.0), soft) > 0.3


# ------------------------------------------------------------------------------------------- conditionals and entropies


@quick
@given(instances(), st.sampled_from([0.0, 0.5, 1.0]))
def test_conditionals_are_the_formulas_and_distributions(case, alpha):
    counts, n = case.counts, case.counts.sum()
    n_a, n_y = counts.sum(1, keepdim=True), counts.sum(0, keepdim=True)
    q, p = ib.q_given_y(counts, alpha), ib.p_y_given_a(counts, alpha)
    torch.testing.assert_close(q.sum(0), torch.ones_like(q[0]))
    torch.testing.assert_close(p.sum(1), torch.ones_like(p[:, 0]))
    seen = n_y.squeeze(0) > 0
    expected = (counts + alpha * n_a / n) / (n_y + alpha)
    torch.testing.assert_close(q[:, seen], expected[:, seen])
    torch.testing.assert_close(p, (counts + alpha * n_y / n) / (n_a + alpha))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_no_counts_at_all_give_uniform_conditionals(alpha):
    counts = torch.zeros(4, 5)
    assert torch.equal(ib.q_given_y(counts, alpha), torch.full((4, 5), 1 / 4))
    assert torch.equal(ib.p_y_given_a(counts, alpha), torch.full((4, 5), 1 / 5))


def test_information_of_known_distributions():
    torch.testing.assert_close(ib.entropy(torch.full((3, 8), 1 / 8)), torch.full((3,), math.log(8)))
    assert float(ib.mutual_information(torch.eye(4) / 4)) == pytest.approx(math.log(4))
    assert float(ib.mutual_information(torch.full((3, 5), 1 / 15))) == pytest.approx(0, abs=1e-6)


def test_exact_zeros_leave_value_and_gradient_finite():
    log_phi = torch.tensor([[0.0, -math.inf], [math.log(0.5)] * 2], requires_grad=True)
    counts = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value = ib.ceb(log_phi, ib.q_given_y(counts, 0.0), targets, ib.p_y_given_a(counts, 0.0), 1.0)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(log_phi.grad).all()


def test_ceb_gamma_without_p_y_is_refused():
    with pytest.raises(RecipeError, match="p_y is None"):
        ib.ceb(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), gamma=1.0)


# ----------------------------------------------------------------------------------------- assignments and the gradient


@quick
@given(st.integers(0, 2**31), st.floats(0.01, 10))
def test_log_assign_is_the_softmax_of_squared_distances(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    x, centroids = (torch.randn(k, 4, generator=generator, dtype=torch.float64) for k in (6, 5))
    expected = torch.log_softmax(-beta * torch.cdist(x, centroids).square(), dim=-1)
    torch.testing.assert_close(ib.log_assign(x, centroids, beta), expected)


@quick
@given(st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 2.5]), st.floats(0.05, 3))
def test_the_closed_form_is_the_gradient_autograd_finds_with_pi_held_fixed(seed, gamma, beta):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    centroids = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    counts = 10 * simplex(5, 3, generator=generator, sharp=1.0)
    q, p_y = ib.q_given_y(counts), ib.p_y_given_a(counts)
    log_phi = ib.log_assign(x, centroids, beta)
    pi = (log_phi.exp() @ p_y).detach()
    (expected,) = torch.autograd.grad(len(x) * ib.ceb(log_phi, q, pi, p_y, gamma), x)
    given_ = ib.bound_gradient(x, centroids, beta, q.log(), p_y.log(), gamma)
    torch.testing.assert_close(given_, expected)
    assert given_.requires_grad  # constant in pi only


def test_pi_passes_no_gradient():
    generator = torch.Generator().manual_seed(0)
    x, centroids = (torch.randn(k, 3, generator=generator, dtype=torch.float64) for k in (1, 4))
    log_q, log_p = (simplex(4, 2, generator=generator, sharp=1.0).log() for _ in range(2))
    x.requires_grad_()
    pi = (ib.log_assign(x, centroids, 1.0).exp() @ log_p.exp()).detach()

    def fixed(x: Tensor) -> Tensor:
        log_phi = ib.log_assign(x, centroids, 1.0)
        u = log_phi - pi @ (log_q + log_p).t()
        return 2 * (log_phi.exp() * (u - (log_phi.exp() * u).sum(1, keepdim=True))) @ centroids

    (one,) = torch.autograd.grad(ib.bound_gradient(x, centroids, 1.0, log_q, log_p, 1.0).sum(), x)
    (other,) = torch.autograd.grad(fixed(x).sum(), x)
    torch.testing.assert_close(one, other)


def test_the_gradient_costs_what_the_method_says():
    from torch.utils.flop_counter import FlopCounterMode

    n, d, a, c = 3, 16, 8, 5
    with FlopCounterMode(display=False) as counter:
        ib.bound_gradient(torch.randn(n, d), torch.randn(a, d), 1.0, torch.zeros(a, c), torch.zeros(a, c), 1.0)
    assert counter.get_total_flops() == 2 * n * (2 * a * d + 2 * a * c)


def test_autocast_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x, centroids = torch.randn(20, 8, generator=generator), torch.randn(6, 8, generator=generator)
    targets = torch.softmax(torch.randn(20, 3, generator=generator), dim=1)

    def everything() -> list[Tensor]:
        log_phi = ib.log_assign(x, centroids, 0.3)
        counts = torch.rand(6, 3, generator=torch.Generator().manual_seed(1))
        q, p = ib.q_given_y(counts), ib.p_y_given_a(counts)
        return [
            log_phi, ib.ceb(log_phi, q, targets, p, 1.0), ib.ibb(log_phi, log_phi, q, targets),
            ib.information_bottleneck(log_phi.exp(), log_phi.exp(), targets),
            ib.bound_gradient(x, centroids, 0.3, q.log(), p.log(), 1.0),
            ib.kmeans(x, 4, generator=torch.Generator().manual_seed(0)), ib.beta_for_perplexity(x, centroids, 2.0),
        ]  # fmt: skip

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        under = everything()
    for one, other in zip(plain, under, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_lifted(dtype):
    x, centroids = torch.randn(4, 3).to(dtype), torch.randn(5, 3)
    assert torch.equal(ib.log_assign(x, centroids, 1.0), ib.log_assign(x.float(), centroids, 1.0))


def test_exported_graphs_hold_no_autocast():
    class Direction(torch.nn.Module):
        def forward(self, x: Tensor, centroids: Tensor, logs: Tensor) -> Tensor:
            return ib.bound_gradient(x, centroids, 1.0, logs, logs, 1.0)

    arguments = torch.randn(2, 3), torch.randn(4, 3), torch.zeros(4, 5)
    program = torch.export.export(Direction(), arguments)
    assert "autocast" not in str(program.graph)
    torch.testing.assert_close(program.module()(*arguments), Direction()(*arguments))


# ------------------------------------------------------------------------------------------------------------- labels


def test_class_indices_become_one_hot_rows():
    assert ib.soft_targets(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_soft_labels_keep_their_values_and_their_double_precision():
    soft = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    assert torch.equal(ib.soft_targets(soft, 2), soft)
    assert ib.soft_targets(soft.half(), 2).dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "from 0 to 3; expected class indices .* from 0 to 2"),
        (torch.tensor([-100, 1]), "from -100 to 1"),
        (torch.tensor([0.0, 1.0]), "dtype torch.float32"),
        (torch.tensor([True, False]), "dtype torch.bool"),
        (torch.full((2, 4), 0.25), r"shape \(2, 4\)"),
        (torch.tensor([[-0.5, 1.5, 0.0]]), "negative or non-finite"),
        (torch.tensor([[math.nan, 0.5, 0.5]]), "negative or non-finite"),
        (torch.tensor([[1.0, 1.0, 0.0]]), "sums to 2"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        ib.soft_targets(labels, 3)


# ----------------------------------------------------------------------------------------------------------- the fit


def blobs(clusters: int, each: int = 20, noise: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(clusters, 6, generator=generator, dtype=torch.float64)
    noise_ = noise * torch.randn(clusters * each, 6, generator=generator, dtype=torch.float64)
    return centres.repeat_interleave(each, 0) + noise_, centres


def fit(x: Tensor, k: int, seed: int = 0) -> Tensor:
    return ib.kmeans(x, k, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31))
def test_kmeans_recovers_separated_clusters(seed):
    x, centres = blobs(5, seed=seed % 7)
    distance = torch.cdist(centres, fit(x, 5, seed))
    assert distance.amin(1).max() < 0.1 and len(set(distance.argmin(1).tolist())) == 5


def test_kmeans_is_deterministic_for_a_seed_and_leaves_the_global_generator_alone():
    x, _ = blobs(4, noise=5.0)
    before = torch.get_rng_state()
    assert torch.equal(fit(x, 9), fit(x, 9))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(fit(x, 9), fit(x, 9, seed=1))


def test_kmeans_far_from_the_origin_loses_nothing():
    x, centres = blobs(4, noise=0.01)
    shifted = fit((x / 20 + 1e4).float(), 4)
    assert torch.cdist(centres / 20 + 1e4, shifted.double()).amin(1).max() < 0.1


def test_an_empty_cluster_moves_to_the_point_farthest_from_its_centroid():
    x = torch.tensor([[0.0], [0.2], [10.0]])
    moved = ib.lloyd_step(x, torch.tensor([[1.0], [500.0], [-500.0]]))
    assert moved[1].tolist() == [10.0] and moved[2].item() == 0.0


@quick
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_every_cluster_has_points_where_there_are_enough_distinct_ones(seed, k):
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert len(torch.cdist(x, fit(x, k, seed)).argmin(1).unique()) == k


@pytest.mark.parametrize("x", [torch.zeros(1, 3), torch.ones(9, 3), torch.eye(3).repeat(4, 1)])
def test_kmeans_works_with_fewer_distinct_points_than_clusters(x):
    centroids = fit(x, 8)
    assert torch.isfinite(centroids).all() and centroids.shape == (8, 3)
    assert torch.cdist(x, centroids).amin(1).max() < 1e-6


def test_kmeans_of_nothing_is_refused():
    with pytest.raises(DataError, match=r"\(0, 3\)"):
        fit(torch.zeros(0, 3), 2)


@quick
@given(st.integers(0, 2**31), st.floats(1.05, 9.0), st.sampled_from([1e-3, 1.0, 1e3]))
def test_beta_hits_the_median_perplexity_at_any_scale(seed, target, scale):
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(51, 4, generator=generator, dtype=torch.float64)
    centroids = scale * torch.randn(10, 4, generator=generator, dtype=torch.float64)
    beta = ib.beta_for_perplexity(x, centroids, target)
    perplexity = ib.entropy(ib.log_assign(x, centroids, beta).exp()).exp().median()
    assert float(perplexity) == pytest.approx(target, rel=1e-6)


def test_beta_stays_finite_where_centroids_coincide():
    x, centroids = torch.randn(10, 3), torch.ones(4, 3)
    assert torch.isfinite(ib.beta_for_perplexity(x, centroids, 2.0))
    centroids[0] = 0
    assert torch.isfinite(ib.beta_for_perplexity(x, centroids, 1.5))


@pytest.mark.parametrize("target", [1.0, 4.0, 9.0, math.nan])
def test_a_perplexity_that_cannot_be_is_refused(target):
    with pytest.raises(RecipeError, match="perplexity"):
        ib.beta_for_perplexity(torch.zeros(2, 3), torch.zeros(4, 3), target)
