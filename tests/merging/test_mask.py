"""Masks: the formulas of docs/method.md, "The mask module", computed naively, and what holds for every mask."""

from __future__ import annotations

import pytest
import torch
from pieces import double_inputs
from torch import Tensor
from torch.nn import functional as F

from ltm_retrofit.errors import CountError
from ltm_retrofit.merging.ib import soft_targets
from ltm_retrofit.merging.mask import TEMPERATURE, MaskModule, descend
from ltm_retrofit.merging.methods import Keys, Place, get_method
from ltm_retrofit.merging.pool import PoolMask
from ltm_retrofit.merging.rounds import join, leaving_in
from ltm_retrofit.merging.slice import SliceMask
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import (
    Carried,
    HardAssignment,
    Mask,
    Merged,
    accumulated,
    carried_by,
    carry,
    unmerge_all,
)
from ltm_retrofit.merging.tome import ToMeMask

torch.set_num_threads(1)
DIM, KEY, CLASSES, CLUSTERS, BATCH = 10, 4, 3, 6, 2
#: (N, P, prefix): no prefix, class token, distillation token, registers; one round and several; beyond half
COUNTS = [
    pytest.param(12, 9, 0, id="no-prefix"),
    pytest.param(13, 6, 0, id="odd-count"),
    pytest.param(17, 12, 1, id="class-token"),
    pytest.param(17, 9, 1, id="class-token-half"),
    pytest.param(18, 13, 2, id="distillation-token"),
    pytest.param(21, 16, 5, id="registers"),
    pytest.param(17, 6, 1, id="beyond-half"),
    pytest.param(26, 8, 5, id="registers-beyond-half"),
    pytest.param(17, 2, 1, id="one-patch-left"),
    pytest.param(9, 9, 1, id="nothing-merged"),
]
KEYS = Keys(torch.linspace(-1, 1, KEY * DIM, dtype=torch.float64).view(KEY, DIM).sin())


def make(n: int, p: int, prefix: int, *, step: bool = True, fit: bool = False, eta: float = 0.0) -> MaskModule:
    """A learnable mask in eval mode, its channel weights away from their start."""
    generator = torch.Generator().manual_seed(0)
    mask = MaskModule(DIM, n, p, prefix, 3, Statistics(DIM, CLASSES, CLUSTERS) if step else None).double().eval()
    with torch.no_grad():
        mask.weight.add_(0.3 * torch.randn(DIM, generator=generator, dtype=torch.float64))
        if step:
            mask.eta.fill_(eta)
    if fit:
        labels = torch.arange(48) % CLASSES
        mask.statistics.fit(torch.randn(48, DIM, generator=generator) + labels[:, None], soft_targets(labels, CLASSES))
    return mask


def run(n: int, p: int, prefix: int, **options) -> tuple[MaskModule, Tensor, Tensor, Merged]:
    mask = make(n, p, prefix, **options)
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    assert sizes is not None
    return mask, tokens, sizes, mask(inner, tokens, sizes)


# ---------------------------------------------------------------------------------------------------------- formulas


def naive(mask: MaskModule, tokens: Tensor, sizes: Tensor, dense: Tensor) -> dict[str, Tensor]:
    """The formulas of docs/method.md with dense W (B, N, P), a loop over nothing, nothing factored."""
    prefix = mask.prefix

    def columns(epsilon: Tensor) -> Tensor:
        unnormalised = (sizes * epsilon.exp())[..., None] * dense
        return unnormalised / unnormalised.sum(dim=1, keepdim=True)

    v = F.layer_norm(tokens, (DIM,))
    epsilon, descriptor = torch.zeros_like(sizes), None
    if mask.statistics is not None:
        uniform = columns(epsilon)
        descriptor = torch.einsum("bjp,bjd->bpd", uniform, v)[:, prefix:].mean(dim=1)
        direction = mask.statistics.step_direction(descriptor).double()
        zeta = torch.einsum("bjd,bd->bj", v, direction)[:, prefix:]
        away = zeta - zeta.mean(dim=1, keepdim=True)
        epsilon[:, prefix:] = -mask.eta * away / (away.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()
    mean = torch.einsum("bjp,bjd->bpd", columns(epsilon), tokens)
    length = torch.einsum("bjp,bj->bp", columns(epsilon), tokens.norm(dim=-1))
    return {
        "descriptor": descriptor,
        "epsilon": epsilon,
        "G": columns(epsilon),
        "tokens": mean * (length / mean.norm(dim=-1)).unsqueeze(-1),
        "sizes": torch.einsum("bjp,bj->bp", dense, sizes),
    }


@pytest.mark.parametrize("n, p, prefix", COUNTS)
@pytest.mark.parametrize("eta", [None, 0.0, 0.7], ids=["no-step", "eta-0", "eta-0.7"])
def test_the_mask_equals_the_dense_formulas(n, p, prefix, eta):
    mask, tokens, sizes, merged = run(n, p, prefix, step=eta is not None, fit=eta is not None, eta=eta or 0.0)
    with torch.no_grad():
        want = naive(mask, tokens, sizes, merged.merge.assignment.dense().double())
    torch.testing.assert_close(want["G"].sum(dim=1), torch.ones(BATCH, p).double())
    if eta is None:
        assert merged.merge.descriptor is None
    else:
        torch.testing.assert_close(merged.merge.descriptor.detach(), want["descriptor"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(merged.sizes.detach(), want["sizes"], rtol=1e-12, atol=1e-12)
    # variance ε inside the layer norm and float32 statistics bound the agreement
    torch.testing.assert_close(merged.tokens.detach(), want["tokens"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_who_joins_whom_is_the_matching_of_weighed_patches(n, p, prefix):
    mask, tokens, sizes, merged = run(n, p, prefix, step=False)
    groups = join((tokens * mask.weight)[:, prefix:].detach(), sizes[:, prefix:], leaving_in(n, p, 3, prefix))
    assignment = merged.merge.assignment
    assert torch.equal(assignment.of[:, prefix:] - prefix, groups.of)
    assert torch.equal(assignment.kept[:, prefix:] - prefix, groups.first)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_a_group_of_one_token_is_that_token_to_the_last_bit(n, p, prefix):
    _, tokens, _, merged = run(n, p, prefix, step=False)
    of, first = merged.merge.assignment
    for image in range(BATCH):
        counts = of[image].bincount(minlength=p)
        alone = (counts == 1).nonzero().flatten()
        assert torch.equal(merged.tokens[image, alone], tokens[image, first[image, alone]])
        assert len(alone) or p < n


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_epsilon_is_the_standardised_step_down_the_bound(n, p, prefix):
    mask, tokens, sizes, merged = run(n, p, prefix, fit=True, eta=0.7)
    dense = merged.merge.assignment.dense().double()
    with torch.no_grad():
        want = naive(mask, tokens, sizes, dense)
        columns = sizes[..., None] * dense
        share = (columns / columns.sum(dim=1, keepdim=True)).sum(dim=2)[:, prefix:]  # Σ_p G⁰_jp
        _, epsilon = descend(tokens[:, prefix:], share / (p - prefix), mask.statistics, mask.eta)
    torch.testing.assert_close(epsilon, want["epsilon"][:, prefix:], rtol=1e-5, atol=1e-5)
    assert want["epsilon"][:, prefix:].std() > 0.3
    assert bool((want["epsilon"][:, :prefix] == 0).all())


# -------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("n, p, prefix", COUNTS)
@pytest.mark.parametrize("kind", ["ltm", "tome"])
def test_assignment_rows_sum_to_one_sizes_are_conserved_and_prefix_tokens_stay(n, p, prefix, kind):
    mask = ToMeMask(DIM, n, p, prefix) if kind == "tome" else make(n, p, prefix, fit=True, eta=0.7)
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    merged = mask(inner, tokens, sizes, KEYS)
    dense = merged.merge.assignment.dense().double()
    assert dense.shape == (BATCH, n, p) and bool((dense >= 0).all())
    torch.testing.assert_close(dense.sum(dim=2), torch.ones(BATCH, n).double())
    torch.testing.assert_close(merged.sizes.sum(dim=1), sizes.sum(dim=1))
    torch.testing.assert_close(torch.einsum("bnp,bn->bp", dense, sizes), merged.sizes)
    assert merged.tokens.shape == (BATCH, p, DIM) and merged.sizes.shape == (BATCH, p)
    assert torch.equal(merged.tokens[:, :prefix], tokens[:, :prefix])
    assert torch.equal(merged.sizes[:, :prefix], sizes[:, :prefix])
    assert torch.equal(dense[:, :prefix, :prefix], torch.eye(prefix).double().expand(BATCH, -1, -1))
    if kind == "tome":  # Σ s z is conserved too, where ε is zero
        torch.testing.assert_close(
            (merged.tokens * merged.sizes[..., None]).sum(dim=1), (tokens * sizes[..., None]).sum(dim=1)
        )


@pytest.mark.parametrize("n, p, prefix", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_a_constant_survives_merging_and_unmerging(n, p, prefix, eta):
    mask = make(n, p, prefix, fit=True, eta=eta)
    inner, _, sizes = double_inputs(n, DIM, 3, sized=True)
    constant = torch.linspace(-2, 3, DIM, dtype=torch.float64).expand(BATCH, n, DIM).contiguous()
    merged = mask(inner, constant, sizes)
    torch.testing.assert_close(merged.tokens, constant[:, :p])
    torch.testing.assert_close(merged.merge.assignment.unmerge(merged.tokens), constant)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_unmerge_is_the_dense_product_and_kept_tokens_come_back_in_place(n, p, prefix):
    _, _, _, merged = run(n, p, prefix)
    assignment = merged.merge.assignment
    back = assignment.unmerge(merged.tokens)
    torch.testing.assert_close(back, assignment.dense().double() @ merged.tokens)
    places = assignment.kept[..., None].expand(-1, -1, DIM)
    assert torch.equal(back.gather(1, places), merged.tokens)


def test_nothing_merged_is_a_permutation():
    _, tokens, sizes, merged = run(9, 9, 1, fit=True, eta=0.7)
    torch.testing.assert_close(merged.merge.assignment.unmerge(merged.tokens), tokens)
    assert torch.equal(merged.sizes.sort().values, sizes.sort().values)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_before_anything_is_fitted_the_step_is_exactly_nothing(n, p, prefix):
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    still, moving = make(n, p, prefix), make(n, p, prefix, eta=3.0)
    assert torch.equal(still(inner, tokens, sizes).tokens, moving(inner, tokens, sizes).tokens)


def test_with_fitted_statistics_the_step_changes_tokens_but_never_sizes_or_assignment():
    inner, tokens, sizes = double_inputs(17, DIM, 3, sized=True)
    still = make(17, 12, 1, fit=True)(inner, tokens, sizes)
    moved = make(17, 12, 1, fit=True, eta=0.5)(inner, tokens, sizes)
    assert not torch.allclose(still.tokens, moved.tokens, atol=1e-3)
    assert torch.equal(still.sizes, moved.sizes)
    assert torch.equal(still.merge.assignment.of, moved.merge.assignment.of)
    assert torch.equal(still.merge.descriptor, moved.merge.descriptor)


def test_sizes_left_out_are_ones():
    mask = make(17, 12, 1, fit=True, eta=0.5)
    inner, tokens, _ = double_inputs(17, DIM, 3, sized=False)
    given_ones = mask(inner, tokens, torch.ones(BATCH, 17).double())
    assert torch.equal(mask(inner, tokens, None).tokens, given_ones.tokens)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_each_image_is_merged_by_itself(n, p, prefix):
    mask = make(n, p, prefix, fit=True, eta=0.5)
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    together = mask(inner, tokens, sizes)
    alone = mask(inner[1:], tokens[1:], sizes[1:])
    torch.testing.assert_close(together.tokens[1:], alone.tokens)


# --------------------------------------------------------------------------------------------------------- gradients


def test_every_parameter_learns_from_the_merged_tokens_in_training_mode():
    mask = make(17, 12, 1, fit=True, eta=0.1).train()
    inner, tokens, sizes = double_inputs(17, DIM, 3, sized=True)
    merged = mask(inner, tokens, sizes)
    generator = torch.Generator().manual_seed(1)
    (merged.tokens * torch.randn(merged.tokens.shape, generator=generator)).sum().backward()
    named = dict(mask.named_parameters())
    assert set(named) == {"weight", "eta"}
    for name, parameter in named.items():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-8, name


def test_equal_tokens_teach_nothing_and_stay_what_they_are():
    mask = make(17, 9, 1, step=False).train()
    flat = torch.ones(BATCH, 17, DIM).double()
    merged = mask(flat, flat, None)
    merged.tokens.square().sum().backward()
    torch.testing.assert_close(merged.tokens, flat[:, :9])
    assert bool(torch.isfinite(mask.weight.grad).all())


def test_training_mode_computes_the_same_tokens():
    mask = make(17, 12, 1, step=False)
    inner, tokens, sizes = double_inputs(17, DIM, 3, sized=True)
    torch.testing.assert_close(mask.train()(inner, tokens, sizes).tokens, mask.eval()(inner, tokens, sizes).tokens)


def test_weights_learn_what_a_soft_assignment_at_the_same_groups_would():
    """The gradient is that of ``Σ_j s_j W_jp z_j / s'_p`` in W at the hard choice, W a softmax of weighed distances."""
    mask = make(9, 6, 1, step=False).train()
    inner, tokens, sizes = double_inputs(9, DIM, 3, sized=True)
    out = torch.randn(BATCH, 6, DIM, generator=torch.Generator().manual_seed(1)).double()
    merged = mask(inner, tokens, sizes)
    (gradient,) = torch.autograd.grad((merged.tokens * out).sum(), mask.weight)
    z, s, means, size = tokens[:, 1:], sizes[:, 1:], merged.tokens[:, 1:].detach(), merged.sizes[:, 1:]

    def spread(weight: Tensor) -> Tensor:
        cost = ((z.unsqueeze(2) - means.unsqueeze(1)) * weight).square().sum(dim=-1)
        return torch.softmax(-cost / (TEMPERATURE * scale), dim=-1)

    weight = mask.weight.detach()
    scale = ((z.unsqueeze(2) - means.unsqueeze(1)) * weight).square().sum(dim=-1).mean(dim=(1, 2), keepdim=True)
    along = torch.randn(DIM, generator=torch.Generator().manual_seed(2)).double()
    change = (spread(weight + 1e-5 * along) - spread(weight - 1e-5 * along)) / 2e-5  # dW along a direction
    moved = (s[..., None] * change).transpose(1, 2) @ z - (s[..., None] * change).sum(1)[..., None] * means
    want = (moved / size[..., None] * out[:, 1:]).sum()
    assert float(want) == pytest.approx(float((gradient * along).sum()), rel=1e-4)


def test_eta_gets_no_gradient_before_anything_is_fitted():
    mask, _, _, merged = run(17, 12, 1, eta=0.1)
    merged.tokens.square().sum().backward()
    assert float(mask.eta.grad) == 0


def test_the_gradient_of_eta_agrees_with_finite_differences():
    """The step direction is detached from nothing but its own deviation, which this loss does not see at η = 0."""
    mask = make(9, 6, 1, fit=True, eta=0.0)
    inner, tokens, sizes = double_inputs(9, DIM, 3, sized=True)
    weights = torch.randn(BATCH, 6, DIM, generator=torch.Generator().manual_seed(1)).double()

    def loss() -> Tensor:
        return (mask(inner, tokens, sizes).tokens * weights).sum()

    (gradient,) = torch.autograd.grad(loss(), mask.eta)
    values = []
    with torch.no_grad():
        for value in (1e-5, -1e-5):
            mask.eta.fill_(value)
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient), rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["ltm", "tome"])
def test_half_precision_goes_in_and_comes_out(dtype, kind):
    inner, tokens, sizes = (value.float() for value in double_inputs(17, DIM, 3, sized=True))
    mask = make(17, 12, 1, fit=True, eta=0.3).float()
    baseline, weight = ToMeMask(DIM, 17, 12, 1), KEYS.weight.float()
    if kind == "tome":
        exact = baseline(inner, tokens, sizes, Keys(weight))
        merged = baseline(inner.to(dtype), tokens.to(dtype), sizes, Keys(weight.to(dtype)))
    else:
        exact = mask(inner, tokens, sizes)
        merged = mask.to(dtype)(inner.to(dtype), tokens.to(dtype), sizes)
        assert mask.statistics.centroids.dtype == torch.float32
    assert merged.tokens.dtype == dtype and merged.sizes.dtype == torch.float32
    assert bool(torch.isfinite(merged.tokens).all())
    mean_error = (merged.tokens.float() - exact.tokens).detach().abs().mean() / exact.tokens.abs().mean()
    assert float(mean_error) < 0.25  # a source may have swapped


@pytest.mark.parametrize("inner_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_inside_the_mask(inner_dtype):
    inner, tokens, sizes = (value.float() for value in double_inputs(17, DIM, 3, sized=True))
    inner = inner.to(inner_dtype)
    mask = make(17, 12, 1, fit=True, eta=0.3).float()
    outside = mask(inner, tokens, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mask(inner, tokens, sizes)
    assert inside.tokens.dtype == torch.float32
    assert torch.equal(inside.tokens, outside.tokens) and torch.equal(inside.sizes, outside.sizes)


def test_bfloat16_gradients_are_finite():
    mask = make(17, 12, 1, fit=True, eta=0.3).bfloat16().train()
    inner, tokens, _ = (None if value is None else value.bfloat16() for value in double_inputs(17, DIM, 3, False))
    mask(inner, tokens, None).tokens.float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) and p.grad.dtype == torch.bfloat16 for p in mask.parameters())


# ------------------------------------------------------------------------------------------------- counts and ranges


@pytest.mark.parametrize("n, p, prefix", [(17, 1, 1), (17, 0, 1), (17, 18, 1), (9, 5, 5), (4, 0, 0), (5, -1, 0)])
@pytest.mark.parametrize("kind", [ToMeMask, MaskModule], ids=["tome", "ltm"])
def test_impossible_counts_are_refused_with_the_range(n, p, prefix, kind):
    with pytest.raises(CountError, match=f"choose {prefix + 1} to {n}"):
        kind(DIM, n, p, prefix)


@pytest.mark.parametrize("kind", ["ltm", "tome", "pool", "slice"])
@pytest.mark.parametrize("count", [16, 17, 18, 33, 65])
def test_another_count_than_planned_keeps_the_same_share(kind, count):
    """At another size a mask does what one that was planned for that size would do."""
    kept = round(count * 12 / 17) if kind == "slice" else 1 + round((count - 1) * 11 / 16)
    assert Mask(17, 12, 0 if kind == "slice" else 1).kept_at(count) == kept and (count != 17 or kept == 12)
    kinds = {
        "ltm": lambda n, p: make(n, p, 1, step=False),
        "tome": lambda n, p: ToMeMask(DIM, n, p, 1),
        "pool": lambda n, p: PoolMask(n, p, 1),
        "slice": SliceMask,
    }[kind]
    inner, tokens, _ = double_inputs(count, DIM, 0, False)
    one, other = (mask(inner, tokens, None, KEYS) for mask in (kinds(17, 12), kinds(count, kept)))
    assert one.tokens.shape == (BATCH, kept, DIM)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.sizes, other.sizes)
    assert torch.equal(one.merge.assignment.dense(), other.merge.assignment.dense())


@pytest.mark.parametrize("kind", [ToMeMask, MaskModule], ids=["tome", "ltm"])
def test_prefix_tokens_alone_are_refused(kind):
    mask = kind(DIM, 17, 12, 1)
    inner, tokens, _ = double_inputs(1, DIM, 0, False)
    with pytest.raises(CountError):
        mask(inner, tokens, None, (torch.zeros(KEY, DIM).double(), None))


def test_a_slice_keeps_the_first_tokens_and_gives_the_lost_ones_the_last():
    inner, tokens, _ = double_inputs(17, DIM, 0, False)
    merged = SliceMask(17, 12)(inner, tokens, None)
    assert torch.equal(merged.tokens, tokens[:, :12])
    back = merged.merge.assignment.unmerge(merged.tokens)
    assert torch.equal(back, torch.cat([tokens[:, :12], tokens[:, 11:12].expand(-1, 5, -1)], dim=1))
    torch.testing.assert_close(merged.merge.assignment.dense().sum(dim=2), torch.ones(BATCH, 17).double())


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_macs_of_methods_are_ordered(n, p, prefix):
    place = Place("FLOW", DIM, KEY, n, p, prefix, CLASSES, CLUSTERS)
    slice_, tome, ltm = (get_method(name).macs(place) for name in ("slice", "tome", "ltm"))
    assert slice_ == 0 < tome and (ltm > 0) == (p < n) and get_method("ltm").unmerge_macs(place) == 0
    assert get_method("slice").unmerge_macs(place) == (n - p) * DIM


# -------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_merges_compose(prefix):
    first, second = make(20 + prefix, 15 + prefix, prefix), make(15 + prefix, 6 + prefix, prefix)
    inner, tokens, _ = double_inputs(20 + prefix, DIM, 3, False)
    one = first(inner, tokens, None)
    two = second(one.tokens, one.tokens, one.sizes)
    merges = (one.merge, two.merge)
    product = (one.merge.assignment.dense() @ two.merge.assignment.dense()).double()
    torch.testing.assert_close(accumulated(merges).double(), product)
    torch.testing.assert_close(accumulated(merges[:1]), one.merge.assignment.dense())
    torch.testing.assert_close(unmerge_all(two.tokens, merges), product @ two.tokens)
    torch.testing.assert_close(product.sum(dim=1), two.sizes)  # s² = (W¹W²)ᵀ 1
    assert unmerge_all(tokens, ()) is tokens


def test_tokens_carry_what_they_are_given_and_results_do_not():
    tokens = torch.randn(1, 4, 2)
    assert carried_by(tokens) is None and carry(tokens, None) is tokens and carried_by(tokens) is None
    merged = make(4, 3, 1)
    _, x, _ = double_inputs(4, DIM, 0, False)
    sentinel = merged(x, x, None)
    carried = Carried(sentinel.sizes, (sentinel.merge,))
    assert carry(tokens, carried) is tokens and carried_by(tokens) is carried
    assert carried_by(tokens + 0) is None


def test_unmerging_keeps_the_dtype_of_its_tokens():
    _, _, _, merged = run(17, 12, 1)
    assignment: HardAssignment = merged.merge.assignment
    assert assignment.unmerge(merged.tokens.bfloat16()).dtype == torch.bfloat16
