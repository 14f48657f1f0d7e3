"""Which tokens may know of one another? Those that an attention lets see the same; others must not become one token.

That a module treats each token alone says nothing of it: behind a causal attention an MLP does, too, and a merge there
would show the earlier tokens what comes later. What an attention hides was read off its recorded call (`attention`).
Whether it stays hidden shows in a pass in which one token is another one: where only some of the others change behind
an attention, those that do and those that do not know of different ones.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.finding.attention import AttentionMode
from ltm_retrofit.finding.example import Example, flags_of, floats_of, other_image, run, tensors_of
from ltm_retrofit.finding.recording import Call, Reached, Recording

#: passes in which a token is changed, at most, in one search
PASSES = 8
#: where tokens may lie in a tensor of so many dimensions, the likeliest first: (first, last) dimension
PLACES = {2: [(0, 0)], 3: [(1, 1), (0, 0), (0, 1)], 4: [(2, 3), (1, 2), (1, 1), (2, 2)]}


@dataclass(frozen=True)
class Views:
    """What the tokens behind an attention know of: ``groups (N,)``, equal where they know of the same; in words."""

    groups: Tensor
    how: str

    @property
    def reason(self) -> str:
        """Say why tokens of different groups must not become one."""
        return f"attention among its tokens {self.how}: merged, they would learn what it hides from them"


def find_views(model: nn.Module, example: Example, recording: Recording) -> dict[int, Views]:
    """Find the attentions, by number, behind which not all tokens know of the same. Runs the model a few times.

    No pass is needed where no attention hides a token from another one, as in nearly all models of images.
    """
    hiding: list[tuple[int, Tensor, str]] = []  # what different attentions hide, and the first that does
    patterns = _lasting(model, example, recording)
    for number, attended in enumerate(recording.attended):
        if (sees := patterns[number]) is None or any(_same(sees, other) for _, other, _ in hiding):
            continue
        how = _in_words(sees)
        if how == CAUSAL or not attended.seen.hides:  # padding is refused for itself
            hiding.append((number, sees, how))
    found: dict[int, Views] = {}
    for place, (first, sees, how) in enumerate(hiding):
        behind = _behind(model, example, recording, first, sees) if place < PASSES else None
        if behind is None:  # it cannot be tried: what was read off the calls themselves holds
            behind = [n for n, other in enumerate(patterns) if _same(other, sees)]
        for number in behind:
            groups = _groups(sees)
            if number in found:
                groups = torch.unique(torch.stack([groups, found[number].groups], 1), dim=0, return_inverse=True)[1]
            found[number] = Views(groups, how)
    return found


def _lasting(model: nn.Module, example: Example, recording: Recording) -> list[Tensor | None]:
    """Return which keys each attention lets each token see, where it hides any of them whatever the image is.

    Weights of a softmax may be zero because logits lie hundreds apart, as attention sinks have them. Those of another
    image are zero elsewhere.
    """
    patterns = [attended.seen.sees for attended in recording.attended]
    read = [sees is not None and not one.seen.masked for sees, one in zip(patterns, recording.attended, strict=True)]
    if not any(read):
        return patterns
    other, again = other_image(example), list[Tensor | None]()
    with AttentionMode(lambda seen: again.append(seen.sees), data=floats_of(other), flags=flags_of(other)):
        run(model, other)
    if len(again) != len(patterns):  # the model took another way with it
        again = [None] * len(patterns)
    return [_in_both(one, two) if zeros else one for one, two, zeros in zip(patterns, again, read, strict=True)]


def _in_both(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    """Return what is hidden whatever the image is, of two; among zeros that an image makes only a causal mask shows."""
    if one is None or two is None or one.shape != two.shape:
        return None
    return one | two if torch.equal(one, two) or _in_words(one | two) == CAUSAL else None


def _same(sees: Tensor | None, other: Tensor) -> bool:
    return sees is not None and sees.shape == other.shape and torch.equal(sees, other)


CAUSAL = "is causal"


def _in_words(sees: Tensor) -> str:
    """Say what an attention does to ``(heads, N, keys)``."""
    if not bool(sees.triu(1).any()) or not bool(sees.tril(-1).any()):
        return CAUSAL
    groups = _groups(sees)
    if sees.shape[1] == sees.shape[2] and bool((sees == (groups[:, None] == groups[None])).all()):
        return "keeps to windows"
    return "lets tokens see different others"


def _groups(sees: Tensor) -> Tensor:
    """Number the tokens ``(N,)``, equal where they see the same others and are seen by the same."""
    views = sees.transpose(0, 1).flatten(1)
    if sees.shape[1] == sees.shape[2]:
        views = torch.cat([views, sees.permute(2, 0, 1).flatten(1)], dim=1)
    groups: Tensor = torch.unique(views, dim=0, return_inverse=True)[1]
    return groups.cpu()


def _behind(model: nn.Module, example: Example, recording: Recording, first: int, sees: Tensor) -> list[int] | None:
    """Return the attentions behind which some of as many tokens know that one was changed before, and others do not.

    The token is one that about half of them see. It becomes, but for a little noise, the one that most of them see: a
    weight that is zero because the image is so, and not because it must be, would no longer be. None where the first
    attention's module is not given its tokens.
    """
    count = sees.shape[1]
    if sees.shape[2] != count:
        return None
    seen, places = sees.any(dim=0).sum(dim=0).cpu(), torch.arange(count)
    # of those that not all see; in the middle, where several are seen alike
    half = (seen - count / 2).abs().where(seen < count, torch.inf) * count + (places - count // 2).abs()
    token = int(half.argmin())
    popular = int(seen.where(places != token, -1).argmax())
    owners = {attended.owner: number for number, attended in enumerate(recording.attended) if number >= first}
    changed: set[str] = set()
    tried: list[bool] = []

    def change(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if tried:
            return None
        made = list(args)
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in given:
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and (dims := tokens_in(value, count)) is not None
            ):
                other = _moved(value, dims, token, popular)
                tried.append(True)
                if isinstance(place, int):
                    made[place] = other
                    return tuple(made), kwargs
                return args, {**kwargs, place: other}
        tried.append(False)
        return None

    def compare(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls = recording.attending[name]
        if len(calls) == 1 and tried == [True] and (some := _differs(calls[0], output, count)) is not None:
            if bool(some.any()) and not bool(some.all()):
                changed.add(name)
        if owners[name] == len(recording.attended) - 1 or tried == [False]:
            raise Reached

    with ExitStack() as hooks:
        owner = model.get_submodule(recording.attended[first].owner)
        hooks.enter_context(owner.register_forward_pre_hook(change, with_kwargs=True))
        for name in owners:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(compare, name)))
        with suppress(Reached):
            run(model, example)
    return [n for n, one in enumerate(recording.attended) if one.owner in changed] if tried == [True] else None


def tokens_in(value: Tensor, count: int) -> tuple[int, int] | None:
    """Return the first and the last of the dimensions in which ``count`` tokens lie, if they do."""
    for first, last in PLACES.get(value.ndim, ()):
        if prod(value.shape[first : last + 1]) == count:
            return first, last
    return None


def _moved(value: Tensor, dims: tuple[int, int], token: int, popular: int) -> Tensor:
    """Return a copy in which one token is another one, but for a little noise."""
    flat = value.clone(memory_format=torch.contiguous_format).flatten(*dims)
    other = flat.select(dims[0], popular)
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0)).to(other)
    flat.select(dims[0], token).copy_(other + 0.1 * (other.std() + 1e-6) * noise)
    return flat.view(value.shape)


def _differs(call: Call, output: Any, count: int) -> Tensor | None:
    """Say which of as many tokens ``(N,)`` came out otherwise than in the recorded call; None where others come out."""
    before, after = (
        next((x for x in tensors_of(each) if x.is_floating_point()), None) for each in (call.output, output)
    )
    if before is None or after is None or before.shape != after.shape:
        return None
    dims = tokens_in(before, count)
    if dims is None:
        return None
    return (before != after).flatten(*dims).movedim(dims[0], 0).flatten(1).any(dim=1).cpu()
