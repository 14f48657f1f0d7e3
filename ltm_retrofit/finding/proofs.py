"""The proofs: run on the example, before anything is changed. Each returns its letter or raises `UnsupportedBlock`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.call import Signature
from ltm_retrofit.finding.example import Example, run, tensors_of
from ltm_retrofit.finding.recording import Call, replaced
from ltm_retrofit.finding.sites import Cost
from ltm_retrofit.macs import count_macs_quick

if TYPE_CHECKING:
    from ltm_retrofit.scopes.flow.cut import Halves


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
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(count - first, generator=generator) + first for _ in range(2)]
        at = torch.stack([torch.cat([torch.arange(first), order]) for order in orders]).to(tokens.device)
        expected = stream[0][at]  # the same image twice, its tokens in two orders: rows belong to images
        try:
            moved = piece.halves.head(piece.block, tokens[0][at], None, piece.signature.gather(followers, count, at))[0]
        except Exception as error:
            raise UnsupportedBlock(
                f"{', '.join(piece.signature.follow)} cannot be gathered along with the tokens: {error}"
            ) from error
        if not close(moved, expected):
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

    def head(count: int) -> Any:
        return piece.head(tokens[:, :count], followers, torch.arange(count, device=tokens.device), full)

    try:
        return Cost(polynomial(head, first, full), polynomial(lambda count: piece.tail(stream[:, :count]), first, full))
    except RuntimeError as error:
        raise UnsupportedBlock(f"proof (c): it does not accept fewer tokens: {error}") from error


def polynomial(run_on: Callable[[int], Any], first: int, full: int) -> tuple[int, int, int]:
    """Return ``fixed, linear, square`` such that ``run_on(N)`` costs ``fixed + linear·N + square·N²`` MACs.

    Read off ``first`` tokens and the two counts after it, and checked at a fourth.
    """
    if full < first + 2:
        raise UnsupportedBlock(f"proof (d): {full} tokens leave nothing to merge")
    other = min(full, first + 9)
    at = {count: count_macs_quick(partial(run_on, count)) for count in (first, first + 1, first + 2, other)}
    square = (at[first + 2] - 2 * at[first + 1] + at[first]) // 2
    linear = at[first + 1] - at[first] - (2 * first + 1) * square
    fixed = at[first] - first * linear - first * first * square
    if fixed + linear * other + square * other * other != at[other]:
        raise UnsupportedBlock("proof (d): its MACs are no polynomial of its token count")
    return fixed, linear, square


def prove_saving(cost: Cost, tokens: int, end: bool = False) -> None:
    """(d) the cut is not empty: fewer tokens after it cost less, in the tail as in the next block's head.

    A block that is cut at its end has no tail; what it saves, it saves in the next block's head.
    """
    if end and cost(tokens - 1, tokens - 1) < cost(tokens, tokens):
        return
    if not (cost.tail[1] > 0 and cost(tokens, tokens - 1) < cost(tokens, tokens)):
        raise UnsupportedBlock("proof (d): nothing that costs anything follows the cut")


def prove_rest(
    model: nn.Module, example: Example, pieces: Sequence[Piece], prefix: int, *, restored: bool = False
) -> None:
    """(c) the rest of the network accepts fewer tokens and is a set function of the patch tokens.

    In one pass every block drops one patch token; in a second one it drops the same token and shuffles the others.
    The outputs must agree to rounding. Where tokens are ``restored`` after the last block, in their old places, what
    comes behind it (a grid neck, a pool that reads a mask) sees as many as ever.
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
            out = piece.tail(stream[:, index])
            if not (restored and piece is pieces[-1]):
                return out
            full = out[:, prefix:].mean(dim=1, keepdim=True).repeat(1, whole, 1)
            full[:, torch.cat([torch.arange(prefix), alive[-1] + prefix]).to(out.device)] = out
            return full

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


def prove_prefix_only(
    model: nn.Module,
    example: Example,
    last: Piece,
    prefix: int,
    expected: Any,
    earlier: Mapping[nn.Module, Tensor],
) -> int | None:
    """Prove that the output depends on the last block's prefix tokens only, and does not mind the others gone.

    Patch rows are poisoned with NaN (the output must not change a bit), then cut off (it must not change at all but
    for rounding). ``earlier`` blocks hand out what they were recorded to put out, so that they need not compute.
    Returns the MACs that go with the patch rows, of this block and of all that follows, or None where the proof fails.
    """

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = last.tail(last.head(*last.split(*args, **kwargs))[0]).clone()
        out[:, prefix:] = float("nan")
        return out

    def sliced(*args: Any, **kwargs: Any) -> Any:
        return last.tail(last.head(*last.split(*args, **kwargs))[0][:, :prefix])

    def count(forward: Callable[..., Any]) -> tuple[int, Any]:
        outputs: list[Any] = []
        recorded = {block: partial(_put_out, output) for block, output in earlier.items()}
        with replaced({**recorded, last.block: forward}):
            macs = count_macs_quick(lambda: outputs.append(run(model, example)))
        return macs, outputs[0]

    if prefix == 0:
        return None
    whole, output = count(poisoned)
    if not all_equal(output, expected):
        return None
    try:
        rest, output = count(sliced)
    except Exception:  # something wants the tokens there, though not their values
        return None
    return whole - rest if all_close(output, expected) else None


def _put_out(output: Tensor, *_: Any, **__: Any) -> Tensor:
    return output.clone()  # whoever writes into it
