"""What several test files build on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

TOKENS = torch.randn(2, 5, 8)
LINEAR = 2 * 5 * 8 * 8  # what `Calls.inner` costs on TOKENS


class Calls(nn.Module):
    """A module that is one function, with a linear layer so that the count is never 0."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> object:
        return self.function(self.inner(x))


def snapshot(model: nn.Module) -> dict:
    """All that hangs on a model, with its parts by identity."""

    def entry(value: object) -> object:
        if isinstance(value, dict):
            return {key: id(part) for key, part in value.items()}
        if isinstance(value, (list, tuple, set)):
            return [id(part) for part in value]
        return value if isinstance(value, (bool, int, str, type(None))) else id(value)

    return {name: {key: entry(value) for key, value in vars(module).items()} for name, module in model.named_modules()}
