"""What a block's cut has frozen: its attributes that Python read while the block was traced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_GONE = object()
WRITTEN = ...
#: what every module has
_OWN = frozenset(nn.Module().__dict__)

Settings = tuple[tuple[str, Any], ...]


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
    """Return those that a trace read; `WRITTEN` in place of the values of those that it wrote, too."""
    found = [(name, value) for name, value in sorted(before.items()) if name in read]
    return tuple((name, value if _same(block.__dict__.get(name, _GONE), value) else WRITTEN) for name, value in found)


def frozen(several: Iterable[Settings]) -> Settings:
    """Return the settings of several traces of a block, but for those that any of them wrote."""
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
