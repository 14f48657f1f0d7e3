"""What several test files build on."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

TOKENS = torch.randn(2, 5, 8)
#: options of a tiny transformer of transformers
WIDE: dict[str, Any] = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
}
LINEAR = 2 * 5 * 8 * 8  # what `Calls.inner` costs on TOKENS


def double_inputs(n: int, dim: int, seed: int, sized: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two images for a mask in float64: what the attention read, the stream, and sizes from 1 to 8."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    tokens = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (2, n), generator=generator).double() if sized else None
    return inner, tokens, sizes


class Calls(nn.Module):
    """A module that is one function, with a linear layer so that the count is never 0."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> object:
        return self.function(self.inner(x))


class Own(nn.Module):
    """A class of the user's, around another model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> object:
        return self.inner(x)


def snapshot(model: nn.Module) -> dict:
    """All that hangs on a model, with its parts by identity."""

    def entry(value: object) -> object:
        if isinstance(value, dict):
            return {key: id(part) for key, part in value.items()}
        if isinstance(value, (list, tuple, set)):
            return [id(part) for part in value]
        return value if isinstance(value, (bool, int, str, type(None))) else id(value)

    return {name: {key: entry(value) for key, value in vars(module).items()} for name, module in model.named_modules()}


def batches(count: int, size: int = 7, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Seven classes that a line can tell apart: each has a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    colours = 2 * torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    drawn = []
    for _ in range(count):
        labels = torch.randperm(max(size, 7), generator=generator)[:size] % 7
        drawn.append((colours[labels, :, None, None] + 0.2 * torch.randn(size, 3, 32, 32, generator=generator), labels))
    return drawn


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def encoded(count: int, damaged: Collection[int]) -> datasets.Dataset:
    """Pictures as bytes, one colour for each class, some cut off in the middle."""
    rows = []
    for index in range(count):
        out = io.BytesIO()
        noise = np.random.default_rng(index).integers(0, 60, (32, 32, 3))
        Image.fromarray((noise + 20 * (index % 7)).astype(np.uint8)).save(out, "PNG")
        whole = out.getvalue()
        rows.append({"bytes": whole[: len(whole) // 2] if index in damaged else whole, "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": rows, "label": [i % 7 for i in range(count)]}, features=features)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def nth(function: Any, count: int, then: Any) -> Any:
    """A function that does something else when it is called for the n-th time."""
    calls = iter(range(1, 10_000))
    return lambda *args, **kwargs: then() if next(calls) == count else function(*args, **kwargs)
