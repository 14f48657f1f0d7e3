"""May a mask be registered on a module? Not where that calls each of its children: the mask would be one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

NAME = "ltm_bystander"


class Bystander(nn.Module):
    """A child that hands on what it is given, and notes that it was called."""

    called = False

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Hand on what comes."""
        self.called = True
        return x


@contextmanager
def bystander(module: nn.Module) -> Iterator[Bystander]:
    """Give a module one child more, its last, and take it away again."""
    child = Bystander()
    module._modules[NAME] = child
    try:
        yield child
    finally:
        del module._modules[NAME]
