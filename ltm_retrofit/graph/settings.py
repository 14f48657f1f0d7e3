"""What a block's cut has frozen: its plain attributes, which Python read while the block was traced."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)
_GONE = object()

Settings = tuple[tuple[str, Any], ...]


def settings_of(block: nn.Module) -> Settings:
    """Return a block's own plain attributes with their values.

    Not its mode, nor what is private, nor flags of checkpointing, which repeat a computation and change none of it.
    """
    return tuple(
        (name, value)
        for name, value in sorted(block.__dict__.items())
        if isinstance(value, _PLAIN) and name != "training" and name[0] != "_" and "checkpoint" not in name
    )


def changed_setting(block: nn.Module, settings: Settings) -> tuple[str, Any, Any] | None:
    """Return name, old and present value of the first that is another one now."""
    for name, value in settings:
        now = getattr(block, name, _GONE)
        if now is not value and now != value:
            return name, value, "gone" if now is _GONE else now
    return None
