"""A block under proof: (a), (b) and (d) on its recorded call, with all that is read off it for later.

A proof that fails raises `UnsupportedBlock`; `smallest` makes a `Refused` of it, and nothing of that leaves this room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock, in_words
from ltm_retrofit.finding.call import MOST_PREFIX, Signature, full_backward_hooks
from ltm_retrofit.finding.example import tensors_of
from ltm_retrofit.finding.proofs import close, polynomial
from ltm_retrofit.finding.recording import Attended, Call
from ltm_retrofit.finding.sites import Refused, TokenLayout
from ltm_retrofit.finding.walk import Walk
from ltm_retrofit.merging.methods import Scope
from ltm_retrofit.scopes.flow.cut import NoBack, cut_block, find_keys
from ltm_retrofit.scopes.flow.site import Cost, FlowSite, Halves


@dataclass(frozen=True)
class Piece:
    """A block with two halves, run on a recorded call or on some of its tokens."""

    block: nn.Module
    halves: Halves
    signature: Signature

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """Return tokens and followers of a call."""
        return self.signature.split("", args, kwargs)[:2]

    def front(
        self, tokens: Tensor, followers: tuple[Any, ...], at: Tensor | None = None, of: int = 0, bias: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Run the front on tokens that stood at positions ``at (P,)`` or ``(B, P)`` of ``of`` original ones."""
        if at is not None:
            followers = self.signature.gather(followers, of, at.expand(len(tokens), -1))
        stream, inner = self.halves.front(self.block, tokens, bias, followers)
        return stream, inner

    def back(self, stream: Tensor) -> Tensor:
        """Run the back."""
        out: Tensor = self.halves.back(self.block, stream)
        return out


class Candidate:
    """A block under proof: what becomes a `FlowSite` if everything holds.

    Args:
        walk: the search.
        name: the block.
        attended: an attention in it.
        end: whether it is cut at its end, behind all that it does.

    Raises:
        UnsupportedBlock: where it cannot be cut, or a proof fails.
    """

    def __init__(self, walk: Walk, name: str, attended: Attended, end: bool) -> None:
        self.name, self.attention, self.end = name, attended.owner, end
        self.module = walk.model.get_submodule(name)
        if "forward" in self.module.__dict__:
            raise UnsupportedBlock("its forward was replaced on the instance (a hook or a wrapper): remove that first")
        if hooks := full_backward_hooks(self.module):
            raise UnsupportedBlock(
                f"{', '.join(hooks)} on it has it called with copies, on which nothing can be carried"
            )
        grids = {(height, width) for _, _, height, width in walk.recording.maps}
        below = self.attention.removeprefix(name).lstrip(".")
        (call,) = walk.recording.attending[name]
        self.signature = Signature.of(
            self.module, name, call.args, call.kwargs, padded=attended.seen.padded, grids=grids
        )
        self.call: Call = call.without(self.module, self.signature.masks)
        self.cut = partial(cut_block, self.module, below, self.signature, end=end)
        #: by training flag, and whether the attention bias is an input
        self.halves: dict[tuple[bool, bool], Halves] = {(False, False): self.cut(training=False, bias=None)}
        stream, inner = self._settle_followers()
        self._prove_tokenwise(stream)
        self.cost = self._measure_cost(stream)
        self._prove_saving()
        self.key, self.heads, self.key_dim = find_keys(self.module, self.call, inner)
        self.bias = self._find_bias()
        if not set(self.signature.masks) <= {self.bias}:
            raise UnsupportedBlock(f"its {', '.join(self.signature.masks)} is not added to its attention's logits")
        self.halves[True, False] = self.cut(training=True, bias=None)
        if self.bias is not None:
            for training in (False, True):
                self.halves[training, True] = self.cut(training=training, bias=self.bias)

    @property
    def piece(self) -> Piece:
        """The halves for inference without attention bias: those that are proven."""
        return Piece(self.module, self.halves[False, False], self.signature)

    @property
    def tokens(self) -> int:
        """How many tokens go through it."""
        return int(self.call.output.shape[1])

    def site(self, layout: TokenLayout) -> FlowSite:
        """Return what was found, once everything holds."""
        return FlowSite(
            block=self.name,
            attention=self.attention,
            kind=type(self.module).__name__,
            dim=self.call.output.shape[2],
            heads=self.heads,
            key_dim=self.key_dim,
            layout=layout,
            scope=Scope.FLOW,
            macs=self.cost(layout.tokens, layout.tokens),
            cost=self.cost,
            proofs=("a", "b", "c", "d"),
            signature=self.signature,
            halves=self.halves,
            key=self.key,
            bias=self.bias,
        )

    def _settle_followers(self) -> tuple[Tensor, Tensor]:
        """Prove (a); a table with one leading entry is one of each image or one of all heads, whichever holds."""
        try:
            return self._prove_cut()
        except UnsupportedBlock:
            if not self.signature.follow:
                raise
        by_image = tuple(not first for first in self.signature.by_image)
        self.signature = replace(self.signature, by_image=by_image)
        return self._prove_cut()

    def _prove_cut(self) -> tuple[Tensor, Tensor]:
        """(a) ``back(front(x))`` equals ``block(x)`` bit for bit, followers moving along. Returns z and h."""
        tokens, followers = self.piece.split(self.call.args, self.call.kwargs)
        if tokens._version != self.call.version:
            raise UnsupportedBlock("proof (a): the tokens that went in were overwritten in place")
        stream, inner = self.piece.front(tokens, followers)
        if not torch.equal(self.piece.back(stream), self.call.output):
            raise UnsupportedBlock("proof (a): back(front(x)) differs from block(x)")
        if followers:
            follow, count = ", ".join(self.signature.follow), tokens.shape[1]
            first = count - min(value.shape[-2] for value in tensors_of(followers))
            generator = torch.Generator().manual_seed(0)
            # the same image twice, its tokens in two orders: that entries belong to images shows only with several
            orders = [torch.randperm(count - first, generator=generator) + first for _ in range(2)]
            at = torch.stack([torch.cat([torch.arange(first), order]) for order in orders]).to(tokens.device)
            try:
                moved, _ = self.piece.front(tokens[0][at], followers, at, count)
            except Exception as error:
                raise UnsupportedBlock(
                    f"{follow} cannot be gathered along with the tokens: {in_words(error)}"
                ) from error
            if not close(moved, stream[0][at]):
                raise UnsupportedBlock(f"it depends on the order of its tokens even where {follow} move with them")
        return stream, inner

    def _prove_tokenwise(self, stream: Tensor) -> None:
        """(b) the back accepts fewer tokens and treats each alone: ``back(z[idx]) = back(z)[idx]``."""
        count, generator = stream.shape[1], torch.Generator().manual_seed(0)
        chosen = torch.randperm(count, generator=generator)[: max(1, count * 2 // 3)].to(stream.device)
        try:
            part = self.piece.back(stream[:, chosen])
        except Exception as error:
            raise UnsupportedBlock(
                f"proof (b): its back half does not accept fewer tokens: {in_words(error)}"
            ) from error
        if not close(part, self.call.output[:, chosen]):
            raise UnsupportedBlock("proof (b): its back half mixes tokens")

    def _measure_cost(self, stream: Tensor) -> Cost:
        """Count front and back; `ltm.measure` counts the converted model as a whole."""
        tokens, followers = self.piece.split(self.call.args, self.call.kwargs)
        full = tokens.shape[1]
        first = max((full - value.shape[-2] for value in tensors_of(followers)), default=0) + 2

        def front(count: int) -> Any:
            return self.piece.front(tokens[:, :count], followers, torch.arange(count, device=tokens.device), full)

        try:
            costs = polynomial(front, first, full), polynomial(lambda n: self.piece.back(stream[:, :n]), first, full)
        except RuntimeError as error:
            raise UnsupportedBlock(f"proof (c): it does not accept fewer tokens: {in_words(error)}") from error
        return Cost(*costs)

    def _prove_saving(self) -> None:
        """(d) the cut is not empty: fewer tokens after it cost less, in the back as in the next block's front.

        A block that is cut at its end has no back; what it saves, it saves in the next block's front.
        """
        tokens = self.tokens
        if self.end and self.cost(tokens - 1, tokens - 1) < self.cost(tokens, tokens):
            return
        if not (self.cost.back[1] > 0 and self.cost(tokens, tokens - 1) < self.cost(tokens, tokens)):
            raise UnsupportedBlock("proof (d): nothing that costs anything follows the cut")

    def _find_bias(self) -> str | None:
        """Find the argument that is added to the attention's logits, by what it does.

        A token that stands twice must count like one with log 2 added to its logit, since ``2 eˣ = e^(x + log 2)``:
        whichever unused argument has that effect takes the sizes of merged tokens (proportional attention). None where
        no argument has.
        """
        tokens, followers = self.piece.split(self.call.args, self.call.kwargs)
        whole = tokens.shape[1]
        tokens = tokens[:, : MOST_PREFIX + 16]  # a few tell it as well as all
        count = tokens.shape[1]
        doubled = torch.cat([tokens, tokens[:, -1:]], dim=1)
        at = torch.arange(count + 1, device=tokens.device).clamp_max(count - 1)
        sizes = tokens.new_ones(1, 1, 1, count)
        sizes[..., -1] = 2
        for name in (key for key, value in self.signature.others if value is None and key in self.signature.names):
            try:
                piece = Piece(self.module, self.cut(training=False, bias=name), self.signature)
                expected, _ = piece.front(doubled, followers, at, whole)
                given, _ = piece.front(tokens, followers, at[:-1], whole, sizes.log())
            except Exception:  # not this argument: it wants something else
                continue
            without, _ = piece.front(tokens, followers, at[:-1], whole, torch.zeros_like(sizes))
            if close(given, expected[:, :count]) and not torch.equal(given, without):
                return name
        return None


def smallest(walk: Walk, attended: Attended) -> Candidate | Refused:
    """Return the smallest module around an attention that can be cut, or what stands against each of them."""
    reasons: list[str] = []
    several = [(name, False) for name in reversed(attended.around)]
    for name, end in several:
        calls = walk.recording.attending.get(name, [])
        kind = type(walk.model.get_submodule(name)).__name__
        try:
            if len(calls) != 1:
                raise UnsupportedBlock(
                    f"called {len(calls)} times in one forward pass: convert the part that is called several times (a "
                    "backbone of a Siamese model) by itself, with an example of its own"
                )
            if calls[0].stream() is None:
                continue  # not a block: other tokens come out than go in
            return Candidate(walk, name, attended, end)
        except UnsupportedBlock as error:
            if isinstance(error, NoBack) and not end:
                several.append((name, True))  # after all others: merged tokens serve the blocks that follow, only
            reasons.append(f"{name or 'the model'} ({kind}): {error}")
    kind = type(walk.model.get_submodule(attended.owner)).__name__
    return Refused(attended.owner, "; ".join(reasons) or f"{kind}: no module around it keeps a token stream")
