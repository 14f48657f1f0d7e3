"""What a mask is, and what merged tokens carry with them.

Sizes and assignments travel as an attribute of the token tensor itself, so a model holds no state between two
blocks: copies, threads, gradient checkpointing, ``torch.compile`` and ``torch.export`` all keep working.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.merging.ib import full_precision
from ltm_retrofit.merging.methods import Place
from ltm_retrofit.merging.rounds import rows_at
from ltm_retrofit.merging.statistics import Statistics

ATTRIBUTE = "ltm_carried"
#: far below the size of any token, and no zero: what a sum of sizes is divided by where all of them are padding
TINY = 1e-12


def fixed(size: int) -> int:
    """Return a size as a plain number, also while a graph is traced, where it may be a tensor or a symbol.

    How many tokens leave follows from it by divisions and roundings, site after site. Formulas of symbols for that take
    a compiler minutes. With numbers it makes one graph for each size, in seconds.
    """
    return len(range(int(size)))  # a range is what needs a number of anyone


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
        # Each position occurs once, so sorting them gives the inverse permutation: no token moves through a matrix.
        back = torch.cat([self.kept, self.merged], dim=1).argsort(dim=1)
        return rows_at(everyone, back)

    def dense(self) -> Tensor:
        """Return W as a dense ``(B, N, P)`` matrix."""
        batch, count = self.kept.shape
        return self.unmerge(torch.eye(count, dtype=self.weights.dtype, device=self.weights.device).repeat(batch, 1, 1))


class HardAssignment(NamedTuple):
    """Each of N tokens wholly in one of P groups: a one-hot W.

    ``of[b, j]`` is the group of input token j, and ``kept[b, p]`` the input position that group p stands at.
    """

    of: Tensor  # (B, N) int64
    kept: Tensor  # (B, P) int64

    @property
    def whole(self) -> int:
        """N, how many tokens went in."""
        return self.of.shape[1]

    def unmerge(self, tokens: Tensor) -> Tensor:
        """``W x̃``: bring ``(B, P, D)`` back to ``(B, N, D)``, each token as its group."""
        return rows_at(tokens, self.of)

    def dense(self) -> Tensor:
        """Return W as a dense ``(B, N, P)`` matrix in float32."""
        return F.one_hot(self.of, self.kept.shape[1]).float()


class DenseAssignment(NamedTuple):
    """The matrix W itself, for masks that spread every token over many: average pooling."""

    kept: Tensor  # (B, P) int64: the input position that stands for each output token
    matrix: Tensor  # (N, P) or (B, N, P), rows summing to one

    @property
    def whole(self) -> int:
        """N, how many tokens went in."""
        return self.matrix.shape[-2]

    def unmerge(self, tokens: Tensor) -> Tensor:
        """``W x̃``: bring ``(B, P, D)`` back to ``(B, N, D)``."""
        return torch.matmul(self.matrix.to(tokens.dtype), tokens)

    def dense(self) -> Tensor:
        """Return W as a dense ``(B, N, P)`` matrix."""
        return self.matrix.expand(self.kept.shape[0], -1, -1)


class GridAssignment(NamedTuple):
    """The few entries of a mask on a grid: output token p gathers ``near[p]`` of N tokens with weights ``mask[b, p]``.

    W is that mask with the entries of each input token scaled to a sum of one.
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


class Merge(NamedTuple):
    """What one site did: its assignment, and the descriptor ``(B, D)`` of its merged tokens where it has one."""

    assignment: Assignment | HardAssignment | DenseAssignment | GridAssignment
    descriptor: Tensor | None = None


class Merged(NamedTuple):
    """What a mask hands on: tokens ``(B, P, D)``, sizes ``(B, P)`` and the merge that led there."""

    tokens: Tensor
    sizes: Tensor
    merge: Merge


class Mask(nn.Module):
    """Base of every mask: the module of a site that turns N tokens into P.

    Scopes ``FLOW`` and ``LOCAL`` call ``forward(inner, tokens, sizes, key=None, cells=1, padded=False) -> Merged``:

    - ``inner (B, N, D)``: what the attention read; in ``LOCAL`` the tokens once more.
    - ``tokens (B, N, D)``: what is merged, the stream after the attention. Prefix tokens come first and must stay.
    - ``sizes (B, N)``: how many original tokens each one stands for; None where nothing was merged before.
    - ``key``: the block's present key map, ``weight (d, D)`` and ``bias (d,)`` or None, where the mask ``wants_key``.
    - ``cells``: in ``LOCAL``, so many consecutive entries of the batch are the cells of one sequence.
    - ``padded``: whether tokens of size zero are padding.

    Scope ``GRID`` calls ``forward(tokens, grid) -> (merged, grid_out, merge)``: ``tokens (B, H·W, D)`` line by line,
    ``grid`` (H, W), ``merged (B, H'·W', D)``, ``grid_out`` (H', W'). Such a mask has the planned sizes as attributes,
    ``grid`` and ``grid_out``.

    The shape of what comes out follows from the shape of what goes in and from nothing else: ``torch.compile``, export
    and counting MACs rely on it. Images of another size bring other counts than planned: keep the same share of them
    (`kept_at`). A mask that knows its W leaves the rest to `merge_by`; `methods.register_method` shows one.

    A mask with parameters is trained and logged as one. One that also weighs tokens by a step down the bound sets
    ``self.statistics = Statistics(...)`` and returns the descriptor that they learn from. It draws nothing at random: a
    loaded model would compute something else. Patches come line by line: those of the image in ``FLOW`` (less what
    earlier sites merged), those of a cell in ``LOCAL``. In which order they leave is the mask's choice, but for prefix
    tokens.

    Args:
        tokens_in: N, as planned.
        tokens_out: P.
        prefix: leading tokens that always stay, in place.

    Example:
        >>> import ltm_retrofit as ltm
        >>> ltm.Mask(tokens_in=101, tokens_out=51, prefix=1).kept_at(201)  # another image size, the same share
        101
    """

    #: whether ``forward`` is given the block's present key map
    wants_key = False

    def __init__(self, tokens_in: int, tokens_out: int, prefix: int = 0) -> None:
        super().__init__()
        self.tokens_in, self.tokens_out, self.prefix = tokens_in, tokens_out, prefix
        #: of its descriptors, where it has the step. Set here and not on the class, where it would hide the submodule
        #: of that name
        self.statistics: Statistics | None = None

    def extra_repr(self) -> str:
        """Say what the module does in a printed model."""
        return f"{self.tokens_in} → {self.tokens_out} tokens, {self.prefix} prefix"

    def kept_at(self, count: int) -> int:
        """Return P for ``count`` tokens: the planned one, or as large a share of the patch tokens."""
        if count == self.tokens_in:
            return self.tokens_out
        patches, before, after = (each - self.prefix for each in (count, self.tokens_in, self.tokens_out))
        return self.prefix + max(1, round(patches * after / before))

    def learned(self) -> dict[str, float]:
        """Return the numbers that tell what training made of the mask, for the history of a run: its scalars."""
        return {name: value.item() for name, value in self.named_parameters(recurse=False) if value.ndim == 0}


def merge_by(matrix: Tensor, tokens: Tensor, sizes: Tensor | None) -> Merged:
    """Merge by a dense W: ``s' = Wᵀ s`` and ``x̃_p = Σ_j s_j W_jp z_j / s'_p``, a mean over the original tokens.

    Args:
        matrix: W, ``(N, P)`` or ``(B, N, P)`` in float32, rows summing to one.
        tokens: z ``(B, N, D)``.
        sizes: s ``(B, N)``, or None for ones.

    It costs ``N·P·(D + 1)`` multiply–adds for one sequence.

    Example:
        >>> import torch
        >>> import ltm_retrofit as ltm
        >>> matrix, tokens = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([[[1.0], [3], [7]]])
        >>> merged = ltm.merge_by(matrix, tokens, None)
        >>> merged.tokens.flatten().tolist(), merged.sizes.flatten().tolist()
        ([2.0, 7.0], [2.0, 1.0])
    """
    batch, count = tokens.shape[:2]
    with full_precision(tokens):
        sizes = matrix.new_ones(batch, count) if sizes is None else sizes.to(matrix.dtype)
        merged_sizes = torch.matmul(sizes.unsqueeze(1), matrix).squeeze(1).clamp_min(TINY)
        # Small weights first, wide tokens afterwards: dividing x̃ instead would be one more pass over (B, P, D).
        weighted = (sizes.unsqueeze(-1) * matrix / merged_sizes.unsqueeze(1)).to(tokens.dtype)
        merged = torch.matmul(weighted.transpose(1, 2), tokens)
    kept = matrix.argmax(dim=-2).expand(batch, -1)
    return Merged(merged, merged_sizes, Merge(DenseAssignment(kept, matrix)))


def dense_unmerge_macs(place: Place) -> int:
    """``NPD``, the multiply–adds of ``W x̃`` with a dense W, in each of a sequence's cells."""
    return place.cells * place.tokens_in * place.tokens_out * (place.width or place.dim)


class Carried(NamedTuple):
    """What the tokens of one tensor know of their past: sizes ``(B, P)`` and one `Merge` for each site passed.

    Where they are ``padded``, padding has size zero.
    """

    sizes: Tensor
    merges: tuple[Merge, ...]
    padded: bool = False


def carried_by(tokens: Tensor) -> Carried | None:
    """Return what a token tensor carries, or None where nothing was merged into it."""
    return cast("Carried | None", getattr(tokens, ATTRIBUTE, None))


def carry(tokens: Tensor, carried: Carried | None) -> Tensor:
    """Let a token tensor carry what its predecessor carried; returns the same tensor."""
    if carried is not None:
        setattr(tokens, ATTRIBUTE, carried)
    return tokens


def positions(merges: tuple[Merge, ...]) -> Tensor:
    """Return the original position ``(B, P)`` of each present token; a merged one stands where its destination was."""
    present = merges[0].assignment.kept
    for merge in merges[1:]:
        present = present.gather(1, merge.assignment.kept)
    return present


def unmerge_all(tokens: Tensor, merges: tuple[Merge, ...]) -> Tensor:
    """Bring ``(B, P, D)`` back to the token count before the first merge, one assignment after the other."""
    for merge in reversed(merges):
        tokens = merge.assignment.unmerge(tokens)
    return tokens


def accumulated(merges: tuple[Merge, ...]) -> Tensor:
    """Return ``W¹W²…`` ``(B, N, P)``: where each original token is now."""
    return unmerge_all(merges[-1].assignment.dense(), merges[:-1])
