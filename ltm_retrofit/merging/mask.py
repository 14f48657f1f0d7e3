"""The mask modules: N tokens in, P tokens out, all shapes known in advance (METHOD, "The mask module").

Notation of Wang & Yang, *Efficient Visual Transformer by Learnable Token Merging* (TPAMI 2025): tokens ``z``, sizes
``s``, assignment ``W`` (rows sum to one), mask ``G`` (columns sum to one), ``x̃ = Gᵀ z``. Destinations and sources
are those of bipartite soft matching (Bolya et al., *Token Merging*, ICLR 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.matching import TINY, SimilarityMask, lifted, partition, pick, split, take, unmerge_macs
from ltm_retrofit.merging.methods import SCOPES, Grid, Keys, Method, Place
from ltm_retrofit.merging.pool import PoolGrid, gathered, grid_overlaps
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import GridAssignment, Merged, Step

#: temperature of the softmax over destinations in a freshly converted model
INITIAL_TEMPERATURE = 0.01
#: how far from the last similarity that leaves a source still learns whether to (METHOD, item 4)
GATE_TEMPERATURE = 0.1


class MaskModule(SimilarityMask):
    """A learnable mask, initialised from a block's own key projection: see METHOD, items 1 to 5.

    Args:
        dim: width D of the tokens.
        key_dim: width d of the similarity's keys.
        tokens_in: N.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.
        classes: C, of the statistics that the information-bottleneck step uses.
        clusters: A, likewise.
    """

    #: whether training teaches who leaves, too
    gated = False
    statistics: Statistics

    def __init__(
        self, dim: int, key_dim: int, tokens_in: int, tokens_out: int, prefix: int, classes: int, clusters: int = 64
    ) -> None:
        super().__init__(dim, tokens_in, tokens_out, prefix)
        self.key = nn.Linear(dim, key_dim)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))
        self.eta = nn.Parameter(torch.zeros(()))
        self.statistics = Statistics(dim, classes, clusters)

    def forward(
        self,
        inner: Tensor,
        tokens: Tensor,
        sizes: Tensor | None,
        key: tuple[Tensor, Tensor | None] | None = None,
        groups: int = 1,
        padded: bool = False,
    ) -> Merged:
        """Merge.

        Args:
            inner: ``(B, N, D)`` the attention's own input h.
            tokens: ``(B, N, D)`` the residual stream after attention, z.
            sizes: ``(B, N)`` how many original tokens each stands for; None before the first merge.
            key: the block's present key map, which a learnable mask has left behind and ignores.
            groups: consecutive entries of the batch that belong to one image and share its descriptor.
            padded: whether tokens of size zero only fill up.

        Raises:
            CountError: where there is no patch token.
        """
        counts = self.counts(tokens)
        with full_precision(tokens):
            keys = self.key(inner[:, self.prefix :].to(self.key.weight.dtype))
            leaving, staying, similarity = self.choose(lifted(keys), counts, self.valid(sizes, padded))
            gate = None
            if self.gated and self.training and leaving is not None and leaving.shape[1]:
                gate = self.gate(similarity, leaving)
            moving = leaving if gate is None else None  # with a gate all sources do, most of them by nothing
            similarity = take(similarity, moving)
            weights = torch.softmax(similarity * self.log_scale.exp().to(similarity.dtype), dim=-1)
            sizes = similarity.new_ones(tokens.shape[:2]) if sizes is None else sizes
            source, destination = split(tokens[:, self.prefix :], counts)
            source_size, size = split(sizes[:, self.prefix :], counts)
            brought = pick(source_size, moving).unsqueeze(-1) * weights  # s_a W_ab
            if gate is not None:
                brought = gate.unsqueeze(-1) * brought
                source_size = source_size * (1 - gate)  # what stays where it is
            # where nothing but padding meets, sizes are zero
            new_size = (size + brought.sum(dim=1)).clamp_min(TINY)

            share = (brought / new_size.unsqueeze(1)).sum(dim=-1)  # Σ_p G⁰_jp of each source that leaves
            if gate is not None:  # a source that stays is a column of its own
                share = share + 1 - gate
            elif leaving is not None:
                share = share.new_ones(source.shape[:2]).scatter(1, leaving, share)
            remain = counts.tokens_out - self.prefix
            descriptor, source_tilt, tilt = self.descend(source, destination, share, size / new_size, remain, groups)
            brought_tilted = pick(source_tilt, moving).exp().unsqueeze(-1) * brought
            own = tilt.exp() * size
            total = (own + brought_tilted.sum(dim=1)).clamp_min(TINY)

            added = torch.bmm(
                (brought_tilted / total.unsqueeze(1)).transpose(1, 2).to(tokens.dtype), take(source, moving)
            )
            merged = torch.addcmul(added, (own / total).unsqueeze(-1).to(tokens.dtype), destination)
            out = torch.cat([tokens[:, : self.prefix], take(source, staying), merged], dim=1)
            out_sizes = torch.cat([sizes[:, : self.prefix], pick(source_size, staying), new_size], dim=1)
            weights = weights if gate is None else take(weights, leaving)
        return Merged(out, out_sizes, Step(self.assignment(leaving, staying, weights, counts), descriptor))

    def gate(self, similarity: Tensor, leaving: Tensor) -> Tensor:
        """Return 1 for each source that leaves and 0 for the others ``(B, sources)``, with a gradient (METHOD, item 4).

        The gradient is that of ``σ((m − θ) / 0.1)``, m a source's largest similarity and θ halfway between the last
        that leaves and the first that stays.
        """
        most = similarity.amax(dim=-1)
        hard = torch.zeros_like(most).scatter(1, leaving, 1.0)
        edges = most.detach().sort(dim=-1, descending=True).values[:, leaving.shape[1] - 1 : leaving.shape[1] + 1]
        soft = torch.sigmoid((most - edges.mean(dim=-1, keepdim=True)) / GATE_TEMPERATURE)
        return hard + (soft - soft.detach())

    def descend(
        self, source: Tensor, destination: Tensor, source_share: Tensor, share: Tensor, remain: int, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One exponentiated-gradient step on the bound: the descriptor ``(B, D)``, and ε of sources and destinations.

        ``v`` is z after a parameter-free layer norm. It is never formed: ``Σ c_j v_j`` and ``v_j · g`` follow from
        mean and deviation of z, which saves passes over the tokens. ``remain`` columns are not prefix tokens.
        """
        halves, descriptors = [], []
        for half, weight in ((lifted(source), source_share), (lifted(destination), share)):
            variance, mean = torch.var_mean(half, dim=-1, correction=0)
            inverse = torch.rsqrt(variance + 1e-5)
            scaled = weight.to(half.dtype) * inverse
            total = torch.bmm(scaled.unsqueeze(1), half).squeeze(1)
            descriptors.append(total - (scaled * mean).sum(dim=1, keepdim=True))
            halves.append((half, mean, inverse))
        descriptor = (descriptors[0] + descriptors[1]) / remain
        descriptor = descriptor.view(-1, groups, self.dim).mean(dim=1) if groups > 1 else descriptor
        gradient = self.statistics.step_direction(descriptor).to(descriptor.dtype)
        gradient = gradient.repeat_interleave(groups, dim=0) if groups > 1 else gradient
        lean = gradient.sum(dim=-1, keepdim=True)
        zeta = [
            (torch.bmm(half, gradient.unsqueeze(-1)).squeeze(-1) - mean * lean) * inverse
            for half, mean, inverse in halves
        ]
        every = torch.cat(zeta, dim=1)
        deviation = every.detach().std(dim=1, keepdim=True, correction=0)
        step = self.eta.to(every.dtype) / (deviation + 1e-6)
        middle = every.mean(dim=1, keepdim=True)
        return descriptor, step * (middle - zeta[0]), step * (middle - zeta[1])


class GridMask(PoolGrid):
    """A learnable mask on a grid: ``G_jp ∝ K_jp exp(α cos(k_j, Σ_l K_lp k_l) + ε_j)``, columns summing to one.

    K is the exact fractional overlap of the boxes; α starts from 0, where the mask is K itself.

    Args:
        dim: width D of the tokens.
        key_dim: width d of the keys.
        grid: (H, W) as planned; at another size the same shares of rows and columns are kept.
        kept: (H', W').
        classes: C, of the statistics that the information-bottleneck step uses.
        clusters: A, likewise.
    """

    statistics: Statistics

    def __init__(self, dim: int, key_dim: int, grid: Grid, kept: Grid, classes: int, clusters: int = 64) -> None:
        super().__init__(dim, grid, kept)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.eta = nn.Parameter(torch.zeros(()))
        self.statistics = Statistics(dim, classes, clusters)

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Step]:
        """Merge ``(B, H·W, D)`` tokens that lie row by row on ``grid``."""
        index, share, kept = self.boxes(tokens, grid)
        batch, count = tokens.shape[:2]
        with full_precision(tokens):
            z = lifted(tokens)
            keys = lifted(self.key(tokens.to(self.key.weight.dtype)))
            near = keys[:, index]  # (B, P, k, d)
            share = share.to(z.dtype)
            centre = torch.matmul(share.unsqueeze(1), near)  # (B, P, 1, d)
            alike = F.cosine_similarity(near, centre, dim=-1)
            logits = share.log() + self.alpha.to(z.dtype) * alike  # −∞ where boxes do not overlap
            start = logits.softmax(dim=-1)
            weight = z.new_zeros(batch, count).scatter_add(1, index.flatten().expand(batch, -1), start.flatten(1))
            descriptor, tilt = self.descend(z, weight / len(index))
            mask = (logits + tilt[:, index]).softmax(dim=-1)
            merged = gathered(tokens, index, mask.to(tokens.dtype))
        return merged, kept, Step(GridAssignment(index, mask, count), descriptor)

    def descend(self, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """One exponentiated-gradient step on the bound: the descriptor ``(B, D)`` and ε ``(B, N)`` (METHOD, item 5)."""
        v = F.layer_norm(z, z.shape[-1:])
        descriptor = torch.matmul(weight.unsqueeze(1), v).squeeze(1)
        gradient = self.statistics.step_direction(descriptor).to(z.dtype)
        zeta = torch.matmul(v, gradient.unsqueeze(-1)).squeeze(-1)
        deviation = zeta.detach().std(dim=1, keepdim=True, correction=0)
        return descriptor, self.eta.to(z.dtype) * (zeta.mean(dim=1, keepdim=True) - zeta) / (deviation + 1e-6)


def _build(place: Place, keys: Keys) -> nn.Module:
    """Make a mask whose keys are the host's own."""
    mask: MaskModule | GridMask
    statistics = max(1, place.classes), place.clusters
    if place.grid is None or place.kept is None:
        mask = MaskModule(place.dim, place.key_dim, place.tokens_in, place.tokens_out, place.prefix, *statistics)
    else:
        mask = GridMask(place.dim, place.key_dim, place.grid, place.kept, *statistics)
    mask = mask.to(keys.weight.device, place.dtype or torch.float32)
    with torch.no_grad():
        mask.key.weight.copy_(keys.weight)
        if isinstance(mask, MaskModule):
            mask.key.bias.zero_() if keys.bias is None else mask.key.bias.copy_(keys.bias)
    return mask


def _macs(place: Place) -> int:
    """Keys, similarities, products with W, and the step."""
    step = 2 * place.clusters * (place.dim + max(1, place.classes))  # once a sequence, whatever its cells
    if place.grid is not None and place.kept is not None:
        near = grid_overlaps(place.grid, place.kept)[0].numel()
        count = place.tokens_in
        return count * place.dim * place.key_dim + near * (place.key_dim + place.dim) + 2 * count * place.dim + step
    _, _, sources, destinations = partition(place.tokens_in, place.tokens_out, place.prefix)
    patches = sources + destinations
    once = (patches * place.dim + sources * destinations) * place.key_dim
    once += (place.tokens_in - place.tokens_out) * destinations * place.dim + 2 * patches * place.dim
    return place.groups * once + step


def _unmerge_macs(place: Place) -> int:
    """Return the multiply-adds of ``W x̃``."""
    if place.grid is not None:
        return place.tokens_in * place.tokens_out * (place.width or place.dim)
    return unmerge_macs(place)


METHOD = Method("ltm", 1, SCOPES, _build, _macs, _unmerge_macs)
