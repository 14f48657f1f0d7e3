"""What a block's attention is made of: the affine map behind its keys, and the argument that is added to its logits.

Both are found by what they do, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.attention import AttentionMode, Found, Packed
from ltm_retrofit.finding.call import MOST_PREFIX
from ltm_retrofit.finding.proofs import Piece, close
from ltm_retrofit.finding.recording import Call, Reached
from ltm_retrofit.finding.sites import KeySource
from ltm_retrofit.scopes.flow.cut import Halves


def trace_keys(block: nn.Module, call: Call, inner: Tensor) -> tuple[KeySource, int, int]:
    """Find the affine map behind the block's keys by the gradient of the keys, whatever it is called.

    Every linear map's result is made a leaf, so the keys depend on the last maps only; the features whose gradient
    is not zero are the head's key. Returns the source, the number of key heads and the width of a key.

    Raises:
        UnsupportedBlock: where keys come from no, or from more than one, affine map of the attention's input.
    """
    leaves: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []
    seen: list[Found] = []

    def linear(source: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor) -> Tensor:
        leaf = result.detach().requires_grad_()
        leaves.append((source.detach(), weight, bias, leaf))
        return leaf

    def found(attended: Found) -> None:
        seen.append(attended)
        raise Reached

    with torch.enable_grad(), AttentionMode(found, linear):
        try:
            block.forward(*call.args, **call.kwargs)
        except Reached:
            pass
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    if not seen:
        raise UnsupportedBlock("its attention is not seen when it is called by itself")
    if seen[0].packed is not None:
        return _packed_keys(seen[0].packed, names, inner)
    keys = seen[0].keys
    if keys is None:
        raise UnsupportedBlock(f"its attention is {seen[0].kind}: it has no keys that tokens could be compared by")
    if keys.ndim == 3:  # one head, or heads beside images
        with torch.enable_grad():
            keys = keys.reshape(len(inner), -1, *keys.shape[1:])
    if keys.ndim != 4 or keys.shape[2] != inner.shape[1]:
        raise UnsupportedBlock(f"its keys have shape {tuple(keys.shape)}, expected (B, heads, {inner.shape[1]}, d)")
    heads = keys.shape[1]
    weights = torch.randn(keys.shape[0], *keys.shape[2:], generator=torch.Generator().manual_seed(0)).to(keys)
    features: dict[int, list[Tensor]] = {}
    for head in range(heads):
        with torch.enable_grad():
            probe = (keys[:, head] * weights).sum()
        gradients = torch.autograd.grad(probe, [leaf for *_, leaf in leaves], retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                used = gradient.reshape(-1, gradient.shape[-1]).abs().amax(dim=0) > 0
                features.setdefault(index, []).append(used.nonzero().flatten())
    if len(features) != 1:
        raise UnsupportedBlock(f"its keys come from {len(features)} linear maps, expected one")
    ((index, rows),) = features.items()
    source, weight, bias, _ = leaves[index]
    if source.shape != inner.shape or not torch.equal(source, inner):
        raise UnsupportedBlock("its keys are no affine map of the attention's input")
    if len({len(row) for row in rows}) != 1:
        raise UnsupportedBlock("its heads have keys of different widths")
    if id(weight) not in names:
        raise UnsupportedBlock("its key projection is computed, not a parameter")
    bias_source = None if bias is None else names.get(id(bias), bias.detach().clone())
    return KeySource(names[id(weight)], bias_source, torch.stack(rows).cpu()), heads, len(rows[0])


def _packed_keys(packed: Packed, names: dict[int, str], inner: Tensor) -> tuple[KeySource, int, int]:
    """Read the keys of `nn.MultiheadAttention` off its one packed weight: its second third."""
    weight = packed.weight
    if weight is None or id(weight) not in names:
        raise UnsupportedBlock("its keys are projected by another weight than its queries")
    key = packed.key if packed.key.shape == inner.shape else packed.key.transpose(0, 1)  # batch_first=True
    if key.shape != inner.shape or not torch.equal(key, inner):
        raise UnsupportedBlock("its keys are no affine map of the attention's input")
    dim, width = inner.shape[-1], inner.shape[-1] // packed.heads
    rows = dim + torch.arange(dim).view(packed.heads, width)
    bias = None if packed.bias is None else names.get(id(packed.bias))
    return KeySource(names[id(weight)], bias, rows), packed.heads, width


def find_bias(piece: Piece, cut: Callable[[str], Halves], call: Call) -> str | None:
    """Find the argument that is added to the attention's logits, by what it does.

    A token that stands twice must count like one with log 2 added to its logit: whichever unused argument has that
    effect takes the sizes of merged tokens (proportional attention). None where no argument has.
    """
    tokens, followers = piece.split(*call.args, **call.kwargs)
    whole = tokens.shape[1]
    tokens = tokens[:, : MOST_PREFIX + 16]  # a few tell it as well as all
    count = tokens.shape[1]
    doubled = torch.cat([tokens, tokens[:, -1:]], dim=1)
    at = torch.arange(count + 1, device=tokens.device).clamp_max(count - 1)
    sizes = tokens.new_ones(1, 1, 1, count)
    sizes[..., -1] = 2
    signature = piece.signature
    for name in (key for key, value in signature.others if value is None and key in signature.names):
        try:
            other = Piece(piece.block, cut(name), signature)
            expected, _ = other.head(doubled, followers, at, whole)
            given, _ = other.head(tokens, followers, at[:-1], whole, sizes.log())
        except Exception:  # not this argument: it wants something else
            continue
        without, _ = other.head(tokens, followers, at[:-1], whole, torch.zeros_like(sizes))
        if close(given, expected[:, :count]) and not torch.equal(given, without):
            return name
    return None
