"""How a block is called: its tokens, what follows them, all else as recorded; and which of its settings were read."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock

#: what transformers hands down to every layer though only its hooks and losses read it, outside of the layer
HANDED_DOWN = ("output_hidden_states", "output_attentions", "return_dict", "num_items_in_batch", "use_cache")
#: a bias from here down leaves nothing of a softmax
MASKED = -1e3
#: the most tokens (class, distillation, registers) that positions have no entries for
MOST_PREFIX = 16


@dataclass(frozen=True)
class Signature:
    """How a block was called: its token argument's name, and every other argument with its recorded value.

    ``follow`` are arguments with one entry for each token (rotary positions): they are gathered along with the tokens.
    """

    tokens: str
    names: tuple[str, ...]
    others: tuple[tuple[str, Any], ...]
    follow: tuple[str, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()  # of the forward, for arguments that a call leaves out
    masks: tuple[str, ...] = ()  # those that said which tokens are padding, none in the recorded call
    by_image: tuple[bool, ...] = ()  # of ``follow``: whether the first of three dimensions is the image, not the head

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
            padded: whether its attention has a mask that says which tokens are padding.
            grids: of the maps that tokens were made of.

        Raises:
            UnsupportedBlock: where other arguments than the tokens are tensors, or hold any; where tokens are padding.
        """
        parameters = inspect.signature(block.forward).parameters.values()
        names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        who = f"block {name!r} ({type(block).__name__})"
        if len(args) > len(names):
            raise UnsupportedBlock(f"{who} takes variable positional arguments")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = next((key for key, value in given.items() if isinstance(value, Tensor)), "")
        if not tokens or given[tokens].ndim not in dims:
            raise UnsupportedBlock(f"{who} is not called with (B, N, D) tokens")
        plain = (type(None), bool, int, float, str)
        count = given[tokens].shape[1]
        others = {key: value for key, value in given.items() if key != tokens}
        masks = tuple(key for key, value in others.items() if padded and _is_mask(value, count))
        for key in masks:
            if not bool(seen_by(others[key]).all()):
                raise UnsupportedBlock(f"some tokens of the example are padding ({key}): pass one without padding")
            others[key] = None  # a mask that hides nothing changes nothing: the proofs run without it
        follow = tuple(key for key, value in others.items() if follows(value, count))
        others = {key: value for key, value in others.items() if key not in follow}
        for key, value in others.items():
            if not isinstance(value, plain):
                raise UnsupportedBlock(
                    f"{who} also receives {key!r} of type {type(value).__name__}, which would have to follow the tokens"
                )
        if sizes := _sizes(others, count, grids):
            raise UnsupportedBlock(
                f"{who} also receives {', '.join(sizes)}, by which tokens lie on a grid that merged ones would not fill"
            )
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty and isinstance(p.default, plain)}
        others = {key: value for key, value in {**defaults, **others}.items() if key not in follow}
        by_image = tuple(_first_is_image(given[key]) for key in follow)
        return cls(tokens, names, tuple(others.items()), follow, tuple(defaults.items()), masks, by_image)

    def gather(self, followers: tuple[Any, ...], count: int, positions: Tensor) -> tuple[Any, ...]:
        """Gather the entries of the tokens that are left, ``positions (B, P)`` of ``count``."""
        return tuple(
            gather_entries(value, count, positions, by_image)
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
    """List the arguments that say how many tokens there are, or the height and width that they fill.

    Unlike other numbers, these would be wrong once tokens are merged: a block that reshapes by them must not be cut.
    """
    whole = {key: value for key, value in others.items() if type(value) is int and value > 1}
    found = {key: value for key, value in whole.items() if value == count}
    for (key, value), (other, times) in combinations(whole.items(), 2):
        if value * times == count or (value, times) in grids:
            found |= {key: value, other: times}
    return [f"{key}={value}" for key, value in found.items()]


def seen_by(mask: Tensor) -> Tensor:
    """Return which tokens a mask lets through."""
    return mask if mask.dtype == torch.bool else mask > MASKED


def hides_or_shows(bias: Tensor) -> bool:
    """Say whether a bias does nothing else: zero, or nothing left."""
    return bool(((bias == 0) | ~seen_by(bias)).all())


def follows(value: Any, count: int) -> bool:
    """Say whether an argument is a tensor, or a tuple of them, with one entry for each of ``count`` tokens."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(follows(entry, count) for entry in value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not 2 <= value.ndim <= 4:
        return False
    # rotary positions may leave out the prefix tokens, which lie nowhere in the image
    return 0 <= count - value.shape[-2] <= MOST_PREFIX and value.shape[-2] > 1


def _first_is_image(value: Any) -> bool:
    """Say whether a table, recorded with one image, has entries of its own for each image."""
    if isinstance(value, (tuple, list)):
        return _first_is_image(value[0])
    return bool(value.ndim == 3 and value.shape[0] == 1)


def gather_entries(value: Any, count: int, positions: Tensor, by_image: bool = False) -> Any:
    """Gather the entries ``(…, N, d)`` that belong to the tokens at ``positions (B, P)`` of ``count`` original ones.

    Tables without entries for prefix tokens start behind those. A table shared by images and heads becomes
    ``(B, 1, P, d)``, one of each head ``(B, heads, P, d)``, one of each image ``(B, P, d)``.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(gather_entries(entry, count, positions, by_image) for entry in value)
    missing = count - value.shape[-2]
    at = positions[:, missing:] - missing
    if value.ndim == 2:
        return value[at].unsqueeze(1)
    if value.ndim == 3 and by_image:
        return value.expand(len(at), -1, -1).gather(1, at.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
    if value.ndim == 3:
        return value[:, at].transpose(0, 1)
    index = at[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[-1])
    return value.expand(len(at), -1, -1, -1).gather(2, index)


def full_backward_hooks(module: nn.Module) -> list[str]:
    """Name the hooks because of which a module is given a copy of its tokens whenever there are gradients."""
    full = module._backward_hooks if module._is_full_backward_hook else {}
    return [f"the full backward hook {_name(hook)}" for hook in (*full.values(), *module._backward_pre_hooks.values())]


def hooks_of(module: nn.Module) -> list[str]:
    """Name the hooks that may hand a module, or the next one, other tensors than they were given."""
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}.values()
    ours = __name__.partition(".")[0]
    named = [f"the hook {_name(hook)}" for hook in hooks if not _name(hook).startswith(f"{ours}.")]
    return [*full_backward_hooks(module), *named]


def _name(hook: Any) -> str:
    """Return where a hook was written, and under which name."""
    function = hook.func if isinstance(hook, partial) else hook
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


# ------------------------------------------------------------------------------------------------------------ settings
# A graph has its block's plain attributes frozen in: branches were taken by them, numbers written out. They are noted,
# so that a block whose attribute is another one later is refused, not run with the old value.

Settings = tuple[tuple[str, Any], ...]

_GONE = object()
WRITTEN = ...
#: what every module has
_OWN = frozenset(nn.Module().__dict__)


def watched(block: nn.Module) -> tuple[nn.Module, set[str]]:
    """Return a stand-in that shares all that hangs on a block, and the names that are read of it from now on."""
    read: set[str] = set()

    class Watched(type(block)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    stand_in: nn.Module = object.__new__(Watched)
    object.__setattr__(stand_in, "__dict__", block.__dict__)
    return stand_in, read


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return what hangs on a module but for parameters, buffers, children and its mode.

    Flags of checkpointing are left out: they repeat a computation and change none of it.
    """
    return {
        name: _noted(value)
        for name, value in module.__dict__.items()
        if name not in _OWN and "checkpointing" not in name and name != "use_checkpoint"
    }


def _noted(value: Any) -> Any:
    """Copy containers, however deep, and nothing in them."""
    if type(value) is dict:
        return {key: _noted(entry) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_noted, value))
    return set(value) if type(value) is set else value


def read_settings(before: dict[str, Any], block: nn.Module, read: set[str]) -> Settings:
    """Return those that a forward read; `WRITTEN` in place of the values of those that it wrote, too."""
    found = [(name, value) for name, value in sorted(before.items()) if name in read]
    return tuple((name, value if _same(block.__dict__.get(name, _GONE), value) else WRITTEN) for name, value in found)


def frozen(several: Iterable[Settings]) -> Settings:
    """Return the settings that several graphs of a block have read, but for those that any of them wrote."""
    found: dict[str, Any] = {}
    for name, value in (setting for settings in several for setting in settings):
        found[name] = WRITTEN if found.get(name) is WRITTEN else value
    return tuple((name, value) for name, value in found.items() if value is not WRITTEN)


def changed_setting(module: nn.Module, settings: Settings) -> tuple[str, Any, Any] | None:
    """Return name, old and present value of the first that is another one now."""
    for name, value in settings:
        now = module.__dict__.get(name, _GONE)
        if not _same(now, value):
            return name, value, "gone" if now is _GONE else now
    return None


def _same(one: Any, other: Any) -> bool:
    """Compare plain values and what containers hold by value, all else by identity."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, (bool, int, float, str, set)) and one == other
