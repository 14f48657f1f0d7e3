"""What one site, or the classifier's feature, knows of its clusters: centroids, counts by class, temperature.

The section "Statistics" of ``docs/method.md``. Centroids and counts are averaged together, with one decay and from the
same distances: a Q left over from other centroids would mean nothing. Counts take the soft assignments, centroids only
the samples nearest to them. Were they soft means as well, each update would draw all of them towards the common mean,
and at the perplexities wanted here a few hundred updates end with 64 equal centroids and a bound that no longer depends
on the descriptor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ltm_retrofit.errors import DataError, RecipeError, check_choice
from ltm_retrofit.merging import ib

#: no fit before the memory holds this many samples for each cluster
SAMPLES_PER_CLUSTER = 4


class Statistics(nn.Module):
    """Soft clusters of a descriptor and their joint counts with the classes, learned from what passes by.

    The counts always sum to ``capacity``: they stand for an effective sample of that many images, so that the
    smoothing of `ib.q_given_y` means the same from the first fit on. All buffers stay float32 whatever dtype the model
    is cast to. The memory of recent samples is no buffer: it is in copies and pickles, but not in the state dict.

    Args:
        dim: width D of the descriptor.
        classes: C.
        clusters: A.
        decay: share of the old counts and centroid sums that one update keeps.
        perplexity: what the median perplexity ``exp(H(φ_i))`` is fitted to; 0.9·A where there are too few clusters.
        gamma: γ of CEB_γ.
        capacity: how many samples the memory holds; at least 4·A.

    Raises:
        RecipeError: where a value cannot be.
    """

    centroids: Tensor
    counts: Tensor
    beta: Tensor
    fitted: Tensor

    def __init__(
        self,
        dim: int,
        classes: int,
        clusters: int = 64,
        *,
        decay: float = 0.99,
        perplexity: float = 8.0,
        gamma: float = 1.0,
        capacity: int = 1024,
    ) -> None:
        """Start without any statistics."""
        super().__init__()
        least = SAMPLES_PER_CLUSTER * clusters
        enough = f"at least {SAMPLES_PER_CLUSTER} samples for each of {clusters} clusters, {least}"
        for name, value, fits, expected in (
            ("dim", dim, dim >= 1, "a whole number from 1 on"),
            ("classes", classes, classes >= 1, "a whole number from 1 on"),
            ("clusters", clusters, clusters >= 2, "a whole number from 2 on"),
            ("decay", decay, 0 <= decay < 1, "the share of the past that an update keeps, 0 ≤ decay < 1"),
            ("perplexity", perplexity, perplexity > 1, "an effective number of clusters, above 1"),
            ("gamma", gamma, 0 <= gamma < float("inf"), "0 or more and finite"),
            ("capacity", capacity, capacity >= least, enough),
        ):
            if not fits:
                raise RecipeError(f"{name} must be {expected}, got {value!r}")
        self.decay, self.gamma, self.capacity = decay, gamma, capacity
        # The dtype is named because under `from_pretrained(dtype=...)` the default one is another.
        self.register_buffer("centroids", torch.zeros(clusters, dim, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(clusters, classes, dtype=torch.float32))
        self.register_buffer("beta", torch.ones((), dtype=torch.float32))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.float32))
        self.memory = Memory(capacity)  # of descriptors (m, D) and soft labels (m, C)
        self.aim(perplexity)

    def aim(self, perplexity: float) -> None:
        """Let the next fit choose β for this median perplexity; for 0.9·A where there are too few clusters."""
        self.target_perplexity = min(perplexity, 0.9 * len(self.centroids))

    def extra_repr(self) -> str:
        """Say what the module does in a printed model."""
        (clusters, dim), classes = self.centroids.shape, self.counts.shape[1]
        return f"{clusters} clusters of {dim} features, {classes} classes, γ = {self.gamma:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a change of device, not of dtype: counts in half precision would stop growing."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call, no-any-return]

    @torch.no_grad()
    def update(
        self, x: Tensor, targets: Tensor, generator: torch.Generator | None = None, *, together: int = 1
    ) -> None:
        """Learn from a batch: fit as soon as 4·A samples have come, from then on let the old fade by ``decay``.

        A batch that is not finite is ignored. May be called between a forward pass and its backward pass, unless that
        computes parts of the forward pass anew (gradient checkpointing).

        Args:
            x: descriptors ``(n, D)``; in distributed training of all ranks, or the ranks drift apart.
            targets: soft labels ``(n, C)``.
            generator: source of randomness for the fit; None is a fresh one with seed 0.
            together: samples of several batches that fade the old once; small batches are remembered until then.

        Raises:
            DataError: where the shapes do not fit.
        """
        x, targets = self._checked(x, targets)
        if len(x) == 0 or not _finite(x, targets):
            return
        self.memory.add(x, targets)
        if not bool(self.fitted):
            self.refresh(generator)
        elif self.memory.fresh >= together:
            self._fold(*self.memory.take_fresh())

    def _fold(self, x: Tensor, targets: Tensor) -> None:
        """Let centroids and counts fade, and add the samples."""
        with ib.full_precision(x):
            phi = ib.log_assign(x, self.centroids, self.beta).exp()
            nearest = F.one_hot(phi.argmax(dim=1), len(self.centroids)).to(x.dtype)
            fresh = (1 - self.decay) * self.capacity / len(x)
            counts = torch.addmm(self.counts, phi.t(), targets, beta=self.decay, alpha=fresh)
            old = self.decay * self.counts.sum(dim=1, keepdim=True)
            sums = old * self.centroids + fresh * torch.mm(nearest.t(), x)
            size = old + fresh * nearest.sum(dim=0).unsqueeze(1)
        # A cluster that nothing touches any more keeps its place; the next refresh moves it.
        alive = size > torch.finfo(size.dtype).tiny
        self.centroids.copy_(torch.where(alive, sums / torch.where(alive, size, 1), self.centroids))
        self.counts.copy_(counts)

    @torch.no_grad()
    def fit(self, x: Tensor, targets: Tensor, generator: torch.Generator | None = None) -> None:
        """Start anew from a sample: k-means, β from the perplexity, counts from the assignments that result.

        Args:
            x: descriptors ``(n, D)``.
            targets: soft labels ``(n, C)``.
            generator: source of randomness; None is a fresh one with seed 0.

        Raises:
            DataError: where the shapes do not fit, or the sample is empty or not finite.
        """
        x, targets = self._checked(x, targets)
        if len(x) == 0 or not _finite(x, targets):
            raise DataError(f"cannot fit clusters to {len(x)} samples: expected one or more, all of them finite")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        centroids = ib.kmeans(x, len(self.centroids), generator=generator)
        beta = ib.beta_for_perplexity(x, centroids, self.target_perplexity)
        phi = ib.log_assign(x, centroids, beta).exp()
        with ib.full_precision(x):
            counts = torch.mm(phi.t(), targets) * (self.capacity / len(x))
        for buffer, value in ((self.centroids, centroids), (self.counts, counts), (self.beta, beta)):
            buffer.copy_(value)
        self.fitted.fill_(1)

    def refresh(self, generator: torch.Generator | None = None) -> bool:
        """Fit anew to the memory, once per epoch; return whether it held the 4·A samples that this takes.

        The new clusters have other numbers: whatever was said of cluster a before does not hold after.
        """
        if len(self.memory) < SAMPLES_PER_CLUSTER * len(self.centroids):
            return False
        x, targets = self.memory.latest()
        self.memory.fresh = 0
        self.fit(x, targets, generator)
        return True

    def bound(self, x: Tensor, targets: Tensor, kind: str = "ceb", gamma: float | None = None) -> Tensor:
        """CEB_γ at ``x (n, D)`` with soft labels ``(n, C)``: a scalar in nats whose gradient flows into ``x`` only.

        With ``kind="ibb"`` what of IBB depends on x. While nothing is fitted, a zero that can be differentiated.

        Raises:
            RecipeError: on another kind.
        """
        check_choice(kind, ("ceb", "ibb"), "kind")
        if not bool(self.fitted):
            return (x * 0).sum(dtype=torch.float32)
        centroids, beta, q, p_y, _ = self._read()
        log_phi = ib.log_assign(x, centroids, beta)
        if kind == "ibb":
            return ib.ibb(log_phi, None, q, targets.detach())
        return ib.ceb(log_phi, q, targets.detach(), p_y, self.gamma if gamma is None else gamma)

    def step_direction(self, x: Tensor) -> Tensor:
        """Return the gradient of each image's CEB_γ at ``x (n, D)``, ``(n, D)``: see `ib.bound_gradient`.

        Computed also while nothing is fitted, and exactly zero then: neither the multiply-adds nor an exported graph
        change with training.
        """
        centroids, beta, q, p_y, fitted = self._read()
        return fitted * ib.bound_gradient(x, centroids, beta, q.log(), p_y.log(), self.gamma)

    @torch.no_grad()
    def perplexity(self, x: Tensor) -> Tensor:
        """Median over images of ``exp(H(φ_i))`` at ``x (n, D)``, a scalar from 1 to A, for reports."""
        return ib.entropy(ib.log_assign(x, self.centroids, self.beta).exp()).median().exp()

    def _read(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return what the bound needs: centroids ``(A, D)``, β, Q(a|y) and p(y|a) ``(A, C)``, and ``fitted``."""
        # Copies, which autograd keeps: an update between forward and backward pass is safe. Also where there is no
        # gradient, or a trace made with gradients would be another graph than its check without.
        centroids, beta, fitted = self.centroids.clone(), self.beta.clone(), self.fitted.clone()
        # One image spread evenly over all cells: a class or cluster that was never seen has a finite logarithm.
        counts = self.counts + 1 / self.counts.numel()
        return centroids, beta, ib.q_given_y(counts), ib.p_y_given_a(counts), fitted

    def _checked(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Check the shapes; detach and move to where the buffers are."""
        (dim, classes), device = (self.centroids.shape[1], self.counts.shape[1]), self.centroids.device
        if x.ndim != 2 or targets.ndim != 2 or (x.shape[1], targets.shape[1], len(x)) != (dim, classes, len(targets)):
            raise DataError(
                f"descriptors {tuple(x.shape)} and soft labels {tuple(targets.shape)} do not fit: expected (n, {dim}) "
                f"and (n, {classes}); ltm_retrofit.merging.ib.soft_targets makes soft labels of class indices"
            )
        return x.detach().to(device, torch.float32), targets.detach().to(device, torch.float32)


class Memory:
    """Keeps as many of the latest samples as it holds, in the batches they came in: adding one moves no other.

    Args:
        capacity: how many samples count.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.batches: list[tuple[Tensor, ...]] = []  # of as many parts as each sample has; newest last
        self.fresh = 0  # samples since `take_fresh`

    def __len__(self) -> int:
        """Count the samples."""
        return min(self.capacity, sum(len(batch[0]) for batch in self.batches))

    def add(self, *parts: Tensor) -> None:
        """Add a batch: tensors ``(n, …)``, the parts of its samples; what is beyond the capacity drops out."""
        self.batches.append(tuple(part.detach()[-self.capacity :].clone() for part in parts))
        self.fresh += len(parts[0])
        while sum(len(batch[0]) for batch in self.batches[1:]) >= self.capacity:
            del self.batches[0]

    def latest(self, count: int | None = None) -> tuple[Tensor, ...]:
        """Return each part of the latest samples, all that count or fewer: ``(n, …)``, oldest first, on one device."""
        count = self.capacity if count is None else min(count, self.capacity)
        first, held = len(self.batches), 0
        while first > 0 and held < count:
            first -= 1
            held += len(self.batches[first][0])
        device = self.batches[-1][0].device
        parts = zip(*self.batches[first:], strict=True)
        return tuple(torch.cat([batch.to(device) for batch in part])[max(0, held - count) :] for part in parts)

    def take_fresh(self) -> tuple[Tensor, ...]:
        """Return each part of the samples that have come since the last call, as far as they still count."""
        count, self.fresh = self.fresh, 0
        return self.latest(count)

    def state(self) -> list[Any]:
        """Return all that it holds, on the CPU, for `set_state`."""
        return [[tuple(part.cpu() for part in batch) for batch in self.batches], self.fresh]

    def set_state(self, state: list[Any], device: torch.device) -> None:
        """Hold what another one held, on a device."""
        batches, self.fresh = state
        self.batches = [tuple(part.to(device) for part in batch) for batch in batches]


@torch.no_grad()
def of_all_ranks(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Put descriptors ``(n, D)`` and soft labels ``(n, C)`` of all processes one below the other, in rank order.

    What is given comes back where there is one process. Every rank has to call it; batches may differ in size.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return x, targets
    both = torch.cat([x.detach().float(), targets.detach().to(x.device).float()], dim=1)
    ranks = distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(ranks)]
    distributed.all_gather(counts, torch.tensor([len(both)], device=x.device))
    sizes = [int(count) for count in counts]
    padded = F.pad(both, (0, 0, 0, max(sizes) - len(both)))
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(gathered, padded)
    whole = torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
    return whole[:, : x.shape[1]], whole[:, x.shape[1] :]


def _finite(*tensors: Tensor) -> bool:
    """Say whether all numbers are finite, as far as their sum tells: one number to wait for."""
    return bool(torch.stack([tensor.sum() for tensor in tensors]).isfinite().all())
