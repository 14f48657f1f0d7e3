"""How a block is called: its tokens, what follows them, and everything else as recorded."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock

#: what transformers hands down to every layer though only its hooks and losses read it, outside of the layer
HANDED_DOWN = ("output_hidden_states", "output_attentions", "return_dict", "num_items_in_batch", "use_cache")


@dataclass(frozen=True)
class Signature:
    """How a block was called: its token argument's name, and every other argument with its recorded value.

    ``follow`` are arguments with one row for each token (rotary positions): they are gathered along with the tokens.
    """

    tokens: str
    names: tuple[str, ...]
    others: tuple[tuple[str, Any], ...]
    follow: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()  # of the forward, for arguments that a call leaves out
    masks: tuple[str, ...] = ()  # those that said which tokens only fill up, none in the recorded call
    by_image: tuple[bool, ...] = ()  # of those: whether the first of three dimensions is the image, not the head

    @classmethod
    def of(
        cls,
        block: nn.Module,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        dims: tuple[int, ...] = (3,),
        padded: bool = False,
        grids: Collection[tuple[int, int]] = (),
    ) -> Signature:
        """Read the call ``block(*args, **kwargs)`` off its forward's signature.

        Args:
            block: the module.
            name: its path, for messages.
            args: of the call.
            kwargs: likewise.
            dims: how many dimensions its tokens may have.
            padded: whether its attention has a mask that says which tokens only fill up.
            grids: of the maps that tokens were made of.

        Raises:
            UnsupportedBlock: where other arguments than the tokens are tensors, or hold any; where tokens fill up.
        """
        parameters = inspect.signature(block.forward).parameters.values()
        names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        if len(args) > len(names):
            raise UnsupportedBlock(f"block {name!r} ({type(block).__name__}) takes variable positional arguments")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [key for key, value in given.items() if isinstance(value, Tensor)]
        if not tensors or given[tensors[0]].ndim not in dims:
            raise UnsupportedBlock(f"block {name!r} ({type(block).__name__}) is not called with (B, N, D) tokens")
        plain = (type(None), bool, int, float, str)
        count = given[tensors[0]].shape[1]
        others = {key: value for key, value in given.items() if key != tensors[0]}
        masks = tuple(key for key, value in others.items() if padded and _is_mask(value, count))
        for key in masks:
            if not bool(seen_by(others[key]).all()):
                raise UnsupportedBlock(f"some tokens of the example only fill up ({key}): pass one without padding")
            others[key] = None
        follow = tuple(key for key, value in others.items() if has_rows(value, count))
        others = {key: value for key, value in others.items() if key not in follow}
        for key, value in others.items():
            if not isinstance(value, plain):
                raise UnsupportedBlock(
                    f"block {name!r} ({type(block).__name__}) also receives {key!r} of type {type(value).__name__}, "
                    "which would have to follow the tokens"
                )
        if sizes := _sizes(others, count, grids):
            raise UnsupportedBlock(
                f"block {name!r} ({type(block).__name__}) also receives {', '.join(sizes)}, by which tokens lie on a "
                "grid that merged ones would not fill"
            )
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty and isinstance(p.default, plain)}
        others = {key: value for key, value in {**defaults, **others}.items() if key not in follow}
        by_image = tuple(_first_is_image(given[key]) for key in follow)
        return cls(tensors[0], names, tuple(others.items()), follow, tuple(defaults.items()), masks, by_image)

    def gather(self, followers: tuple[Any, ...], count: int, positions: Tensor) -> tuple[Any, ...]:
        """Gather the rows of the tokens that are left, ``positions (B, P)`` of ``count``."""
        return tuple(
            gather_rows(value, count, positions, by_image)
            for value, by_image in zip(followers, self.by_image, strict=True)
        )

    def split(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], padding: str | None = None
    ) -> tuple[Tensor, tuple[Any, ...], Tensor | None]:
        """Return the tokens of a call, the arguments that follow them, and what argument ``padding`` masks.

        Raises:
            UnsupportedBlock: where any other argument differs from the recorded call, for which the cut was proven.
        """
        given = {**dict(self.defaults), **dict(zip(self.names, args, strict=False)), **kwargs}
        expected = dict(self.others)
        tokens = given.pop(self.tokens)
        followers = tuple(given.pop(key, None) for key in self.follow)
        mask = given.pop(padding, None) if padding is not None and not torch.compiler.is_exporting() else None
        if padding is None:
            given = {key: value for key, value in given.items() if key not in self.masks}  # in proofs: it masks nothing
        for key, value in given.items():
            wanted = expected.get(key)
            if key in HANDED_DOWN and key not in self.names:
                continue
            boolean = isinstance(value, Tensor) and value.dtype == torch.bool
            if wanted is None and boolean and torch.compiler.is_exporting():
                # transformers writes out the mask of "everything" while exporting: the exported graph checks that it is
                torch._assert_async(value.all(), f"block {name!r} was converted for attention without a mask")
                continue
            if value is not wanted and (isinstance(value, Tensor) or value != wanted):
                shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UnsupportedBlock(
                    f"converted block {name!r} was called with {key}={shown}; the cut was proven for {key}={wanted!r} "
                    "only. Call the model as in the example, or use `with ltm_retrofit.disabled(model):`"
                )
        assert isinstance(tokens, Tensor)
        return tokens, followers, mask


def _is_mask(value: Any, count: int) -> bool:
    """Say whether an argument is an attention mask ``(B, 1, 1 or N, N)``: true and false, or zero and lowest."""
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] != 1:
        return False
    if value.shape[-1] != count or value.shape[-2] not in (1, count):
        return False
    return value.dtype == torch.bool or (value.is_floating_point() and hides_or_shows(value))


def _sizes(others: dict[str, Any], count: int, grids: Collection[tuple[int, int]]) -> list[str]:
    """List the arguments that say how many tokens there are, or how many rows and columns they fill."""
    whole = {key: value for key, value in others.items() if type(value) is int and value > 1}
    found = {key: value for key, value in whole.items() if value == count}
    for (key, value), (other, times) in combinations(whole.items(), 2):
        if value * times == count or (value, times) in grids:
            found |= {key: value, other: times}
    return [f"{key}={value}" for key, value in found.items()]


#: a bias from here down leaves nothing of a softmax
MASKED = -1e3


def seen_by(mask: Tensor) -> Tensor:
    """Return which tokens a mask lets through."""
    return mask if mask.dtype == torch.bool else mask > MASKED


def hides_or_shows(bias: Tensor) -> bool:
    """Say whether a bias does nothing else: zero, or nothing left."""
    return bool(((bias == 0) | ~seen_by(bias)).all())


#: the most tokens (class, distillation, registers) that positions have no rows for
MOST_PREFIX = 16


def has_rows(value: Any, count: int) -> bool:
    """Say whether an argument is a tensor, or a tuple of them, with one row for each of ``count`` tokens."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(has_rows(entry, count) for entry in value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not 2 <= value.ndim <= 4:
        return False
    return 0 <= count - value.shape[-2] <= MOST_PREFIX and value.shape[-2] > 1


def _first_is_image(value: Any) -> bool:
    """Say whether a table, recorded with one image, has a row of its own for each image."""
    if isinstance(value, (tuple, list)):
        return _first_is_image(value[0])
    return bool(value.ndim == 3 and value.shape[0] == 1)


def gather_rows(value: Any, count: int, positions: Tensor, by_image: bool = False) -> Any:
    """Gather the rows ``(…, N, d)`` that belong to the tokens at ``positions (B, P)`` of ``count`` original ones.

    Tables without rows for prefix tokens start behind those. A table shared by images and heads becomes
    ``(B, 1, P, d)``, one of each head ``(B, heads, P, d)``, one of each image ``(B, P, d)``.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(gather_rows(entry, count, positions, by_image) for entry in value)
    missing = count - value.shape[-2]
    rows = positions[:, missing:] - missing
    if value.ndim == 2:
        return value[rows].unsqueeze(1)
    if value.ndim == 3 and by_image:
        return value.expand(len(rows), -1, -1).gather(1, rows.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
    if value.ndim == 3:
        return value[:, rows].transpose(0, 1)
    index = rows[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[-1])
    return value.expand(len(rows), -1, -1, -1).gather(2, index)
