"""The information bottleneck on soft clusters: bounds, their gradient, and what they are fitted from.

Notation of ``docs/method.md`` and of Wang & Yang, *Efficient Visual Transformer by Learnable Token Merging* (TPAMI
2025, arXiv 2407.15219): images ``i``, clusters ``a`` of a site's descriptor, clusters ``b`` of the input, classes
``y``, soft assignments ``φ_ia`` (rows of ``phi`` sum to one). Targets are always soft labels ``t_iy`` of shape
``(n, C)`` whose rows sum to one; `soft_targets` makes them. Given the image, its cluster and its class are independent,
``p(a, y) = mean_i φ_ia t_iy``: that alone carries the bounds from hard labels to soft ones.

All information is in nats. Everything is computed in float32 at least, float64 where an argument is float64.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ltm_retrofit.errors import DataError, RecipeError

#: how far the sum of a soft label may lie from one: labels mixed in half precision are off by a few thousandths
LABEL_TOLERANCE = 1e-2


def lifted(x: Tensor) -> Tensor:
    """Lift half precision to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of ``x``, and do nothing at all where it is off: exported graphs stay clean."""
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def lift(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring tensors to their common dtype, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def finite_log(p: Tensor) -> Tensor:
    """Return log p, with a large negative number in place of −∞: 0·log 0 must be 0, and its gradient too."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


def soft_targets(labels: Tensor, classes: int) -> Tensor:
    """Turn class indices ``(n,)`` or soft labels ``(n, C)`` into soft labels ``(n, C)``, float32 or float64.

    Raises:
        DataError: where labels lie outside 0…C − 1, have another width or dtype, are negative or not finite, or
            their rows do not sum to one.
    """
    expected = f"expected class indices (n,) from 0 to {classes - 1} or soft labels (n, {classes}) summing to one"
    whole = not labels.dtype.is_floating_point and not labels.dtype.is_complex and labels.dtype != torch.bool
    if labels.ndim == 1 and whole:
        if bool(((labels < 0) | (labels >= classes)).any()):
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}; {expected}: "
                "give the model as many classes as the data set has, and drop images without a label"
            )
        return F.one_hot(labels.long(), classes).float()
    if labels.ndim != 2 or labels.shape[1] != classes or not (whole or labels.dtype.is_floating_point):
        raise DataError(
            f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; {expected}: "
            "check the collate function and the model's number of classes"
        )
    (soft,) = lift(labels)
    if not bool((torch.isfinite(soft) & (soft >= 0)).all()):
        raise DataError(f"soft labels hold negative or non-finite values; {expected}: give probabilities, not logits")
    off = (soft.sum(dim=1) - 1).abs()
    if bool((off > LABEL_TOLERANCE).any()):
        worst = float(soft[off.argmax()].sum())
        raise DataError(f"a soft label sums to {worst:.4g}; {expected}: divide each row by its sum")
    return soft


def log_assign(x: Tensor, centroids: Tensor, beta: Tensor | float) -> Tensor:
    """Soft assignments, ``φ_ia = softmax_a(−β‖x_i − c_a‖²)``, as logarithms.

    ``x (n, D)`` and ``centroids (A, D)`` give log φ ``(n, A)``; ``beta`` has the unit of one over squared distance.
    ``‖x‖²`` cancels in the softmax, which leaves one product of n·A·D multiply-adds.
    """
    # Not in half precision: the exponent is a difference of squared distances, of which little would be left.
    with full_precision(x):
        x, centroids = lift(x, centroids)
        energy = centroids.square().sum(dim=-1) - 2 * torch.mm(x, centroids.t())
        return torch.log_softmax(-beta * energy, dim=-1)


def q_given_y(n_ay: Tensor, alpha: float = 1.0) -> Tensor:
    """Smoothed ``Q(a|y) = (n_ay + α p(a)) / (n_y + α)`` (``docs/method.md``, "Statistics").

    Counts ``(A, C)``, whole or not, give ``(A, C)`` whose columns sum to one; α is in images. A class without counts
    gets p(a), also in the limit α = 0; without any counts p(a) is uniform.
    """
    (n_ay,) = lift(n_ay)
    p_a = _shares(n_ay.sum(dim=1, keepdim=True))
    weight = n_ay.sum(dim=0, keepdim=True) + alpha
    return torch.where(weight > 0, (n_ay + alpha * p_a) / torch.where(weight > 0, weight, 1), p_a)


def p_y_given_a(n_ay: Tensor, alpha: float = 1.0) -> Tensor:
    """Smoothed ``p(y|a) = (n_ay + α p(y)) / (n_a + α)``: `q_given_y` the other way round; rows sum to one."""
    return q_given_y(n_ay.t(), alpha).t()


def _shares(counts: Tensor) -> Tensor:
    """Divide by the sum; uniform where that is zero, without a branch that an exported graph could not hold."""
    total = counts.sum()
    return torch.where(total > 0, counts / torch.where(total > 0, total, 1), 1 / counts.numel())


def entropy(p: Tensor) -> Tensor:
    """Entropy over the last dimension, in nats: ``(…, K)`` to ``(…)``."""
    (p,) = lift(p)
    return -(p * finite_log(p)).sum(dim=-1)


def mutual_information(joint: Tensor) -> Tensor:
    """Mutual information of a joint distribution ``(A, B)`` that sums to one: a scalar in nats."""
    (joint,) = lift(joint)
    rows, columns = joint.sum(dim=1, keepdim=True), joint.sum(dim=0, keepdim=True)
    return (joint * (finite_log(joint) - finite_log(rows) - finite_log(columns))).sum()


def information_bottleneck(phi: Tensor, phi_x: Tensor, targets: Tensor) -> Tensor:
    """``IB = I(a;b) − I(a;y)`` from φ ``(n, A)``, φ' ``(n, B)`` and targets ``(n, C)``, a scalar in nats.

    Compare only values with the same A, B, fit and perplexity: the plug-in bias of I(a;b) is about
    ``(A − 1)(B − 1) / 2n``.
    """
    with_input, with_class = informations(phi, phi_x, targets)
    return with_input - with_class


def informations(phi: Tensor, phi_x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return I(a;b) and I(a;y), the two halves of `information_bottleneck`."""
    with full_precision(phi):
        phi, phi_x, targets = lift(phi, phi_x, targets)
        with_input, with_class = torch.mm(phi.t(), phi_x) / len(phi), torch.mm(phi.t(), targets) / len(phi)
        return mutual_information(with_input), mutual_information(with_class)


def ibb(log_phi: Tensor, log_phi_x: Tensor | None, q: Tensor, targets: Tensor) -> Tensor:
    """The separable bound of Wang & Yang, in nats: ``IB ≤ IBB + H(b)`` for any Q > 0 whose columns sum to one.

    ``IBB = mean_i Σ_b φ'_ib log φ'_ib − mean_i Σ_a φ_ia Σ_y t_iy log Q(a|y)``; the first term does not depend on φ.

    Args:
        log_phi: log φ ``(n, A)``.
        log_phi_x: log φ' ``(n, B)``; None leaves its term out, which no gradient flows into.
        q: Q(a|y) ``(A, C)``.
        targets: ``(n, C)``.
    """
    log_phi, q, targets = lift(log_phi, q, targets)
    constant = 0.0 if log_phi_x is None else _expected(log_phi_x, log_phi_x).mean()
    return constant - _class_term(log_phi, finite_log(q), targets).mean()


def ceb(log_phi: Tensor, q: Tensor, targets: Tensor, p_y: Tensor | None = None, gamma: float = 0.0) -> Tensor:
    """The conditional entropy bottleneck on cluster assignments (Fischer 2020; ``docs/method.md``), mean over images.

    ``CEB_γ = mean_i Σ_a φ_ia [log φ_ia − Σ_y t_iy (log Q(a|y) + γ log p(y|a))]``. For any Q > 0 whose columns and
    p(y|a) > 0 whose rows sum to one, ``I(a;b) − (1 + γ) I(a;y) ≤ CEB_γ − γ H(y)``, and CEB_γ ≥ 0: a scalar in nats.

    Args:
        log_phi: log φ ``(n, A)``.
        q: Q(a|y) ``(A, C)``.
        targets: ``(n, C)``.
        p_y: p(y|a) ``(A, C)``, read where γ is not 0.
        gamma: weight γ of the half that predicts the class.

    Raises:
        RecipeError: where γ is not 0 and ``p_y`` is missing.
    """
    log_phi, q, targets = lift(log_phi, q, targets)
    log_terms = finite_log(q)
    if p_y is not None:
        log_terms = torch.add(log_terms, finite_log(p_y.to(q.dtype)), alpha=gamma)
    elif gamma != 0:
        raise RecipeError(f"gamma is {gamma} and p_y is None: give p(y|a), for instance p_y_given_a(counts)")
    return (_expected(log_phi, log_phi) - _class_term(log_phi, log_terms, targets)).mean()


def _expected(log_phi: Tensor, values: Tensor) -> Tensor:
    """``Σ_a φ_ia values_ia``, ``(n,)``; a weight of zero silences even −∞."""
    return (log_phi.exp() * values.clamp_min(torch.finfo(values.dtype).min)).sum(dim=-1)


def _class_term(log_phi: Tensor, log_terms: Tensor, targets: Tensor) -> Tensor:
    """``Σ_a φ_ia Σ_y t_iy log_terms_ay``, ``(n,)``."""
    with full_precision(log_phi):
        return (torch.mm(log_phi.exp(), log_terms) * targets).sum(dim=-1)


def bound_gradient(
    x: Tensor, centroids: Tensor, beta: Tensor | float, log_q: Tensor, log_p_y: Tensor, gamma: float
) -> Tensor:
    """Gradient of each image's own CEB_γ at ``x``, in closed form (``docs/method.md``, item 5).

    With ``u_a = log φ_a + 1 − Σ_y π_y (log Q(a|y) + γ log p(y|a))`` and ``ū = Σ_a φ_a u_a`` it is
    ``g = 2β Σ_a φ_a (u_a − ū) c_a``. In place of the label stands ``π_y = Σ_a φ_a p(y|a)``, a constant to autograd.
    Four products of two matrices, ``2AD + 2AC`` multiply-adds for each image.

    Args:
        x: ``(n, D)``.
        centroids: ``(A, D)``.
        beta: β.
        log_q: log Q(a|y) ``(A, C)``, finite.
        log_p_y: log p(y|a) ``(A, C)``, finite.
        gamma: γ.

    Returns:
        g ``(n, D)``, not divided by n.
    """
    with full_precision(x):
        x, centroids, log_q, log_p_y = lift(x, centroids, log_q, log_p_y)
        log_phi = log_assign(x, centroids, beta)
        phi = log_phi.exp()
        # The class that the clusters expect, in training too: with the label here the forward pass would differ between
        # training and use.
        pi = torch.mm(phi, log_p_y.exp()).detach()
        # The + 1 of the derivative of φ log φ cancels against its mean, and Σ_a φ_a (u_a − ū) x is zero: c_a is left.
        u = log_phi - torch.mm(pi, (log_q + gamma * log_p_y).t())
        slope = phi * (u - (phi * u).sum(dim=-1, keepdim=True))
        return 2 * beta * torch.mm(slope, centroids)


@torch.no_grad()
def kmeans(x: Tensor, k: int, *, generator: torch.Generator | None, iterations: int = 20) -> Tensor:
    """Cluster by k-means++ (Arthur & Vassilvitskii 2007) and Lloyd's steps, on the device of ``x``.

    Finite ``x (n, D)`` gives centroids ``(k, D)``, the same ones for the same state of the generator, which may live
    on another device than ``x`` (None: torch's global one). With fewer than ``k`` distinct points some coincide.

    Raises:
        DataError: without a point or a cluster.
    """
    if x.ndim != 2 or len(x) < 1 or k < 1:
        raise DataError(f"cannot cluster a tensor of shape {tuple(x.shape)} into {k}: give (n, D), n ≥ 1, and k ≥ 1")
    with full_precision(x):
        (x,) = lift(x)
        middle = x.mean(dim=0)
        x = x - middle  # distances from products lose digits far from the origin
        device = x.device if generator is None else generator.device
        # The largest weight / Exp(1) is a draw in proportion to the weights: no cumulative sum, which CUDA does not
        # do deterministically, and no value that the host has to wait for.
        race = torch.empty(k, len(x), dtype=torch.float32, device=device).exponential_(generator=generator)
        race = race.to(x).clamp_min(1e-30)
        chosen = [x[(1 / race[0]).argmax()]]
        nearest = (x - chosen[0]).square().sum(dim=1)
        for clock in race[1:]:
            chosen.append(x[(nearest / clock).argmax()])
            nearest = torch.minimum(nearest, (x - chosen[-1]).square().sum(dim=1))
        centroids = torch.stack(chosen)
        for _ in range(iterations):
            centroids = lloyd_step(x, centroids)
        return centroids + middle


def lloyd_step(x: Tensor, centroids: Tensor) -> Tensor:
    """One step of k-means; a cluster without points moves onto one of those farthest from their centroids."""
    # ‖x‖² is left out of every distance: it does not change which centroid is nearest.
    closeness = 2 * torch.mm(x, centroids.t()) - centroids.square().sum(dim=1)
    best, index = closeness.max(dim=1)
    member = F.one_hot(index, len(centroids)).to(x.dtype)
    size = member.sum(dim=0).unsqueeze(1)
    means = torch.mm(member.t(), x) / size.clamp_min(1)
    farthest = (x.square().sum(dim=1) - best).argsort(descending=True, stable=True)
    place = ((size == 0).long().cumsum(dim=0) - 1).squeeze(1).clamp(0, len(x) - 1)
    return torch.where(size == 0, x[farthest[place]], means)


@torch.no_grad()
def beta_for_perplexity(x: Tensor, centroids: Tensor, target: float) -> Tensor:
    """Find the β at which the median over images of the perplexity ``exp(H(φ_i))`` is ``target``.

    Bisection in log β: each image's entropy falls as β grows. Where coinciding centroids put the target out of reach,
    the end of a range of twelve decades around the data's own scale is the answer. ``x (n, D)`` and ``centroids
    (A, D)`` give a scalar.

    Raises:
        RecipeError: where the target is not between 1 and A.
    """
    if not 1 < target < len(centroids):
        raise RecipeError(f"a perplexity over {len(centroids)} clusters lies between 1 and that, got {target}")
    with full_precision(x):
        x, centroids = lift(x, centroids)
        energy = centroids.square().sum(dim=-1) - 2 * torch.mm(x, centroids.t())
        energy = energy - energy.amin(dim=1, keepdim=True)
        scale = energy.mean(dim=1).median()
        scale = torch.where(scale > 0, scale, 1)
        low, high = scale.new_tensor(-6 * math.log(10)), scale.new_tensor(6 * math.log(10))
        # A fixed number of halvings, without a value that the host waits for: 28 halved 48 times is below float32's
        # resolution; float64 gains 1e-13.
        for _ in range(48):
            middle = (low + high) / 2
            log_phi = torch.log_softmax(-(middle.exp() / scale) * energy, dim=1)
            flat = entropy(log_phi.exp()).median() > math.log(target)
            low, high = torch.where(flat, middle, low), torch.where(flat, high, middle)
        return ((low + high) / 2).exp() / scale
