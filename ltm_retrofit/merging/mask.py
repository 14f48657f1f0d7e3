"""The mask modules: N tokens in, P tokens out, all shapes known in advance (METHOD, "The mask module").

Notation of Wang & Yang, *Efficient Visual Transformer by Learnable Token Merging* (TPAMI 2025): tokens ``z``, sizes
``s``, assignment ``W`` (rows sum to one), mask ``G`` (columns sum to one), ``x̃ = Gᵀ z``. Destinations and sources
are those of bipartite soft matching (Bolya et al., *Token Merging*, ICLR 2023).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.partition import Counts, kept_at, partition, sources_of, split
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import Assignment, Step

#: temperature of the softmax over destinations in a freshly converted model
INITIAL_TEMPERATURE = 0.01
#: how far from the last similarity that leaves a source still learns whether to (METHOD, item 4)
GATE_TEMPERATURE = 0.1
#: far below the size of any token, and no zero
TINY = 1e-12
#: above what nothing but filling adds up to
FILLING = 1e-6


class Merged(NamedTuple):
    """What a mask hands on: tokens ``(B, P, D)``, sizes ``(B, P)`` and the step that led there."""

    tokens: Tensor
    sizes: Tensor
    step: Step


class SimilarityMask(nn.Module):
    """What the learnable mask and the published baseline share: who merges, by cosine similarity of keys.

    Args:
        dim: width D of the tokens.
        tokens_in: N, as planned; at another N the same share of the patch tokens is kept.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.
    """

    #: whether ``forward`` wants the block's present key map
    wants_key = False
    #: how much of the way from N to P is gone: a fine-tune may begin with all tokens
    reached = 1.0
    source_positions: Tensor

    def __init__(self, dim: int, tokens_in: int, tokens_out: int, prefix: int) -> None:
        super().__init__()
        self.dim, self.tokens_in, self.tokens_out, self.prefix = dim, tokens_in, tokens_out, prefix
        self.partition = partition(tokens_in, tokens_out, prefix)
        self.register_buffer("source_positions", sources_of(tokens_in - prefix, self.partition), persistent=False)

    def extra_repr(self) -> str:
        """Say what the module does in a printed model."""
        return f"{self.tokens_in} → {self.tokens_out} tokens, {self.prefix} prefix"

    def counts(self, tokens: Tensor) -> Counts:
        """Return what to do with ``(B, N, D)`` tokens; P scales with N where N is not the planned one.

        Raises:
            CountError: where there is no patch token.
        """
        count = int(tokens.shape[1])  # a tensor while it is traced
        if count == self.tokens_in and self.reached == 1:
            return Counts(count, self.tokens_out, self.partition, self.source_positions)
        kept = kept_at(count, self.tokens_in, self.tokens_out, self.prefix)
        kept = count - round(self.reached * (count - kept))
        split = partition(count, kept, self.prefix)
        return Counts(count, kept, split, sources_of(count - self.prefix, split).to(tokens.device))

    def choose(self, keys: Tensor, counts: Counts, valid: Tensor | None = None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Choose the sources that leave.

        Args:
            keys: ``(B, patches, d)``, of any length.
            counts: what to do with this many tokens.
            valid: ``(B, patches)`` bool, where some tokens only fill up: those leave first, and nobody joins them.

        Returns:
            positions among the sources of those that leave ``(B, r)``, or None where all leave; of those that stay,
            ascending; and the similarities of all sources to all destinations ``(B, sources, destinations)``.
        """
        source, destination = split(F.normalize(keys, dim=-1), counts)
        similarity = torch.bmm(source, destination.transpose(1, 2))
        if valid is not None:
            filled_source, filled = (~half for half in split(valid, counts))
            similarity = similarity.masked_fill(filled.unsqueeze(1), -2.0).masked_fill(filled_source.unsqueeze(2), 2.0)
        leave = counts.tokens_in - counts.tokens_out
        if leave == counts.partition.sources:
            return None, torch.zeros(keys.shape[0], 0, dtype=torch.int64, device=keys.device), similarity
        most = similarity.amax(dim=-1)
        if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort; its TopK takes the lower index first, as we do
            order = most.topk(most.shape[-1], dim=-1).indices
        else:
            order = most.argsort(dim=-1, descending=True, stable=True)
        leaving, staying = order[:, :leave], order[:, leave:].sort(dim=-1).values
        return leaving, staying, similarity

    def valid(self, sizes: Tensor | None, padded: bool) -> Tensor | None:
        """Return which patch tokens are more than filling ``(B, patches)``; None where all are."""
        return sizes[:, self.prefix :] > FILLING if padded and sizes is not None else None

    def assignment(self, leaving: Tensor | None, staying: Tensor, weights: Tensor, counts: Counts) -> Assignment:
        """Turn choices among the sources into an `Assignment` over all N tokens."""
        batch = staying.shape[0]
        sources = (counts.sources + self.prefix).expand(batch, -1)
        places = torch.arange(counts.tokens_in, device=staying.device)
        first = places[: self.prefix].expand(batch, -1)
        last = places[self.prefix + counts.partition.offset :: counts.partition.stride].expand(batch, -1)
        kept = torch.cat([first, sources.gather(1, staying), last], dim=1)
        return Assignment(kept, pick(sources, leaving), weights)


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


def lifted(x: Tensor) -> Tensor:
    """Lift half precision to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def take(rows: Tensor, index: Tensor | None) -> Tensor:
    """Gather ``(B, n, D)`` rows by ``(B, k)`` positions; None takes all."""
    return rows if index is None else rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def pick(values: Tensor, index: Tensor | None) -> Tensor:
    """Gather ``(B, n)`` values by ``(B, k)`` positions; None takes all."""
    return values if index is None else values.gather(1, index)
