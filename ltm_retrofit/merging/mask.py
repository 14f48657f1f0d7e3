"""``"ltm"``: the learnable mask, N tokens in and P out, all shapes known in advance.

Wang & Yang, *Efficient Visual Transformer by Learnable Token Merging* (TPAMI 2025), on the matching of Bolya et al.
`MaskModule.forward` tells it in order; the numbers are those of the items in ``docs/method.md``, "The mask module".

    select   Which r = N − P tokens leave? Those a with the largest ``max_b cos(k_a, k_b)``.               (1, 2)
    spread   Into which tokens b? ``W_ab = softmax_b(cos(k_a, k_b) / τ)``; rows of W sum to one.           (3)
    step     How much of each? One step down the bound multiplies the weight of token j by ``e^{ε_j}``.    (5)
    merge    ``x̃ = Gᵀ z``, ``G_jp ∝ s_j W_jp e^{ε_j}``; columns of G sum to one.

Tokens are ``z``, their keys ``k``, sizes ``s``. W and G are not to be confused: W says where each token *goes*, and
brings it back after the blocks (``W x̃``). G says what each merged token is *made of*. `GridMask` does the same on a
map, where boxes that overlap take the place of select and spread.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.matching import SimilarityMask, lifted, partition, take, unmerge_macs
from ltm_retrofit.merging.methods import SCOPES, Grid, Keys, Method, Place
from ltm_retrofit.merging.pool import PoolGrid, gathered, grid_overlaps
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import TINY, GridAssignment, Merge, Merged, dense_unmerge_macs

#: τ, the temperature of the softmax over destinations in a freshly converted model
INITIAL_TEMPERATURE = 0.01


class MaskModule(SimilarityMask):
    """The learnable mask of a sequence, initialised from the host's own keys.

    Args:
        dim: width D of the tokens.
        key_dim: width d of the similarity's keys.
        tokens_in: N.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.
        classes: C, of the statistics that the information-bottleneck step uses.
        clusters: A, likewise.
    """

    statistics: Statistics

    def __init__(
        self, dim: int, key_dim: int, tokens_in: int, tokens_out: int, prefix: int, classes: int, clusters: int = 64
    ) -> None:
        super().__init__(dim, tokens_in, tokens_out, prefix)
        self.key = nn.Linear(dim, key_dim)
        # As a logarithm, so that no step of an optimiser makes a temperature negative.
        self.log_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))
        # From zero: a freshly converted model merges by the pretrained similarity alone, and the step comes in as
        # far as training finds it of use.
        self.eta = nn.Parameter(torch.zeros(()))
        self.statistics = Statistics(dim, classes, clusters)

    def forward(
        self,
        inner: Tensor,
        tokens: Tensor,
        sizes: Tensor | None,
        key: Keys | None = None,
        cells: int = 1,
        padded: bool = False,
    ) -> Merged:
        """Merge: select, spread, step. Arguments: see `Mask`; ``key`` is ignored, for the mask has learned its own.

        Raises:
            CountError: where there is no patch token.
        """
        counts = self.counts(tokens)
        # In float32 whatever the model computes in. In the three digits of bfloat16 many similarities are equal, and
        # who leaves would be a matter of chance.
        with full_precision(tokens):
            # Select: r sources, by their most similar destination. The keys are those of the attention's own input,
            # not of the stream: there the host has learned what is alike.
            keys = lifted(self.key(inner[:, self.prefix :].to(self.key.weight.dtype)))
            leaving, staying, similarity = self.select(keys, counts, sizes if padded else None)

            # Spread: W_ab = softmax_b(cos(k_a, k_b) / τ). A hard choice of one destination, as in ToMe, would give
            # neither keys nor temperature a gradient. Rows sum to one, so nothing of a token is lost.
            weights = torch.softmax(take(similarity, leaving) * self.log_scale.exp().to(similarity.dtype), dim=-1)
            sizes = similarity.new_ones(tokens.shape[:2]) if sizes is None else sizes
            source, destination = self.halves(tokens, counts)
            source_size, size = self.halves(sizes, counts)
            brought = take(source_size, leaving).unsqueeze(-1) * weights  # s_a W_ab
            # s' = Wᵀ s. Sizes count original tokens, so ε never enters them: their sum stays whatever is learned.
            new_size = (size + brought.sum(dim=1)).clamp_min(TINY)

            # Step: ε_j. It starts from Σ_p G⁰_jp / |M|, how much of the mean merged token is token j. G⁰ is G without
            # ε, M its columns without prefix tokens. A source that stays is a column of its own, so its sum is one.
            share = (brought / new_size.unsqueeze(1)).sum(dim=-1)
            if leaving is not None:
                share = share.new_ones(source.shape[:2]).scatter(1, leaving, share)
            share = torch.cat([share, size / new_size], dim=1) / (counts.tokens_out - self.prefix)
            z = torch.cat([source, destination], dim=1)
            descriptor, tilt = descend(z, share, self.statistics, self.eta, cells)
            source_tilt, tilt = tilt[:, : counts.partition.sources], tilt[:, counts.partition.sources :]

            # Merge: x̃ = Gᵀ z, G_jp = s_j W_jp e^{ε_j} / Σ_k s_k W_kp e^{ε_k}. Columns sum to one: a merged token is a
            # mean of tokens, as large as what the next layers know, and equal tokens merge into the same again.
            brought = take(source_tilt, leaving).exp().unsqueeze(-1) * brought
            own = tilt.exp() * size
            total = (own + brought.sum(dim=1)).clamp_min(TINY)
            columns = (brought / total.unsqueeze(1)).transpose(1, 2).to(tokens.dtype)
            merged = torch.bmm(columns, take(source, leaving))
            merged = torch.addcmul(merged, (own / total).unsqueeze(-1).to(tokens.dtype), destination)
        return Merged(
            self.together(tokens, source, staying, merged),
            self.together(sizes, source_size, staying, new_size),
            Merge(self.assignment(leaving, staying, weights, counts), descriptor),
        )

    def learned(self) -> dict[str, float]:
        """Return η and the temperature τ."""
        return {"eta": self.eta.item(), "temperature": math.exp(-self.log_scale.item())}


def descend(z: Tensor, share: Tensor, statistics: Statistics, eta: Tensor, cells: int = 1) -> tuple[Tensor, Tensor]:
    """One exponentiated-gradient step on the bound CEB_γ: the descriptor and ε (``docs/method.md``, item 5).

        v_j = z_j after a layer norm without parameters
        d   = Σ_j (Σ_p G⁰_jp / |M|) v_j                    the plain mean of the |M| merged tokens: the descriptor
        g   = ∂ CEB_γ / ∂ d,   ζ_j = v_j · g               how the bound grows with the weight of token j
        ε_j = −η (ζ_j − mean ζ) / (std ζ + 1e-6)

    Merged tokens weigh the same whatever their size: the mean over original tokens would not depend on the mask.
    Multiplying weights by ``e^ε`` and normalising is a gradient step that keeps them positive and their sum one.
    Computed even while η is zero or nothing is fitted, so that MACs and exported graphs do not change with training.

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
    deviation = zeta.detach().std(dim=1, keepdim=True, correction=0)
    return descriptor, eta.to(v.dtype) * (zeta.mean(dim=1, keepdim=True) - zeta) / (deviation + 1e-6)


class GridMask(PoolGrid):
    """The learnable mask of a map: ``G_jp ∝ K_jp exp(α cos(k_j, Σ_l K_lp k_l) + ε_j)``, columns summing to one.

    K is the exact fractional overlap of the boxes; α and η start from 0, where the mask is K itself: average pooling
    (``docs/method.md``, "Grid sites").

    Args:
        dim: width D of the tokens.
        key_dim: width d of the keys.
        grid: (H, W) as planned; at another size the same shares of height and width are kept.
        grid_out: (H', W').
        classes: C, of the statistics that the information-bottleneck step uses.
        clusters: A, likewise.
    """

    statistics: Statistics

    def __init__(self, dim: int, key_dim: int, grid: Grid, grid_out: Grid, classes: int, clusters: int = 64) -> None:
        super().__init__(dim, grid, grid_out)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.eta = nn.Parameter(torch.zeros(()))
        self.statistics = Statistics(dim, classes, clusters)

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Merge]:
        """Merge ``(B, H·W, D)`` tokens that lie line by line on ``grid``."""
        index, share, grid_out = self.boxes(tokens, grid)
        batch, count = tokens.shape[:2]
        with full_precision(tokens):
            # Select and spread: the boxes say who may meet, α how much tokens unlike the middle of their box lose.
            z = lifted(tokens)
            near = lifted(self.key(tokens.to(self.key.weight.dtype)))[:, index]  # (B, P, k, d)
            share = share.to(z.dtype)
            centre = torch.matmul(share.unsqueeze(1), near)  # (B, P, 1, d)
            alike = F.cosine_similarity(near, centre, dim=-1)
            logits = share.log() + self.alpha.to(z.dtype) * alike  # −∞ where boxes do not overlap
            # Merge, the same as that of a sequence.
            start = logits.softmax(dim=-1)
            weight = z.new_zeros(batch, count).scatter_add(1, index.flatten().expand(batch, -1), start.flatten(1))
            descriptor, tilt = descend(z, weight / len(index), self.statistics, self.eta)
            # Merge. A softmax of logits plus ε is the product with e^ε, normalised: columns sum to one.
            mask = (logits + tilt[:, index]).softmax(dim=-1)
            merged = gathered(tokens, index, mask.to(tokens.dtype))
        return merged, grid_out, Merge(GridAssignment(index, mask, count), descriptor)


def _build(place: Place, keys: Keys) -> nn.Module:
    mask: MaskModule | GridMask
    widths, statistics = (place.dim, place.key_dim), (max(1, place.classes), place.clusters)
    if place.grid is not None and place.grid_out is not None:
        mask = GridMask(*widths, place.grid, place.grid_out, *statistics)
    else:
        mask = MaskModule(*widths, place.tokens_in, place.tokens_out, place.prefix, *statistics)
    mask = mask.to(keys.weight.device, place.dtype or torch.float32)
    with torch.no_grad():
        mask.key.weight.copy_(keys.weight)
        if isinstance(mask, MaskModule):  # the keys of a map have no bias
            mask.key.bias.copy_(torch.zeros_like(mask.key.bias) if keys.bias is None else keys.bias)
    return mask


def _macs(place: Place) -> int:
    """Keys ``N·D·d``, similarities ``|A|·|B|·d``, merging ``r·|B|·D``, and the step ``2AD + 2AC + 2ND``.

    N is without prefix tokens, A and B are sources and destinations. On a map, of whose P boxes each meets k others,
    similarities and merging are ``P·k·d`` and ``P·k·D``. All of it in each cell, but ``2AD + 2AC`` once a sequence.
    """
    patches, step = place.tokens_in - place.prefix, 2 * place.clusters * (place.dim + max(1, place.classes))
    if place.grid is not None and place.grid_out is not None:
        compared = merged = grid_overlaps(place.grid, place.grid_out)[0].numel()
    else:
        _, _, sources, destinations = partition(place.tokens_in, place.tokens_out, place.prefix)
        compared, merged = sources * destinations, (place.tokens_in - place.tokens_out) * destinations
    once = (patches * place.dim + compared) * place.key_dim + (merged + 2 * patches) * place.dim
    return place.cells * once + step


def _unmerge_macs(place: Place) -> int:
    return unmerge_macs(place) if place.grid is None else dense_unmerge_macs(place)


METHOD = Method("ltm", 1, SCOPES, _build, _macs, _unmerge_macs)
