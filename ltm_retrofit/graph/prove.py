"""The proofs: run on the example, before anything is changed. Each returns its letter or raises `UnsupportedBlock`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.flops import count_macs_quick
from ltm_retrofit.graph.cut import Halves, Signature
from ltm_retrofit.graph.example import Example, run, tensors_of
from ltm_retrofit.graph.probe import AttentionMode, Call, replaced
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


def prove_cut(block: nn.Module, halves: Halves, call: Call) -> tuple[Tensor, Tensor]:
    """(a) ``tail(head(x))`` equals ``block(x)`` bit for bit. Returns z and h of the recorded call."""
    tokens = call.stream()
    assert tokens is not None
    if tokens._version != call.version:
        raise UnsupportedBlock("proof (a): the tokens that went in were overwritten in place")
    stream, inner = halves.head(block, tokens, None)
    if not torch.equal(halves.tail(block, stream), call.output):
        raise UnsupportedBlock("proof (a): tail(head(x)) differs from block(x)")
    return stream, inner


def prove_tokenwise(block: nn.Module, halves: Halves, stream: Tensor) -> None:
    """(b) the tail accepts fewer tokens and treats each alone: ``tail(z[idx]) = tail(z)[idx]``."""
    count = stream.shape[1]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(count, generator=generator)[: max(1, count * 2 // 3)].to(stream.device)
    try:
        part = halves.tail(block, stream[:, chosen])
    except Exception as error:
        raise UnsupportedBlock(f"proof (b): its tail does not accept fewer tokens: {error}") from error
    if not close(part, halves.tail(block, stream)[:, chosen]):
        raise UnsupportedBlock("proof (b): its tail mixes tokens")


def measure_cost(block: nn.Module, halves: Halves, call: Call, stream: Tensor) -> Cost:
    """Count head and tail at three token counts; the polynomial through them must hold at the full one."""
    tokens = call.stream()
    assert tokens is not None
    full = tokens.shape[1]
    small = [2, 3, 4] if full >= 4 else []

    def polynomial(piece: Callable[[Tensor], Any], source: Tensor) -> tuple[int, int, int]:
        at = {count: count_macs_quick(partial(piece, source[:, :count])) for count in [*small, full]}
        square = (at[4] - 2 * at[3] + at[2]) // 2
        linear = at[3] - at[2] - 5 * square
        fixed = at[2] - 2 * linear - 4 * square
        if fixed + linear * full + square * full * full != at[full]:
            raise UnsupportedBlock("proof (d): its MACs are no polynomial of its token count")
        return fixed, linear, square

    if not small:
        raise UnsupportedBlock(f"proof (d): {full} tokens leave nothing to merge")
    try:
        head = polynomial(lambda x: halves.head(block, x, None), tokens)
        tail = polynomial(lambda x: halves.tail(block, x), stream)
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
    seen: list[Tensor] = []

    def linear(source: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor) -> Tensor:
        leaf = result.detach().requires_grad_()
        leaves.append((source.detach(), weight, bias, leaf))
        return leaf

    def found(keys: Tensor) -> None:
        seen.append(keys)
        raise _Reached

    with torch.enable_grad(), AttentionMode(found, linear):
        try:
            block.forward(*call.args, **call.kwargs)
        except _Reached:
            pass
    keys = seen[0]
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
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    if id(weight) not in names:
        raise UnsupportedBlock("its key projection is computed, not a parameter")
    bias_source = None if bias is None else names.get(id(bias), bias.detach().clone())
    return KeySource(names[id(weight)], bias_source, torch.stack(rows).cpu()), heads, len(rows[0])


def find_bias(block: nn.Module, cut: Callable[[str], Halves], call: Call, signature: Signature) -> str | None:
    """Find the argument that is added to the attention's logits, by what it does.

    A token that stands twice must count like one with log 2 added to its logit: whichever unused argument has that
    effect takes the sizes of merged tokens (proportional attention). None where no argument has.
    """
    tokens = call.stream()
    assert tokens is not None
    count = tokens.shape[1]
    doubled = torch.cat([tokens, tokens[:, -1:]], dim=1)
    sizes = tokens.new_ones(1, 1, 1, count)
    sizes[..., -1] = 2
    for name in (key for key, value in signature.others if value is None and key in signature.names):
        try:
            halves = cut(name)
            expected, _ = halves.head(block, doubled, None)
            given, _ = halves.head(block, tokens, sizes.log())
        except Exception:  # not this argument: it wants something else
            continue
        without, _ = halves.head(block, tokens, torch.zeros_like(sizes))
        if close(given, expected[:, :count]) and not torch.equal(given, without):
            return name
    return None


def prove_rest(
    model: nn.Module, example: Example, blocks: Sequence[tuple[nn.Module, Halves, Signature]], prefix: int
) -> None:
    """(c) the rest of the network accepts fewer tokens and is a set function of the patch tokens.

    In one pass every block drops one patch token; in a second one it drops the same token and shuffles the others.
    The outputs must agree to rounding.
    """

    def dropping(shuffle: bool) -> Any:
        generator = torch.Generator().manual_seed(0)
        shuffler = torch.Generator().manual_seed(1)
        order: list[Tensor] = []

        def forward(block: nn.Module, halves: Halves, signature: Signature, *args: Any, **kwargs: Any) -> Any:
            stream, _ = halves.head(block, signature.split("", args, kwargs), None)
            patches = stream.shape[1] - prefix
            if patches < 2:
                return halves.tail(block, stream)
            present = order.pop() if order else torch.arange(patches)
            drop = int(torch.randint(patches, (), generator=generator))
            keep = torch.cat([torch.arange(drop), torch.arange(drop + 1, patches)])
            chosen = keep
            if shuffle:  # `present[i]` is the position that patch i has in the pass without shuffling
                position = torch.argsort(present)
                chosen = position[keep][torch.randperm(patches - 1, generator=shuffler)]
                rank = torch.full((patches,), -1)
                rank[keep] = torch.arange(patches - 1)
                order.append(rank[present[chosen]])
            index = torch.cat([torch.arange(prefix), chosen + prefix]).to(stream.device)
            return halves.tail(block, stream[:, index])

        def bound(block: nn.Module, halves: Halves, signature: Signature) -> Callable[..., Any]:
            return lambda *args, **kwargs: forward(block, halves, signature, *args, **kwargs)

        with replaced({block: bound(block, halves, signature) for block, halves, signature in blocks}):
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


def prove_prefix_only(
    model: nn.Module, example: Example, last: tuple[nn.Module, Halves, Signature], prefix: int, expected: Any
) -> int | None:
    """Prove that the output depends on the last block's prefix tokens only, and does not mind the others gone.

    Patch rows are poisoned with NaN (the output must not change a bit), then cut off (it must not change at all but
    for rounding). Returns the MACs of the pass with patch rows cut off, or None where the proof fails.
    """
    block, halves, signature = last

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        stream, _ = halves.head(block, signature.split("", args, kwargs), None)
        out: Tensor = halves.tail(block, stream).clone()
        out[:, prefix:] = float("nan")
        return out

    def sliced(*args: Any, **kwargs: Any) -> Any:
        stream, _ = halves.head(block, signature.split("", args, kwargs), None)
        return halves.tail(block, stream[:, :prefix])

    if prefix == 0:
        return None
    with replaced({block: poisoned}):
        if not all_equal(run(model, example), expected):
            return None
    outputs: list[Any] = []
    with replaced({block: sliced}):
        try:
            macs = count_macs_quick(lambda: outputs.append(run(model, example)))
        except Exception:  # something wants the tokens there, though not their values
            return None
    return macs if all_close(outputs[0], expected) else None
