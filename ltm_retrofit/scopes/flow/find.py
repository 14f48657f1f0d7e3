"""Blocks that are cut between attention and MLP, after which tokens stay merged (scope FLOW)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding import proofs as prove
from ltm_retrofit.finding.call import Signature
from ltm_retrofit.finding.example import Example
from ltm_retrofit.finding.prefix import same_tokens
from ltm_retrofit.finding.recording import Attended, Call, Recording
from ltm_retrofit.finding.sites import Cost, Ending, FlowSite, KeySource, TokenLayout
from ltm_retrofit.merging.methods import Scope
from ltm_retrofit.scopes.flow import keys
from ltm_retrofit.scopes.flow.cut import Halves, NoTail, cut_block
from ltm_retrofit.scopes.flow.runs import handed_on, unbroken


class Candidate:
    """A block under proof: what becomes a `FlowSite` if everything holds."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        attended: Attended,
        call: Call,
        grids: set[tuple[int, int]],
        end: bool,
    ) -> None:
        self.name, self.attention, self.end = name, attended.chain[-1], end
        self.module = model.get_submodule(name)
        if "forward" in self.module.__dict__:
            raise UnsupportedBlock("its forward was replaced on the instance (a hook or a wrapper): remove that first")
        below = self.attention.removeprefix(name).lstrip(".")
        padded = attended.found.padded
        self.signature = Signature.of(self.module, name, call.args, call.kwargs, padded=padded, grids=grids)
        self.call = call.without(self.module, self.signature.masks)
        self.cut = partial(cut_block, self.module, below, self.signature, end=end)
        self.halves: dict[tuple[bool, bool], Halves] = {(False, False): self.cut(training=False, bias=None)}
        self.cost: Cost
        self.key: KeySource
        self.heads, self.key_dim = 0, 0
        self.bias: str | None = None

    @property
    def piece(self) -> prove.Piece:
        """The halves for inference without attention bias: those that are proven."""
        return prove.Piece(self.module, self.halves[False, False], self.signature)

    def prove_alone(self) -> None:
        """Proofs (a), (b) and (d), and all that is read off the block for later."""
        stream, inner = self._settle_rows()
        prove.prove_tokenwise(self.piece, stream, self.call.output)
        self.cost = prove.measure_cost(self.piece, self.call, stream)
        prove.prove_saving(self.cost, stream.shape[1], self.end)
        self.key, self.heads, self.key_dim = keys.trace_keys(self.module, self.call, inner)
        self.bias = keys.find_bias(self.piece, lambda name: self.cut(training=False, bias=name), self.call)
        if not set(self.signature.masks) <= {self.bias}:
            raise UnsupportedBlock(f"its {', '.join(self.signature.masks)} is not added to its attention's logits")
        self.halves[True, False] = self.cut(training=True, bias=None)
        if self.bias is not None:
            for training in (False, True):
                self.halves[training, True] = self.cut(training=training, bias=self.bias)

    def _settle_rows(self) -> tuple[Tensor, Tensor]:
        """Prove (a); a table with one leading row is one of each image or one of all heads, whichever holds."""
        given = self.signature.by_image
        for by_image in (given, tuple(not first for first in given)):
            self.signature = replace(self.signature, by_image=by_image)
            try:
                return prove.prove_cut(self.piece, self.call)
            except UnsupportedBlock as error:
                if not given or by_image != given:
                    raise
                reason = error
        raise reason


def find_flow(
    model: nn.Module, example: Example, recording: Recording, excluded: dict[str, str]
) -> tuple[list[Candidate], int]:
    """Find the blocks that may be cut, and how many prefix tokens lead; the others go to ``excluded``."""
    candidates = unbroken(list(_candidates(model, recording, excluded)), recording, excluded)
    candidates = handed_on(model, example, candidates, recording, excluded)
    prefix = _drop(candidates, excluded, partial(_prefix_of, model, example, recording)) or 0
    return _prove_rest(model, example, candidates, prefix, excluded), prefix


def flow_sites(candidates: list[Candidate], prefix: int, recording: Recording) -> list[FlowSite]:
    """Turn proven candidates into sites."""
    return [_site(candidate, _layout(candidate, prefix, recording)) for candidate in candidates]


def _candidates(model: nn.Module, recording: Recording, excluded: dict[str, str]) -> Iterator[Candidate]:
    """For each attention the smallest enclosing module that can be cut; the rest goes to ``excluded``."""
    taken: set[str] = set()
    for attended in recording.attended:
        if taken & set(attended.chain):
            continue  # a second attention of a block that is already cut: its tail was proven token-wise with it
        try:
            candidate = _smallest(model, recording, attended)
        except UnsupportedBlock as error:
            excluded[attended.chain[-1]] = str(error)
            continue
        taken.add(candidate.name)
        yield candidate


def _smallest(model: nn.Module, recording: Recording, attended: Attended) -> Candidate:
    reasons: list[str] = []
    several = [(name, False) for name in reversed(attended.chain)]
    grids = {(shape[2], shape[3]) for _, shape in recording.maps}
    for name, end in several:
        calls = recording.calls.get(name, [])
        kind = type(model.get_submodule(name)).__name__
        try:
            if len(calls) != 1:
                raise UnsupportedBlock(f"called {len(calls)} times in one forward pass")
            if calls[0].stream() is None:
                continue  # not a block: other tokens come out than go in
            candidate = Candidate(model, name, attended, calls[0], grids, end)
            candidate.prove_alone()
            return candidate
        except UnsupportedBlock as error:
            if isinstance(error, NoTail) and not end:
                several.append((name, True))  # after all others: merged tokens serve the blocks that follow, only
            reasons.append(f"{name or 'the model'} ({kind}): {error}")
    owner = model.get_submodule(attended.chain[-1])
    raise UnsupportedBlock("; ".join(reasons) or f"{type(owner).__name__}: no module around it keeps a token stream")


def _drop(candidates: list[Candidate], excluded: dict[str, str], measure: Any) -> int | None:
    """Measure something of the first block on; where that fails all candidates are excluded with the reason."""
    if not candidates:
        return None
    try:
        return int(measure(candidates))
    except UnsupportedBlock as error:
        for candidate in candidates:
            excluded[candidate.name] = str(error)
        candidates.clear()
        return None


def _prefix_of(model: nn.Module, example: Example, recording: Recording, candidates: list[Candidate]) -> int:
    """Count the leading tokens that do not depend on the image: class, distillation and register tokens.

    Looked at where tokens first enter an attention; past one, every token depends on the image.
    """
    count = candidates[0].call.output.shape[1]
    chains = [(name, recording.calls[name][0].stream()) for name in reversed(recording.attended[0].chain)]
    name, before = next(
        ((name, stream) for name, stream in chains if stream is not None and stream.shape[1] == count), ("", None)
    )
    if before is None:
        raise UnsupportedBlock("the tokens of its first attention are not those of the blocks that can be cut")
    same = same_tokens(model, example, name, before)
    if same is None:
        raise UnsupportedBlock(
            "which of its tokens lead cannot be told: it takes no other image, or not in the same way"
        )
    prefix = int(same.sum())
    if not bool(same[:prefix].all()):
        raise UnsupportedBlock("its prefix tokens do not lead the sequence")
    return prefix


def _prove_rest(
    model: nn.Module, example: Example, candidates: list[Candidate], prefix: int, excluded: dict[str, str]
) -> list[Candidate]:
    """(c) for all candidates in two passes; where that fails, one by one from the last, keeping what holds."""
    counts = {candidate.call.output.shape[1] for candidate in candidates}
    if len(counts) > 1:
        reason = f"proof (c): token counts change between blocks ({', '.join(map(str, sorted(counts)))})"
        excluded.update({candidate.name: reason for candidate in candidates})
        return []
    if not candidates:
        return []
    pieces = [candidate.piece for candidate in candidates]
    kept: list[Candidate] = []
    modes: tuple[bool, ...] = (False, True)  # whether tokens are restored after the last block
    for restored in modes:
        with suppress(UnsupportedBlock):
            prove.prove_rest(model, example, pieces, prefix, restored=restored)
            return candidates
    for candidate in reversed(candidates):
        several = [candidate.piece, *(other.piece for other in kept)]
        reasons: list[str] = []
        for restored in modes:
            try:
                prove.prove_rest(model, example, several, prefix, restored=restored)
            except UnsupportedBlock as error:
                reasons.append(str(error))
            else:
                kept.insert(0, candidate)
                modes = (restored,)
                break
        else:
            excluded[candidate.name] = f"{candidate.name} ({type(candidate.module).__name__}): {reasons[0]}"
    return kept


def find_ending(
    model: nn.Module, example: Example, recording: Recording, candidates: list[Candidate], prefix: int
) -> Ending:
    """Find out who reads the tokens after the blocks, and what the rest costs where only prefix tokens are left."""
    classes, readouts = recording.classifier()
    last = candidates[-1] if candidates else None
    if last is None or last.attention != recording.attended[-1].chain[-1]:
        return Ending(False, 0, readouts, classes)  # something attends after the last block that can be cut
    earlier = {candidate.module: recording.calls[candidate.name][0].output for candidate in candidates[:-1]}
    gone = prove.prove_prefix_only(model, example, last.piece, prefix, recording.output, earlier)
    if gone is None:
        return Ending(False, 0, readouts, classes)
    tokens = last.call.output.shape[1]
    own = last.cost(tokens, tokens) - last.cost(tokens, prefix)
    return Ending(True, own - gone, readouts, classes)


def _layout(candidate: Candidate, prefix: int, recording: Recording) -> TokenLayout:
    tokens = candidate.call.output.shape[1]
    patches = tokens - prefix
    grids = [(shape[2], shape[3]) for _, shape in recording.maps if shape[2] * shape[3] == patches]
    side = round(patches**0.5)
    grid = grids[-1] if grids else (side, side) if side * side == patches else None
    return TokenLayout(tokens, prefix, grid)


def _site(candidate: Candidate, layout: TokenLayout) -> FlowSite:
    return FlowSite(
        block=candidate.name,
        attention=candidate.attention,
        kind=type(candidate.module).__name__,
        dim=candidate.call.output.shape[2],
        heads=candidate.heads,
        key_dim=candidate.key_dim,
        layout=layout,
        scope=Scope.FLOW,
        macs=candidate.cost(layout.tokens, layout.tokens),
        cost=candidate.cost,
        proofs=("a", "b", "c", "d"),
        signature=candidate.signature,
        halves=candidate.halves,
        key=candidate.key,
        bias=candidate.bias,
    )
