"""Blocks that are cut between attention and MLP, after which tokens stay merged (scope FLOW).

Each block is proven alone first (`candidate`). Then the network must let merged tokens through: no attention that is
left out lies between, every block hands the next its very output, the prefix leads, and (c) the rest of the network
takes the patches that are left as a set. What fails drops out with its reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import in_words
from ltm_retrofit.finding.call import hooks_of
from ltm_retrofit.finding.example import first_tensor, run, tensors_of
from ltm_retrofit.finding.layouts import same_tokens
from ltm_retrofit.finding.proofs import all_close, all_equal, close
from ltm_retrofit.finding.recording import Call, Reached, replaced
from ltm_retrofit.finding.sites import AttentionSite, Ending, Found, Refused, TokenLayout
from ltm_retrofit.finding.walk import Walk
from ltm_retrofit.macs import count_macs_quick
from ltm_retrofit.progress import progress
from ltm_retrofit.scopes.flow.candidate import Candidate, Piece, smallest
from ltm_retrofit.scopes.flow.site import FlowSite
from ltm_retrofit.undisturbed import undisturbed

#: of modules that are identities while nothing is trained
RATES = ("p", "drop_prob")

#: those that go on, and why the others do not
Sifted = tuple[list[Candidate], list[Refused]]


def find(walk: Walk) -> Found:
    """Find the blocks that may be cut; `Refused` are attentions without one, and blocks that dropped out later."""
    candidates, refused = _candidates(walk)
    for sift in (_unbroken, _handed_on):
        candidates, dropped = sift(walk, candidates)
        refused += dropped
    prefix = _count_prefix(walk, candidates)
    if isinstance(prefix, Refused):
        refused += [Refused(candidate.name, prefix.reason) for candidate in candidates]
        return Found({}, refused)
    candidates, dropped = _prove_rest(walk, candidates, prefix)
    sites = [candidate.site(_layout(walk, candidate.tokens, prefix)) for candidate in candidates]
    found: dict[int, list[AttentionSite]] = {}
    for number, attended in enumerate(walk.recording.attended):
        if own := [site for site in sites if site.block in attended.around]:
            found[number] = [*own]
    return Found(found, refused + dropped)


def _candidates(walk: Walk) -> Sifted:
    """For each attention the smallest enclosing module that can be cut."""
    taken: dict[str, Candidate] = {}
    refused: list[Refused] = []
    with progress("looking for blocks to cut", len(walk.recording.attended), "attentions") as bar:
        for number, attended in enumerate(walk.recording.attended):
            bar.update()
            if taken.keys() & set(attended.around):
                continue  # a second attention of a block that is already cut: its back was proven token-wise with it
            if number in walk.views:
                found: Candidate | Refused = Refused(attended.owner, f"{attended.owner}: {walk.views[number].reason}")
            else:
                found = smallest(walk, attended)
            if isinstance(found, Refused):
                refused.append(found)
            else:
                taken[found.name] = found
    for number, views in walk.views.items():  # a later attention of a block that is cut
        for name in taken.keys() & set(walk.recording.attended[number].around):
            refused += _refuse([taken.pop(name)], views.reason)
    return list(taken.values()), refused


def _unbroken(walk: Walk, candidates: list[Candidate]) -> Sifted:
    """Keep the last run of candidates with no other attention between them: merged tokens must not meet one."""
    names = {candidate.name: candidate for candidate in candidates}
    attended = walk.recording.attended
    around = [next((names[name] for name in one.around if name in names), None) for one in attended]

    def meets(one: Candidate, other: Candidate) -> str:
        numbers = range(around.index(one), around.index(other))
        between = [attended[number].owner for number in numbers if around[number] is None]
        return f"tokens merged here would reach {between[-1]}, which is left out" if between else ""

    return _last_run([candidate for candidate in dict.fromkeys(around) if candidate is not None], meets)


def _handed_on(walk: Walk, candidates: list[Candidate]) -> Sifted:
    """Keep the last run of candidates of which each gives the next its very output: what tokens carry lies on it."""

    def loses(one: Candidate, other: Candidate) -> str:
        for candidate in (one, other):
            if _call(walk, candidate).swapped:
                hooks = " or ".join(hooks_of(candidate.module))
                return f"{hooks} on {candidate.name} makes a new tensor, and what merged tokens carry is lost"
        why = f"something between it and {other.name} makes a new tensor, and what merged tokens carry is lost"
        return "" if _hands_on(walk, _call(walk, one), _call(walk, other)) else why

    kept, refused = _last_run(candidates, loses)
    if name := _lost_in_training(walk, kept):
        place = next(place for place, candidate in enumerate(kept) if candidate.name == name)
        why = f"while the model is trained, something before {name} makes a new tensor (dropout)"
        refused += _refuse(kept[:place], f"{why}, and what merged tokens carry is lost")
        kept = kept[place:]
    if len(kept) == 1 and kept[0].end:
        refused += _refuse(kept, "nothing that costs anything follows its attention")
        kept = []
    return kept, refused


def _last_run(candidates: Sequence[Candidate], broken: Callable[[Candidate, Candidate], str]) -> Sifted:
    """Keep the candidates after the last break between two of them; those before it would merge for nobody."""
    kept: list[Candidate] = []
    refused: list[Refused] = []
    for candidate in candidates:
        if kept and (why := broken(kept[-1], candidate)):
            refused += _refuse(kept, why)
            kept = []
        kept.append(candidate)
    return kept, refused


def _refuse(candidates: list[Candidate], why: str) -> list[Refused]:
    return [Refused(candidate.name, f"{candidate.name}: {why}") for candidate in candidates]


def _call(walk: Walk, candidate: Candidate) -> Call:
    return walk.recording.by_name[candidate.name][-1]


def _hands_on(walk: Walk, one: Call, other: Call) -> bool:
    """Say whether a block's output is the next one's input, also while the model is trained (dropout between them)."""
    between = (call for call in walk.recording.calls if one.end < call.start and call.end < other.start)
    altering = any(
        call.source == one.result and any(getattr(walk.model.get_submodule(call.name), name, None) for name in RATES)
        for call in between
    )
    return one.result == other.source and not altering


def _lost_in_training(walk: Walk, candidates: list[Candidate]) -> str:
    """Return the last block to which what tokens carry does not come while the model is trained, if any.

    One pass up to the last block. Blocks hand out what they were recorded to put out, and what may lie between them is
    in training mode: modules around them, those that were given their tokens, and those that eval mode never calls. The
    stem is not. A model that asks for more while it is trained (targets) shows nothing here.
    """
    if len(candidates) < 2:
        return ""
    put_out: list[Tensor] = []
    lost: list[str] = []

    def stand_in(candidate: Candidate, *args: Any, **kwargs: Any) -> Tensor:
        tokens = first_tensor(args, kwargs)
        if put_out and not any(tokens is out for out in put_out):
            lost.append(candidate.name)
        if candidate is candidates[-1]:
            raise Reached
        put_out.append(walk.recording.attending[candidate.name][0].output.clone())  # whoever writes into it
        return put_out[-1]

    never_called = dict(walk.model.named_modules()).keys() - walk.recording.by_name.keys()
    awake = [walk.model.get_submodule(name) for name in {*_between(walk, candidates), *never_called}]
    forwards = {candidate.module: partial(stand_in, candidate) for candidate in candidates}
    with undisturbed(walk.model), replaced(forwards):
        for module in awake:
            module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)  # which minds a single image
        with suppress(Exception):  # reached, or it cannot be run so
            run(walk.model, walk.example)
    return lost[-1] if lost else ""


def _between(walk: Walk, candidates: list[Candidate]) -> Iterator[str]:
    """Name the modules around several blocks, and those between them that are given their tokens."""
    for candidate in candidates:
        parts = candidate.name.split(".")
        yield from (".".join(parts[:depth]) for depth in range(len(parts)))
    calls = walk.recording.calls
    for one, other in pairwise(_call(walk, candidate) for candidate in candidates):
        yield from (c.name for c in calls if one.end < c.start < other.start and c.source == one.result)


def _count_prefix(walk: Walk, candidates: list[Candidate]) -> int | Refused:
    """Count the leading tokens that do not depend on the image: class, distillation and register tokens.

    Looked at where tokens first enter an attention; past one, every token depends on the image.
    """
    if not candidates:
        return 0
    count, first = candidates[0].tokens, walk.recording.attended[0]
    streams = [(name, walk.recording.attending[name][0].stream()) for name in reversed(first.around)]
    entered = [(name, stream) for name, stream in streams if stream is not None and stream.shape[1] == count]
    if not entered:
        return Refused("", "the tokens of its first attention are not those of the blocks that can be cut")
    same = same_tokens(walk.model, walk.example, *entered[0])
    if same is None:
        return Refused("", "which of its tokens lead cannot be told: it takes no other image, or not in the same way")
    prefix = int(same.sum())
    return prefix if bool(same[:prefix].all()) else Refused("", "its prefix tokens do not lead the sequence")


def _layout(walk: Walk, tokens: int, prefix: int) -> TokenLayout:
    patches = tokens - prefix
    grids = [(height, width) for _, _, height, width in walk.recording.maps if height * width == patches]
    side = round(patches**0.5)
    grid = grids[-1] if grids else (side, side) if side * side == patches else None
    return TokenLayout(tokens, prefix, grid)


# ------------------------------------------------------------------------------------------------------------ proof (c)


def _prove_rest(walk: Walk, candidates: list[Candidate], prefix: int) -> Sifted:
    """(c) for all candidates in two passes; where that fails, one by one from the last, keeping what holds."""
    counts = {candidate.tokens for candidate in candidates}
    if len(counts) > 1:
        reason = f"proof (c): token counts change between blocks ({', '.join(map(str, sorted(counts)))})"
        return [], [Refused(candidate.name, reason) for candidate in candidates]
    modes: tuple[bool, ...] = (False, True)  # whether tokens are restored after the last block
    every = [candidate.piece for candidate in candidates]
    if not every or not all(_refuse_rest(walk, every, prefix, restored) for restored in modes):
        return candidates, []
    kept: list[Candidate] = []
    refused: list[Refused] = []
    for place, candidate in reversed([*enumerate(candidates)]):  # what comes after a block must hold before it can
        pieces, reasons = [candidate.piece, *(other.piece for other in kept)], list[str]()
        for restored in modes:
            if reason := _refuse_rest(walk, pieces, prefix, restored):
                reasons.append(reason)
            else:
                kept.insert(0, candidate)
                modes = (restored,)  # all blocks must hold in the same way
                break
        else:
            kind = type(candidate.module).__name__
            refused.append(Refused(candidate.name, f"{candidate.name} ({kind}): {reasons[0]}"))
            if kept:  # it would not hand on what tokens carry
                why = f"proof (c): tokens merged here would reach {candidate.name}, which is left out"
                refused += _refuse(candidates[:place], why)
                break
    return kept, refused


def _refuse_rest(walk: Walk, pieces: Sequence[Piece], prefix: int, restored: bool) -> str:
    """(c) the rest of the network accepts fewer tokens and is a set function of the patch tokens; else say why not.

    In one pass every block drops one patch token; in a second one it drops the same token and shuffles the others.
    The outputs must agree to rounding. Where tokens are ``restored`` after the last block, in their old places, what
    comes behind it (a grid neck, a pool that reads a mask) sees as many as ever.
    """

    def dropping(shuffle: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shuffler = torch.Generator().manual_seed(1)
        alive: list[Tensor] = []  # original positions of the patches that are present, in their order

        def forward(piece: Piece, *args: Any, **kwargs: Any) -> Any:
            tokens, followers = piece.split(args, kwargs)
            patches = tokens.shape[1] - prefix
            if not alive or len(alive[-1]) != patches:
                alive.append(torch.arange(patches))
            present, whole = alive[-1], prefix + len(alive[0])
            at = torch.cat([torch.arange(prefix), present + prefix]).to(tokens.device)
            stream, _ = piece.front(tokens, followers, at, whole)
            if patches < 2:
                return piece.back(stream)
            # drawn among the sorted ones, so that both passes drop the same token wherever it stands
            drop = present.sort().values[int(torch.randint(patches, (), generator=generator))]
            chosen = (present != drop).nonzero().flatten()
            if shuffle:
                chosen = chosen[torch.randperm(patches - 1, generator=shuffler)]
            alive.append(present[chosen])
            index = torch.cat([torch.arange(prefix), chosen + prefix]).to(stream.device)
            out = piece.back(stream[:, index])
            if not (restored and piece is pieces[-1]):
                return out
            full = out[:, prefix:].mean(dim=1, keepdim=True).repeat(1, whole, 1)
            full[:, torch.cat([torch.arange(prefix), alive[-1] + prefix]).to(out.device)] = out
            return full

        with replaced({piece.block: partial(forward, piece) for piece in pieces}):
            return tensors_of(run(walk.model, walk.example))

    try:
        plain = dropping(False)
    except Exception as error:
        return f"proof (c): the rest of the network does not accept fewer tokens: {in_words(error)}"
    if not all(_same_set(*pair) for pair in zip(plain, dropping(True), strict=True)):
        return "proof (c): the rest of the network depends on the order of the patch tokens"
    return ""


def _same_set(plain: Tensor, shuffled: Tensor) -> bool:
    """Equal to rounding, or for ``(B, N, D)`` token outputs equal as sets of tokens: sums and sums of squares agree.

    Outputs that still hold tokens lie in another order.
    """
    if close(shuffled, plain):
        return True
    if plain.ndim != 3 or plain.shape != shuffled.shape:
        return False
    return close(shuffled.sum(1), plain.sum(1)) and close(shuffled.square().sum(1), plain.square().sum(1))


# --------------------------------------------------------------------------------------------------------------- ending


def find_ending(walk: Walk, found: Found) -> Ending:
    """Find out who reads the tokens after the blocks, and what the rest costs where only prefix tokens are left."""
    classes, readouts = walk.recording.classifier()
    sites = {site.block: site for several in found.sites.values() for site in several if isinstance(site, FlowSite)}
    last = list(sites.values())[-1] if sites else None
    if last is None or last.attention != walk.recording.attended[-1].owner:
        return Ending(False, 0, readouts, classes)  # something attends after the last block that can be cut
    gone = _prefix_only(walk, last, [name for name in sites if name != last.block])
    if gone is None:
        return Ending(False, 0, readouts, classes)
    tokens, prefix = last.layout.tokens, last.layout.prefix
    own = last.cost(tokens, tokens) - last.cost(tokens, prefix)
    return Ending(True, own - gone, readouts, classes)


def _prefix_only(walk: Walk, site: FlowSite, earlier: Sequence[str]) -> int | None:
    """Prove that the output depends on the last block's prefix tokens only, and does not mind the others gone.

    The patches are poisoned with NaN (the output must not change a bit), then cut off (it must not change at all but
    for rounding). ``earlier`` blocks hand out what they were recorded to put out, so that they need not compute.
    Returns the MACs that go with the patches, of this block and of all that follows, or None where the proof fails.
    """
    prefix = site.layout.prefix
    if prefix == 0:
        return None
    last = Piece(walk.model.get_submodule(site.block), site.halves[False, False], site.signature)

    def count(poison: bool) -> tuple[int, Any]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            stream, _ = last.front(*last.split(args, kwargs))
            if not poison:
                return last.back(stream[:, :prefix])
            out = last.back(stream).clone()
            out[:, prefix:] = float("nan")
            return out

        outputs: list[Any] = []
        recorded = {name: walk.recording.attending[name][0].output for name in earlier}
        forwards = {walk.model.get_submodule(name): partial(_put_out, output) for name, output in recorded.items()}
        with replaced({**forwards, last.block: forward}):
            macs = count_macs_quick(lambda: outputs.append(run(walk.model, walk.example)))
        return macs, outputs[0]

    whole, output = count(poison=True)
    if not all_equal(output, walk.recording.output):
        return None
    try:
        rest, output = count(poison=False)
    except Exception:  # something wants the tokens there, though not their values
        return None
    return whole - rest if all_close(output, walk.recording.output) else None


def _put_out(output: Tensor, *_: Any, **__: Any) -> Tensor:
    return output.clone()  # whoever writes into it
