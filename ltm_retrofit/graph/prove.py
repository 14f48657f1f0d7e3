"""The proofs: run on the example, before anything is changed. Each returns its letter or raises `UnsupportedBlock`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.flops import count_macs_quick
from ltm_retrofit.graph.attention import AttentionMode, Found, Packed
from ltm_retrofit.graph.cut import MOST_PREFIX, Halves, Signature
from ltm_retrofit.graph.example import Example, run, tensors_of
from ltm_retrofit.graph.probe import Call, replaced
from ltm_retrofit.graph.sites import Cost, KeySource


def close(given: Tensor, expected: Tensor) -> bool:
    """Equal to rounding: relative to the largest magnitude, a few hundred units of the dtype's precision."""
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    if not given.is_floating_point():
        return torch.equal(given, expected)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((given - expected).abs().max()) if given.numel() else 0.0
    return error <= 512 * torch.finfo(given.dtype).eps * max(scale, 1e-6)


def all_close(given: Any, expected: Any) -> bool:
    """`close` for every tensor of two model outputs."""
    ours, theirs = tensors_of(given), tensors_of(expected)
    return len(ours) == len(theirs) and all(close(a, b) for a, b in zip(ours, theirs, strict=True))


def all_equal(given: Any, expected: Any) -> bool:
    """Bit-equality of every tensor of two model outputs."""
    ours, theirs = tensors_of(given), tensors_of(expected)
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Piece:
    """A block with its halves and signature, run on a recorded call or on some of its tokens."""

    def __init__(self, block: nn.Module, halves: Halves, signature: Signature) -> None:
        self.block, self.halves, self.signature = block, halves, signature

    def split(self, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """Return tokens and followers of a call."""
        return self.signature.split("", args, kwargs)[:2]

    def head(
        self, tokens: Tensor, followers: tuple[Any, ...], at: Tensor | None = None, of: int = 0, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Run the head on tokens that stood at positions ``at (P,)`` of ``of`` original ones."""
        if at is not None:
            followers = self.signature.gather(followers, of, at.expand(len(tokens), -1))
        stream, inner = self.halves.head(self.block, tokens, bias, followers)
        return stream, inner

    def tail(self, stream: Tensor) -> Tensor:
        """Run the tail."""
        out: Tensor = self.halves.tail(self.block, stream)
        return out


def prove_cut(piece: Piece, call: Call) -> tuple[Tensor, Tensor]:
    """(a) ``tail(head(x))`` equals ``block(x)`` bit for bit, rows following. Returns z and h of the recorded call."""
    tokens, followers = piece.split(*call.args, **call.kwargs)
    if tokens._version != call.version:
        raise UnsupportedBlock("proof (a): the tokens that went in were overwritten in place")
    stream, inner = piece.head(tokens, followers)
    if not torch.equal(piece.tail(stream), call.output):
        raise UnsupportedBlock("proof (a): tail(head(x)) differs from block(x)")
    if followers:
        count = tokens.shape[1]
        rows = [value.shape[-2] for value in tensors_of(followers)]
        first = count - min(rows)
        order = torch.randperm(count - first, generator=torch.Generator().manual_seed(0)) + first
        at = torch.cat([torch.arange(first), order]).to(tokens.device)
        try:
            moved, _ = piece.head(tokens[:, at], followers, at, count)
        except Exception as error:
            raise UnsupportedBlock(
                f"{', '.join(piece.signature.follow)} cannot be gathered along with the tokens: {error}"
            ) from error
        if not close(moved, stream[:, at]):
            raise UnsupportedBlock(
                f"it depends on the order of its tokens even where {', '.join(piece.signature.follow)} move with them"
            )
    return stream, inner


def prove_tokenwise(piece: Piece, stream: Tensor, whole: Tensor) -> None:
    """(b) the tail accepts fewer tokens and treats each alone: ``tail(z[idx]) = tail(z)[idx]``."""
    count = stream.shape[1]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(count, generator=generator)[: max(1, count * 2 // 3)].to(stream.device)
    try:
        part = piece.tail(stream[:, chosen])
    except Exception as error:
        raise UnsupportedBlock(f"proof (b): its tail does not accept fewer tokens: {error}") from error
    if not close(part, whole[:, chosen]):
        raise UnsupportedBlock("proof (b): its tail mixes tokens")


def measure_cost(piece: Piece, call: Call, stream: Tensor) -> Cost:
    """Count head and tail at three token counts; the polynomial through them must hold at a fourth.

    Few tokens, so that this costs nothing; that predicted and counted MACs agree at all of them is seen on converting.
    """
    tokens, followers = piece.split(*call.args, **call.kwargs)
    full = tokens.shape[1]
    first = max((full - value.shape[-2] for value in tensors_of(followers)), default=0) + 2
    small = [first, first + 1, first + 2] if full >= first + 2 else []
    other = min(full, first + 9)

    def polynomial(run_on: Callable[[Tensor], Any], source: Tensor) -> tuple[int, int, int]:
        at = {count: count_macs_quick(partial(run_on, source[:, :count])) for count in [*small, other]}
        square = (at[first + 2] - 2 * at[first + 1] + at[first]) // 2
        linear = at[first + 1] - at[first] - (2 * first + 1) * square
        fixed = at[first] - first * linear - first * first * square
        if fixed + linear * other + square * other * other != at[other]:
            raise UnsupportedBlock("proof (d): its MACs are no polynomial of its token count")
        return fixed, linear, square

    if not small:
        raise UnsupportedBlock(f"proof (d): {full} tokens leave nothing to merge")
    try:
        head = polynomial(lambda x: piece.head(x, followers, torch.arange(x.shape[1], device=x.device), full), tokens)
        tail = polynomial(piece.tail, stream)
    except RuntimeError as error:
        raise UnsupportedBlock(f"proof (c): it does not accept fewer tokens: {error}") from error
    return Cost(head, tail)


def prove_saving(cost: Cost, tokens: int) -> None:
    """(d) the cut is not empty: fewer tokens after it cost less, in the tail as in the next block's head."""
    if not (cost.tail[1] > 0 and cost(tokens, tokens - 1) < cost(tokens, tokens)):
        raise UnsupportedBlock("proof (d): nothing that costs anything follows the cut")


class _Reached(Exception):
    """The keys were seen; the rest of the block need not run."""


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
        raise _Reached

    with torch.enable_grad(), AttentionMode(found, linear):
        try:
            block.forward(*call.args, **call.kwargs)
        except _Reached:
            pass
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    if not seen:
        raise UnsupportedBlock("its attention is not seen when it is called by itself")
    if seen[0].packed is not None:
        return _packed_keys(seen[0].packed, names, inner)
    keys = seen[0].keys
    if keys is None:
        raise UnsupportedBlock(f"its attention is {seen[0].kind}: it has no keys that tokens could be compared by")
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


def prove_rest(model: nn.Module, example: Example, pieces: Sequence[Piece], prefix: int) -> None:
    """(c) the rest of the network accepts fewer tokens and is a set function of the patch tokens.

    In one pass every block drops one patch token; in a second one it drops the same token and shuffles the others.
    The outputs must agree to rounding.
    """

    def dropping(shuffle: bool) -> Any:
        generator = torch.Generator().manual_seed(0)
        shuffler = torch.Generator().manual_seed(1)
        alive: list[Tensor] = []  # original positions of the patches that are present, in their order

        def forward(piece: Piece, *args: Any, **kwargs: Any) -> Any:
            tokens, followers = piece.split(*args, **kwargs)
            patches = tokens.shape[1] - prefix
            if not alive or len(alive[-1]) != patches:
                alive.append(torch.arange(patches))
            present, whole = alive[-1], prefix + len(alive[0])
            at = torch.cat([torch.arange(prefix), present + prefix]).to(tokens.device)
            stream, _ = piece.head(tokens, followers, at, whole)
            if patches < 2:
                return piece.tail(stream)
            drop = present.sort().values[int(torch.randint(patches, (), generator=generator))]
            chosen = (present != drop).nonzero().flatten()
            if shuffle:
                chosen = chosen[torch.randperm(patches - 1, generator=shuffler)]
            alive.append(present[chosen])
            index = torch.cat([torch.arange(prefix), chosen + prefix]).to(stream.device)
            return piece.tail(stream[:, index])

        with replaced({piece.block: partial(forward, piece) for piece in pieces}):
            return run(model, example)

    try:
        plain = dropping(False)
    except Exception as error:
        raise UnsupportedBlock(f"proof (c): the rest of the network does not accept fewer tokens: {error}") from error
    shuffled = dropping(True)
    comparable = [  # outputs that still hold tokens lie in another order
        (a, b) for a, b in zip(tensors_of(plain), tensors_of(shuffled), strict=True)
    ]
    if not all(_same_set(a, b) for a, b in comparable):
        raise UnsupportedBlock("proof (c): the rest of the network depends on the order of the patch tokens")


def _same_set(plain: Tensor, shuffled: Tensor) -> bool:
    """Equal to rounding, or for ``(B, N, D)`` token outputs equal as sets of tokens: sums and sums of squares agree."""
    if close(shuffled, plain):
        return True
    if plain.ndim != 3 or plain.shape != shuffled.shape:
        return False
    return close(shuffled.sum(1), plain.sum(1)) and close(shuffled.square().sum(1), plain.square().sum(1))


def prove_prefix_only(model: nn.Module, example: Example, last: Piece, prefix: int, expected: Any) -> int | None:
    """Prove that the output depends on the last block's prefix tokens only, and does not mind the others gone.

    Patch rows are poisoned with NaN (the output must not change a bit), then cut off (it must not change at all but
    for rounding). Returns the MACs of the pass with patch rows cut off, or None where the proof fails.
    """

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = last.tail(last.head(*last.split(*args, **kwargs))[0]).clone()
        out[:, prefix:] = float("nan")
        return out

    def sliced(*args: Any, **kwargs: Any) -> Any:
        return last.tail(last.head(*last.split(*args, **kwargs))[0][:, :prefix])

    if prefix == 0:
        return None
    with replaced({last.block: poisoned}):
        if not all_equal(run(model, example), expected):
            return None
    outputs: list[Any] = []
    with replaced({last.block: sliced}):
        try:
            macs = count_macs_quick(lambda: outputs.append(run(model, example)))
        except Exception:  # something wants the tokens there, though not their values
            return None
    return macs if all_close(outputs[0], expected) else None
