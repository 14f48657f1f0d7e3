"""What merged tokens carry with them.

Sizes and assignments travel as an attribute of the token tensor itself, so a model holds no state between two
blocks: copies, threads, gradient checkpointing, ``torch.compile`` and ``torch.export`` all keep working.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ltm_retrofit.merging.statistics import Statistics

ATTRIBUTE = "ltm_carried"


class Assignment(NamedTuple):
    """Where each of N tokens went among P: the matrix W, rows summing to one, in factored form.

    ``kept[b, p]`` is the input position of output token p; the last ``weights.shape[-1]`` output tokens are the
    destinations; ``merged[b, a]`` is the input position of source a and ``weights[b, a]`` its spread over them.
    """

    kept: Tensor  # (B, P) int64
    merged: Tensor  # (B, N − P) int64
    weights: Tensor  # (B, N − P, destinations)

    @property
    def whole(self) -> int:
        """N, how many tokens went in."""
        return self.kept.shape[1] + self.merged.shape[1]

    def unmerge(self, tokens: Tensor) -> Tensor:
        """``W x̃``: bring ``(B, P, D)`` back to ``(B, N, D)``. A constant survives merging and unmerging."""
        destinations = tokens[:, tokens.shape[1] - self.weights.shape[-1] :]
        spread = torch.bmm(self.weights.to(tokens.dtype), destinations)
        everyone = torch.cat([tokens, spread], dim=1)
        back = torch.cat([self.kept, self.merged], dim=1).argsort(dim=1)
        return everyone.gather(1, back.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))

    def dense(self) -> Tensor:
        """Return W as a dense ``(B, N, P)`` matrix."""
        batch, count = self.kept.shape
        return self.unmerge(torch.eye(count, dtype=self.weights.dtype, device=self.weights.device).repeat(batch, 1, 1))


class DenseAssignment(NamedTuple):
    """The matrix W itself, for masks whose columns overlap: average pooling."""

    kept: Tensor  # (B, P) int64: the input position that stands for each output token
    matrix: Tensor  # (N, P), rows summing to one

    @property
    def whole(self) -> int:
        """N, how many tokens went in."""
        return self.matrix.shape[0]

    def unmerge(self, tokens: Tensor) -> Tensor:
        """``W x̃``: bring ``(B, P, D)`` back to ``(B, N, D)``."""
        return torch.matmul(self.matrix.to(tokens.dtype), tokens)

    def dense(self) -> Tensor:
        """Return W as a dense ``(B, N, P)`` matrix."""
        return self.matrix.expand(self.kept.shape[0], -1, -1)


class GridAssignment(NamedTuple):
    """The few entries of a mask on a grid: output token p gathers ``near[p]`` of N tokens with weights ``mask[b, p]``.

    W is that mask with its rows scaled to one.
    """

    near: Tensor  # (P, k) int64
    mask: Tensor  # (B, P, k)
    whole: int  # N

    def dense(self) -> Tensor:
        """Return W as a dense ``(B, N, P)`` matrix."""
        matrix = self.mask.new_zeros(len(self.mask), len(self.near), self.whole)
        matrix = matrix.scatter_add(2, self.near.expand(len(self.mask), -1, -1), self.mask).transpose(1, 2)
        return matrix / matrix.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)

    def unmerge(self, tokens: Tensor) -> Tensor:
        """``W x̃``: bring ``(B, P, D)`` back to ``(B, N, D)``."""
        return torch.matmul(self.dense().to(tokens.dtype), tokens)

    @property
    def kept(self) -> Tensor:
        """The input position ``(B, P)`` that weighs most in each output token."""
        return self.near.expand(len(self.mask), -1, -1).gather(2, self.mask.argmax(-1, keepdim=True)).squeeze(2)


class Step(NamedTuple):
    """What one site did: its assignment, and the descriptor ``(B, D)`` of its merged tokens where it has one."""

    assignment: Assignment | DenseAssignment | GridAssignment
    descriptor: Tensor | None


class Merged(NamedTuple):
    """What a mask hands on: tokens ``(B, P, D)``, sizes ``(B, P)`` and the step that led there."""

    tokens: Tensor
    sizes: Tensor
    step: Step


class Mask(nn.Module):
    """Base of all masks."""

    #: whether ``forward`` wants the block's present key map
    wants_key = False

    def __init__(self) -> None:
        super().__init__()
        #: of its descriptors; None where nothing is learned
        self.statistics: Statistics | None = None


class Carried(NamedTuple):
    """What the tokens of one tensor know of their past: sizes ``(B, P)`` and one `Step` for each site passed.

    Where they are ``padded``, a token that only fills up has size zero.
    """

    sizes: Tensor
    steps: tuple[Step, ...]
    padded: bool = False


def carried_by(tokens: Tensor) -> Carried | None:
    """Return what a token tensor carries, or None where nothing was merged into it."""
    return cast("Carried | None", getattr(tokens, ATTRIBUTE, None))


def carry(tokens: Tensor, carried: Carried | None) -> Tensor:
    """Let a token tensor carry what its predecessor carried; returns the same tensor."""
    if carried is not None:
        setattr(tokens, ATTRIBUTE, carried)
    return tokens


def positions(steps: tuple[Step, ...]) -> Tensor:
    """Return the original position ``(B, P)`` of each present token; a merged one stands where its destination was."""
    present = steps[0].assignment.kept
    for step in steps[1:]:
        present = present.gather(1, step.assignment.kept)
    return present


def unmerge_all(tokens: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """Bring ``(B, P, D)`` back to the token count before the first merge, one assignment after the other."""
    for step in reversed(steps):
        tokens = step.assignment.unmerge(tokens)
    return tokens


def accumulated(steps: tuple[Step, ...]) -> Tensor:
    """Return ``W¹W²…`` ``(B, N, P)``: where each original token is now."""
    return unmerge_all(steps[-1].assignment.dense(), steps[:-1])
