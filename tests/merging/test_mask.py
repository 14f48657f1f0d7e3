"""Masks: equality with published ToMe, and the formulas of docs/method.md, "The mask module", computed naively."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ltm_retrofit.errors import CountError
from ltm_retrofit.merging.ib import soft_targets
from ltm_retrofit.merging.mask import MaskModule, descend
from ltm_retrofit.merging.matching import partition, split
from ltm_retrofit.merging.methods import Place, get_method
from ltm_retrofit.merging.pool import PoolMask
from ltm_retrofit.merging.slice import SliceMask
from ltm_retrofit.merging.tokens import (
    Assignment,
    Carried,
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
#: (N, P, prefix): no prefix, class token, distillation token, registers; few and all sources; beyond half
COUNTS = [
    pytest.param(12, 9, 0, id="no-prefix"),
    pytest.param(13, 6, 0, id="odd-count-all-sources"),
    pytest.param(17, 12, 1, id="class-token"),
    pytest.param(17, 9, 1, id="class-token-all-sources"),
    pytest.param(18, 13, 2, id="distillation-token"),
    pytest.param(21, 16, 5, id="registers"),
    pytest.param(17, 6, 1, id="beyond-half"),
    pytest.param(26, 8, 5, id="registers-beyond-half"),
    pytest.param(17, 2, 1, id="one-patch-left"),
    pytest.param(9, 9, 1, id="nothing-merged"),
]


# ------------------------------------------------------------------------------------------- bipartite soft matching


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


def double_inputs(n: int, dim: int, seed: int, sized: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(BATCH, n, dim, generator=generator, dtype=torch.float64)
    tokens = torch.randn(BATCH, n, dim, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (BATCH, n), generator=generator).double() if sized else None
    return inner, tokens, sizes


def hard(n: int, p: int, prefix: int, dim: int, seed: int) -> MaskModule:
    """A learnable mask in the limit of temperature zero."""
    torch.manual_seed(seed)
    mask = MaskModule(dim, KEY, n, p, prefix, CLASSES, CLUSTERS).double()
    with torch.no_grad():
        mask.log_scale.fill_(math.log(1e30))
    return mask


@pytest.mark.parametrize("kind", ["tome", "hard-limit"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5], ids=["none", "class", "distillation", "registers"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_merge_equals_published_tome(prefix, kind, data):
    n = data.draw(st.integers(prefix + 2, prefix + 23), label="N")
    sources = len(range(prefix + prefix % 2, n, 2))
    r = data.draw(st.integers(0, min((n - prefix) // 2, sources)), label="r")
    dim = data.draw(st.integers(KEY, 12), label="D")
    seed = data.draw(st.integers(0, 10_000), label="seed")
    inner, tokens, sizes = double_inputs(n, dim, seed, sized=data.draw(st.booleans(), label="sizes given"))
    mask = hard(n, n - r, prefix, dim, seed)
    weight, bias = mask.key.weight.detach(), mask.key.bias.detach()
    if kind == "tome":
        merged = ToMeMask(dim, n, n - r, prefix)(inner, tokens, sizes, (weight, bias))
    else:
        merged = mask(inner, tokens, sizes)
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


# --------------------------------------------------------------------------------------------------- soft properties


def soft(n: int, p: int, prefix: int, *, fit: bool = False, eta: float = 0.0, seed: int = 0) -> MaskModule:
    torch.manual_seed(seed)
    mask = MaskModule(DIM, KEY, n, p, prefix, CLASSES, CLUSTERS).double()
    with torch.no_grad():
        mask.eta.fill_(eta)
        mask.log_scale.fill_(math.log(5.0))
    if fit:
        labels = torch.arange(48) % CLASSES
        mask.statistics.fit(torch.randn(48, DIM) + labels[:, None], soft_targets(labels, CLASSES))
    return mask


def run_soft(n: int, p: int, prefix: int, **options) -> tuple[MaskModule, Tensor, Tensor, Merged]:
    mask = soft(n, p, prefix, **options)
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    assert sizes is not None
    return mask, tokens, sizes, mask(inner, tokens, sizes)


def naive(mask: MaskModule, tokens: Tensor, sizes: Tensor, dense: Tensor) -> dict[str, Tensor]:
    """The formulas of docs/method.md with dense W (B, N, P), a loop over nothing, nothing factored."""
    prefix = mask.prefix

    def columns(epsilon: Tensor) -> Tensor:
        unnormalised = (sizes * epsilon.exp())[..., None] * dense
        return unnormalised / unnormalised.sum(dim=1, keepdim=True)

    v = F.layer_norm(tokens, (DIM,))
    uniform = columns(torch.zeros_like(sizes))
    descriptor = torch.einsum("bjp,bjd->bpd", uniform, v)[:, prefix:].mean(dim=1)
    direction = mask.statistics.step_direction(descriptor).double()
    zeta = torch.einsum("bjd,bd->bj", v, direction)[:, prefix:]
    deviation = (zeta - zeta.mean(dim=1, keepdim=True)).square().mean(dim=1, keepdim=True).sqrt()
    epsilon = torch.zeros_like(sizes)
    epsilon[:, prefix:] = -mask.eta * (zeta - zeta.mean(dim=1, keepdim=True)) / (deviation + 1e-6)
    return {
        "descriptor": descriptor,
        "epsilon": epsilon,
        "G": columns(epsilon),
        "tokens": torch.einsum("bjp,bjd->bpd", columns(epsilon), tokens),
        "sizes": torch.einsum("bjp,bj->bp", dense, sizes),
    }


@pytest.mark.parametrize("n, p, prefix", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_mask_equals_the_dense_formulas(n, p, prefix, eta):
    mask, tokens, sizes, merged = run_soft(n, p, prefix, fit=True, eta=eta)
    with torch.no_grad():
        want = naive(mask, tokens, sizes, merged.merge.assignment.dense())
    torch.testing.assert_close(want["G"].sum(dim=1), torch.ones(BATCH, p).double())
    torch.testing.assert_close(merged.merge.descriptor.detach(), want["descriptor"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(merged.sizes.detach(), want["sizes"], rtol=1e-12, atol=1e-12)
    # variance ε inside the layer norm and float32 statistics bound the agreement
    torch.testing.assert_close(merged.tokens.detach(), want["tokens"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_epsilon_is_the_standardised_step_down_the_bound(n, p, prefix):
    mask, tokens, sizes, merged = run_soft(n, p, prefix, fit=True, eta=0.7)
    with torch.no_grad():
        want = naive(mask, tokens, sizes, merged.merge.assignment.dense())
        halves = split(tokens[:, prefix:], mask.counts(tokens))
        places = torch.arange(n).expand(BATCH, n)[:, prefix:]
        share = uniform_share(sizes, merged.merge.assignment.dense())[:, prefix:]
        shares = split(share, mask.counts(tokens))
        z, share = torch.cat(halves, dim=1), torch.cat(shares, dim=1)
        _, epsilon = descend(z, share / (p - prefix), mask.statistics, mask.eta)
        positions = torch.cat(split(places, mask.counts(tokens)), dim=1)
    torch.testing.assert_close(epsilon, want["epsilon"].gather(1, positions), rtol=1e-5, atol=1e-5)
    assert want["epsilon"][:, prefix:].std() > 0.3
    assert bool((want["epsilon"][:, :prefix] == 0).all())


def uniform_share(sizes: Tensor, dense: Tensor) -> Tensor:
    """Σ_p G⁰_jp."""
    columns = sizes[..., None] * dense
    return (columns / columns.sum(dim=1, keepdim=True)).sum(dim=2)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
@pytest.mark.parametrize("kind", ["ltm", "tome"])
def test_assignment_rows_sum_to_one_sizes_are_conserved_and_prefix_tokens_stay(n, p, prefix, kind):
    mask = soft(n, p, prefix, fit=True, eta=0.7)
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    if kind == "tome":
        key = (mask.key.weight.detach(), mask.key.bias.detach())
        merged = ToMeMask(DIM, n, p, prefix)(inner, tokens, sizes, key)
    else:
        merged = mask(inner, tokens, sizes)
    dense = merged.merge.assignment.dense()
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
def test_each_input_token_is_kept_or_merged_exactly_once(n, p, prefix):
    _, _, _, merged = run_soft(n, p, prefix)
    kept, left = merged.merge.assignment.kept, merged.merge.assignment.merged
    for image in range(BATCH):
        assert sorted([*kept[image].tolist(), *left[image].tolist()]) == list(range(n))
        destinations = partition(n, p, prefix).destinations
        unmerged = kept[image, prefix : p - destinations].tolist()
        assert unmerged == sorted(unmerged)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_a_constant_survives_merging_and_unmerging(n, p, prefix, eta):
    mask = soft(n, p, prefix, fit=True, eta=eta)
    inner, _, sizes = double_inputs(n, DIM, 3, sized=True)
    constant = torch.linspace(-2, 3, DIM, dtype=torch.float64).expand(BATCH, n, DIM).contiguous()
    merged = mask(inner, constant, sizes)
    torch.testing.assert_close(merged.tokens, constant[:, :p])
    torch.testing.assert_close(merged.merge.assignment.unmerge(merged.tokens), constant)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_unmerge_is_the_dense_product_and_kept_tokens_come_back_in_place(n, p, prefix):
    _, _, _, merged = run_soft(n, p, prefix)
    assignment = merged.merge.assignment
    back = assignment.unmerge(merged.tokens)
    torch.testing.assert_close(back, assignment.dense() @ merged.tokens)
    places = assignment.kept[..., None].expand(-1, -1, DIM)
    assert torch.equal(back.gather(1, places), merged.tokens)


def test_nothing_merged_is_a_permutation():
    _, tokens, sizes, merged = run_soft(9, 9, 1, fit=True, eta=0.7)
    torch.testing.assert_close(merged.merge.assignment.unmerge(merged.tokens), tokens)
    assert torch.equal(merged.sizes.sort().values, sizes.sort().values)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_before_anything_is_fitted_the_step_is_exactly_nothing(n, p, prefix):
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    still, moving = soft(n, p, prefix), soft(n, p, prefix, eta=3.0)
    assert torch.equal(still(inner, tokens, sizes).tokens, moving(inner, tokens, sizes).tokens)


def test_with_fitted_statistics_the_step_changes_tokens_but_never_sizes_or_assignment():
    inner, tokens, sizes = double_inputs(17, DIM, 3, sized=True)
    still = soft(17, 12, 1, fit=True)(inner, tokens, sizes)
    moved = soft(17, 12, 1, fit=True, eta=0.5)(inner, tokens, sizes)
    assert not torch.allclose(still.tokens, moved.tokens, atol=1e-3)
    assert torch.equal(still.sizes, moved.sizes)
    assert torch.equal(still.merge.assignment.weights, moved.merge.assignment.weights)
    assert torch.equal(still.merge.descriptor, moved.merge.descriptor)


def test_sizes_left_out_are_ones():
    mask = soft(17, 12, 1, fit=True, eta=0.5)
    inner, tokens, _ = double_inputs(17, DIM, 3, sized=False)
    given_ones = mask(inner, tokens, torch.ones(BATCH, 17).double())
    assert torch.equal(mask(inner, tokens, None).tokens, given_ones.tokens)


@pytest.mark.parametrize("n, p, prefix", COUNTS)
def test_each_image_is_merged_by_itself(n, p, prefix):
    mask = soft(n, p, prefix, fit=True, eta=0.5)
    inner, tokens, sizes = double_inputs(n, DIM, 3, sized=True)
    together = mask(inner, tokens, sizes)
    alone = mask(inner[1:], tokens[1:], sizes[1:])
    torch.testing.assert_close(together.tokens[1:], alone.tokens)


# --------------------------------------------------------------------------------------------------------- gradients


def test_every_parameter_learns_from_the_merged_tokens():
    mask, _, _, merged = run_soft(17, 12, 1, fit=True, eta=0.1)
    generator = torch.Generator().manual_seed(1)
    (merged.tokens * torch.randn(merged.tokens.shape, generator=generator)).sum().backward()
    named = dict(mask.named_parameters())
    assert set(named) == {"key.weight", "key.bias", "log_scale", "eta"}
    for name, parameter in named.items():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-8, name


def test_keys_and_temperature_learn_from_the_bound_on_the_descriptor_alone():
    mask, _, _, merged = run_soft(17, 12, 1, fit=True)
    targets = soft_targets(torch.arange(BATCH) % CLASSES, CLASSES)
    mask.statistics.bound(merged.merge.descriptor, targets).backward()
    for name in ("key.weight", "key.bias", "log_scale"):
        gradient = mask.get_parameter(name).grad
        assert gradient is not None and float(gradient.abs().max()) > 1e-8, name
    assert mask.eta.grad is None or float(mask.eta.grad) == 0  # the descriptor is taken at ε = 0


def test_eta_gets_no_gradient_before_anything_is_fitted():
    mask, _, _, merged = run_soft(17, 12, 1, eta=0.1)
    merged.tokens.square().sum().backward()
    assert float(mask.eta.grad) == 0 and bool(torch.isfinite(mask.key.weight.grad).all())


@pytest.mark.parametrize("name", ["key.weight", "log_scale", "eta"])
def test_gradients_agree_with_finite_differences(name):
    """The step direction is detached from nothing but its own deviation, which this loss does not see at η = 0."""
    mask = soft(9, 6, 1, fit=True, eta=0.0)
    inner, tokens, sizes = double_inputs(9, DIM, 3, sized=True)
    weights = torch.randn(BATCH, 6, DIM, generator=torch.Generator().manual_seed(1)).double()

    def loss() -> Tensor:
        return (mask(inner, tokens, sizes).tokens * weights).sum()

    parameter = mask.get_parameter(name)
    (gradient,) = torch.autograd.grad(loss(), parameter)
    along = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
    values = []
    with torch.no_grad():
        for shift in (1e-5, -1e-5):
            parameter.add_(shift * along)
            values.append(float(loss()))
            parameter.sub_(shift * along)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((gradient * along).sum()), rel=1e-3, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["ltm", "tome"])
def test_half_precision_goes_in_and_comes_out(dtype, kind):
    inner, tokens, sizes = (value.float() for value in double_inputs(17, DIM, 3, sized=True))
    mask = soft(17, 12, 1, fit=True, eta=0.3).float()
    key = (mask.key.weight.detach(), mask.key.bias.detach())
    baseline = ToMeMask(DIM, 17, 12, 1)
    if kind == "tome":
        exact = baseline(inner, tokens, sizes, key)
        merged = baseline(inner.to(dtype), tokens.to(dtype), sizes, tuple(entry.to(dtype) for entry in key))
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
    mask = soft(17, 12, 1, fit=True, eta=0.3).float()
    outside = mask(inner, tokens, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = mask(inner, tokens, sizes)
    assert inside.tokens.dtype == torch.float32
    assert torch.equal(inside.tokens, outside.tokens) and torch.equal(inside.sizes, outside.sizes)


def test_bfloat16_gradients_are_finite():
    mask = soft(17, 12, 1, fit=True, eta=0.3).bfloat16()
    inner, tokens, _ = (None if value is None else value.bfloat16() for value in double_inputs(17, DIM, 3, False))
    mask(inner, tokens, None).tokens.float().square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) and p.grad.dtype == torch.bfloat16 for p in mask.parameters())


# ------------------------------------------------------------------------------------------------- counts and ranges


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


@pytest.mark.parametrize("n, p, prefix", [(17, 1, 1), (17, 0, 1), (17, 18, 1), (9, 5, 5), (4, 0, 0), (5, -1, 0)])
@pytest.mark.parametrize("make", [ToMeMask, lambda *a: MaskModule(a[0], KEY, *a[1:], CLASSES)], ids=["tome", "ltm"])
def test_impossible_counts_are_refused_with_the_range(n, p, prefix, make):
    with pytest.raises(CountError, match=f"choose {prefix + 1} to {n}"):
        make(DIM, n, p, prefix)


@pytest.mark.parametrize("kind", ["ltm", "tome", "pool", "slice"])
@pytest.mark.parametrize("count", [16, 17, 18, 33, 65])
def test_another_count_than_planned_keeps_the_same_share(kind, count):
    """At another size a mask does what one that was planned for that size would do."""
    given_mask = soft(17, 12, 1)
    key = (given_mask.key.weight.detach(), given_mask.key.bias.detach())
    kept = round(count * 12 / 17) if kind == "slice" else 1 + round((count - 1) * 11 / 16)
    assert Mask(17, 12, 0 if kind == "slice" else 1).kept_at(count) == kept and (count != 17 or kept == 12)
    make = {
        "ltm": lambda n, p: soft(n, p, 1),
        "tome": lambda n, p: ToMeMask(DIM, n, p, 1),
        "pool": lambda n, p: PoolMask(n, p, 1),
        "slice": SliceMask,
    }[kind]
    inner, tokens, _ = double_inputs(count, DIM, 0, False)
    one, other = (mask(inner, tokens, None, key) for mask in (make(17, 12), make(count, kept)))
    assert one.tokens.shape == (BATCH, kept, DIM)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.sizes, other.sizes)
    assert torch.equal(one.merge.assignment.dense(), other.merge.assignment.dense())


@pytest.mark.parametrize("make", [ToMeMask, lambda *a: MaskModule(a[0], KEY, *a[1:], CLASSES)], ids=["tome", "ltm"])
def test_prefix_tokens_alone_are_refused(make):
    mask = make(DIM, 17, 12, 1)
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
    assert slice_ == 0 < tome < ltm
    assert get_method("slice").unmerge_macs(place) == (n - p) * DIM


# -------------------------------------------------------------------------------------------------------- composition


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_merges_compose(prefix):
    first, second = soft(20 + prefix, 15 + prefix, prefix), soft(15 + prefix, 6 + prefix, prefix, seed=1)
    inner, tokens, _ = double_inputs(20 + prefix, DIM, 3, False)
    one = first(inner, tokens, None)
    two = second(one.tokens, one.tokens, one.sizes)
    merges = (one.merge, two.merge)
    product = one.merge.assignment.dense() @ two.merge.assignment.dense()
    torch.testing.assert_close(accumulated(merges), product)
    torch.testing.assert_close(accumulated(merges[:1]), one.merge.assignment.dense())
    torch.testing.assert_close(unmerge_all(two.tokens, merges), product @ two.tokens)
    torch.testing.assert_close(product.sum(dim=1), two.sizes)  # s² = (W¹W²)ᵀ 1
    assert unmerge_all(tokens, ()) is tokens


def test_tokens_carry_what_they_are_given_and_results_do_not():
    tokens = torch.randn(1, 4, 2)
    assert carried_by(tokens) is None and carry(tokens, None) is tokens and carried_by(tokens) is None
    merged = soft(4, 3, 1)
    _, x, _ = double_inputs(4, DIM, 0, False)
    sentinel = merged(x, x, None)
    carried = Carried(sentinel.sizes, (sentinel.merge,))
    assert carry(tokens, carried) is tokens and carried_by(tokens) is carried
    assert carried_by(tokens + 0) is None


def test_unmerging_keeps_the_dtype_of_its_tokens():
    _, _, _, merged = run_soft(17, 12, 1)
    assignment: Assignment = merged.merge.assignment
    assert assignment.unmerge(merged.tokens.bfloat16()).dtype == torch.bfloat16
