"""``"ltm"``: the learnable mask, N tokens in and P out, all shapes known in advance.

Wang & Yang, *Efficient Visual Transformer by Learnable Token Merging* (TPAMI 2025). The masks start from the best rule
for a trained network that is known here. `MaskModule.forward` tells it in order; the numbers are those of the items in
``docs/method.md``, "The mask module".

    compare  By the tokens z themselves, which are what is averaged, each channel weighed: ``w ⊙ z``.       (1)
    join     Rounds of bipartite matching by Ward's cost: W, hard, rows sum to one (`rounds.join`).         (2)
    step     If the plan has it, one step down the bound multiplies the weight of token j by ``e^{ε_j}``.   (5)
    merge    ``x̃ = ν Gᵀ z``, ``G_jp ∝ s_j W_jp e^{ε_j}``, columns of G sum to one; ν keeps the norm.       (3)

Tokens are ``z``, sizes ``s``. W and G are not to be confused: W says where each token *goes*, and brings it back after
the blocks (``W x̃``). G says what each merged token is *made of*. `GridMask` does the same on a map, where boxes that
overlap take the place of compare and join.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision, lifted
from ltm_retrofit.merging.methods import SCOPES, Grid, Keys, Method, Place
from ltm_retrofit.merging.pool import PoolGrid, gathered, grid_overlaps
from ltm_retrofit.merging.rounds import Groups, add_at, check_counts, join, leaving_in, rows_at
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import (
    TINY,
    GridAssignment,
    HardAssignment,
    Mask,
    Merge,
    Merged,
    dense_unmerge_macs,
    fixed,
)

#: τ of the soft assignment that w learns from, in units of the mean cost (docs/method.md, item 3)
TEMPERATURE = 0.1


class MaskModule(Mask):
    """The learnable mask of a sequence.

    Args:
        dim: width D of the tokens.
        tokens_in: N.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.
        rounds: in how many rounds tokens leave.
        statistics: of the descriptors, where the mask has the information-bottleneck step.
    """

    def __init__(
        self,
        dim: int,
        tokens_in: int,
        tokens_out: int,
        prefix: int = 0,
        rounds: int = 3,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(tokens_in, tokens_out, prefix)
        check_counts(tokens_in, tokens_out, prefix)
        self.dim, self.rounds = dim, rounds
        # Neutral: a freshly converted model compares plain tokens.
        self.weight = nn.Parameter(torch.ones(dim))
        self.statistics = statistics
        if statistics is not None:
            # From zero: the step comes in as far as training finds it of use.
            self.eta = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        inner: Tensor,
        tokens: Tensor,
        sizes: Tensor | None,
        key: Keys | None = None,
        cells: int = 1,
        padded: bool = False,
    ) -> Merged:
        """Merge: compare, join, step, merge. Arguments: see `Mask`; ``inner`` and ``key`` are ignored.

        Raises:
            CountError: where there is no patch token.
        """
        prefix, count = self.prefix, fixed(tokens.shape[1])
        leaving = leaving_in(count, self.kept_at(count), self.rounds, prefix)
        # In float32 whatever the model computes in. In the three digits of bfloat16 many costs are equal, and who
        # leaves would be a matter of chance.
        with full_precision(tokens):
            z = lifted(tokens[:, prefix:])
            s = z.new_ones(z.shape[:2]) if sizes is None else sizes[:, prefix:].to(z.dtype)

            # Compare and join. Whom to join is a choice, which has no gradient.
            w = self.weight.to(z.dtype)
            groups = join((z * w).detach(), None if sizes is None else s.detach(), leaving, padded)
            into = groups.of.gather(1, groups.gone)
            # s' = Wᵀ s. Sizes count original tokens, so ε never enters them: their sum stays whatever is learned.
            size = _summed(s, groups, into)

            # Step: ε_j. It starts from Σ_p G⁰_jp / |M|, how much of the mean merged token is token j. G⁰ is G without
            # ε, M its columns. Where there is no step, G⁰ is G.
            share = s / size.clamp_min(TINY).gather(1, groups.of)
            descriptor = None
            if self.statistics is not None:
                descriptor, tilt = descend(z, share / size.shape[1], self.statistics, self.eta, cells)
                share = s * tilt.exp()
                share = share / _summed(share, groups, into).clamp_min(TINY).gather(1, groups.of)

            # Merge: x̃_p = Σ_j G_jp z_j. A group of one token is that token, to the last bit.
            merged = rows_at(z, groups.first) * share.gather(1, groups.first).unsqueeze(-1)
            moved = rows_at(z, groups.gone) * share.gather(1, groups.gone).unsqueeze(-1)
            merged = add_at(merged, into, moved)
            # The mean of tokens is shorter than they are. The next layer norm takes the length out again, but the
            # stream that attention and MLP add to it has the weight that its length gives it: it gets theirs.
            length = _summed(share * torch.linalg.vector_norm(z, dim=-1), groups, into)
            stretch = length / torch.linalg.vector_norm(merged, dim=-1).clamp_min(TINY)
            alone = torch.ones_like(size).scatter(1, into, 0.0).bool()
            merged = merged * torch.where(alone, 1.0, stretch).unsqueeze(-1)
            if self.training and self.weight.requires_grad:
                merged = merged + self._taught(z, s, merged.detach(), size)
        places = torch.arange(prefix, device=tokens.device).expand(tokens.shape[0], -1)
        of, stand = (torch.cat([places, where + prefix], dim=1) for where in groups[:2])
        whole = s.new_ones(tokens.shape[0], prefix) if sizes is None else sizes[:, :prefix].to(s.dtype)
        return Merged(
            torch.cat([tokens[:, :prefix], merged.to(tokens.dtype)], dim=1),
            torch.cat([whole, size], dim=1),
            Merge(HardAssignment(of, stand), descriptor),
        )

    def _taught(self, z: Tensor, s: Tensor, merged: Tensor, size: Tensor) -> Tensor:
        """Return zero, with the gradient that a soft assignment of tokens to the merged ones would give ``w``.

        ``W_jp = softmax_p(−‖w ⊙ (z_j − x̃_p)‖² / τ·mean)``; a mean changes by ``s_j (z_j − x̃_p) / s'_p`` with ``W_jp``.
        """
        w, z = self.weight.to(z.dtype), z.detach()
        a, b = z * w, merged * w
        cost = a.square().sum(-1).unsqueeze(2) + b.square().sum(-1).unsqueeze(1) - 2 * torch.bmm(a, b.transpose(1, 2))
        scale = TEMPERATURE * cost.detach().mean(dim=(1, 2), keepdim=True).clamp_min(TINY)  # all may be equal
        soft = torch.softmax(-cost / scale, dim=-1)
        change = (soft - soft.detach()) * s.unsqueeze(-1) / size.clamp_min(TINY).unsqueeze(1)  # (B, n, m)
        return torch.bmm(change.transpose(1, 2), z) - change.sum(dim=1).unsqueeze(-1) * merged

    def learned(self) -> dict[str, float]:
        """Return η, where there is a step, and how far the weights of channels lie apart."""
        return {**super().learned(), "weight_std": self.weight.std().item()}


def _summed(x: Tensor, groups: Groups, into: Tensor) -> Tensor:
    """Sum ``(B, n)`` within each group: ``(B, m)``."""
    return x.gather(1, groups.first).scatter_add(1, into, x.gather(1, groups.gone))


def descend(z: Tensor, share: Tensor, statistics: Statistics, eta: Tensor, cells: int = 1) -> tuple[Tensor, Tensor]:
    """One exponentiated-gradient step on the bound CEB_γ: the descriptor and ε (``docs/method.md``, item 5).

        v_j = z_j after a layer norm without parameters
        d   = Σ_j (Σ_p G⁰_jp / |M|) v_j                    the plain mean of the |M| merged tokens: the descriptor
        g   = ∂ CEB_γ / ∂ d,   ζ_j = v_j · g               how the bound grows with the weight of token j
        ε_j = −η (ζ_j − mean ζ) / sqrt(var ζ + 1e-12)

    Merged tokens weigh the same whatever their size: the mean over original tokens would not depend on the mask.
    Multiplying weights by ``e^ε`` and normalising is a gradient step that keeps them positive and their sum one.
    Whether a model has the step is part of its plan. Where it has, it is computed even while η is zero or nothing is
    fitted, so that MACs and exported graphs do not change with training.

    Args:
        z: tokens ``(B, N, D)``, without prefix tokens.
        share: ``Σ_p G⁰_jp / |M|``, ``(B, N)``, summing to one.
        statistics: the site's.
        eta: η, a scalar.
        cells: consecutive entries of the batch that share one descriptor: cells see too little of an image each.

    Returns:
        d ``(B / cells, D)`` and ε ``(B, N)``.
    """
    # v is written once and read twice. Both products follow from mean and deviation of z as well, without v, but one
    # fused layer norm takes a fifth of the time of a variance.
    v = F.layer_norm(lifted(z), z.shape[-1:])
    descriptor = torch.bmm(share.to(v.dtype).unsqueeze(1), v).squeeze(1)
    descriptor = descriptor.view(-1, cells, descriptor.shape[-1]).mean(dim=1) if cells > 1 else descriptor
    gradient = statistics.step_direction(descriptor).to(v.dtype)
    gradient = gradient.repeat_interleave(cells, dim=0) if cells > 1 else gradient
    zeta = torch.bmm(v, gradient.unsqueeze(-1)).squeeze(-1)
    # Standardised, so that η means the same at every site and at any scale of the bound. The deviation is a constant
    # to autograd: its gradient explodes where all ζ are equal.
    # As a product: OpenVINO 2026.4 turns the fraction η / (std + 1e-6) upside down where η is a constant.
    away = zeta.mean(dim=1, keepdim=True) - zeta
    scale = (away.detach().square().mean(dim=1, keepdim=True) + 1e-12).rsqrt()
    return descriptor, eta.to(v.dtype) * away * scale


class GridMask(PoolGrid):
    """The learnable mask of a map: ``G_jp ∝ K_jp exp(α cos(k_j, Σ_l K_lp k_l) + ε_j)``, columns summing to one.

    K is the exact fractional overlap of the boxes; α and η start from 0, where the mask is K itself: average pooling
    (``docs/method.md``, "Grid sites").

    Args:
        dim: width D of the tokens.
        key_dim: width d of the keys.
        grid: (H, W) as planned; at another size the same shares of height and width are kept.
        grid_out: (H', W').
        statistics: of the descriptors, where the mask has the information-bottleneck step.
    """

    def __init__(
        self, dim: int, key_dim: int, grid: Grid, grid_out: Grid, statistics: Statistics | None = None
    ) -> None:
        super().__init__(dim, grid, grid_out)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.statistics = statistics
        if statistics is not None:
            self.eta = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Merge]:
        """Merge ``(B, H·W, D)`` tokens that lie line by line on ``grid``."""
        index, share, grid_out = self.boxes(tokens, grid)
        batch, count = tokens.shape[:2]
        with full_precision(tokens):
            # Select and spread: the boxes say who may meet, α how much tokens unlike the middle of their box lose.
            z = lifted(tokens)
            near = lifted(self.key(tokens.to(self.alpha.dtype)))[:, index]  # (B, P, k, d)
            share = share.to(z.dtype)
            centre = torch.matmul(share.unsqueeze(1), near)  # (B, P, 1, d)
            # the cosine, written out: not every runtime knows torch's operator (OpenVINO 2026.4)
            alike = (F.normalize(near, dim=-1, eps=1e-8) * F.normalize(centre, dim=-1, eps=1e-8)).sum(dim=-1)
            logits = share.log() + self.alpha.to(z.dtype) * alike  # −∞ where boxes do not overlap
            # Step, the same as that of a sequence.
            descriptor = None
            if self.statistics is not None:
                start = logits.softmax(dim=-1)
                weight = z.new_zeros(batch, count).scatter_add(1, index.flatten().expand(batch, -1), start.flatten(1))
                descriptor, tilt = descend(z, weight / len(index), self.statistics, self.eta)
                logits = logits + tilt[:, index]
            # Merge. A softmax of logits plus ε is the product with e^ε, normalised: columns sum to one.
            mask = logits.softmax(dim=-1)
            merged = gathered(tokens, index, mask.to(tokens.dtype))
        return merged, grid_out, Merge(GridAssignment(index, mask, count), descriptor)


def _build(place: Place, keys: Keys) -> nn.Module:
    statistics = Statistics(place.dim, max(1, place.classes), place.clusters) if place.step else None
    device, dtype = keys.weight.device, place.dtype or torch.float32
    if place.grid is None or place.grid_out is None:
        counts = (place.tokens_in, place.tokens_out, place.prefix)
        return MaskModule(place.dim, *counts, place.rounds, statistics).to(device, dtype)
    mask = GridMask(place.dim, place.key_dim, place.grid, place.grid_out, statistics).to(device, dtype)
    with torch.no_grad():
        mask.key.weight.copy_(keys.weight)
    return mask


def _macs(place: Place) -> int:
    """Costs ``⌊n/2⌋·⌈n/2⌉·D`` in each round of n tokens; the step, where there is one, ``2AD + 2AC + 2ND``.

    N is without prefix tokens. On a map, of whose P boxes each meets k others, keys are ``N·D·d``, similarities
    ``P·k·d`` and merging ``P·k·D``. All of it in each cell, but ``2AD + 2AC`` once a sequence.
    """
    patches = place.tokens_in - place.prefix
    once = 2 * patches * place.dim if place.step else 0
    if place.grid is not None and place.grid_out is not None:
        pairs = grid_overlaps(place.grid, place.grid_out)[0].numel()
        once += (patches * place.dim + pairs) * place.key_dim + pairs * place.dim
    else:
        for leave in leaving_in(place.tokens_in, place.tokens_out, place.rounds, place.prefix):
            once += (patches // 2) * (patches - patches // 2) * place.dim
            patches -= leave
    return place.cells * once + (2 * place.clusters * (place.dim + max(1, place.classes)) if place.step else 0)


def _unmerge_macs(place: Place) -> int:
    """Nothing in a sequence, where each token is given its group's; on a map ``NPD``."""
    return 0 if place.grid is None else dense_unmerge_macs(place)


METHOD = Method("ltm", 2, SCOPES, _build, _macs, _unmerge_macs, rounds=3)
