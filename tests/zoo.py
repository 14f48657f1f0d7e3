"""Tiny models of every attention-block structure of timm, Hugging Face and plain PyTorch, all randomised.

`ZOO[name]()` gives a new ``(model, example)``: in eval mode, the same weights and the same example at each call. The
example is a batch of one image, or the keyword arguments where the model wants more. What a family's smallest member
cannot be is said next to its row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network

import torch
from torch import Tensor, nn
from zoo_hf import HF
from zoo_timm import TIMM
from zoo_torch import TORCH

Example = Tensor | dict[str, Tensor]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
Row = tuple[Callable[[], nn.Module], int | Callable[[], Example]]  # the model; the image's side, or an example


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw parameters and statistics anew: LayerScale of 1e-5 and zero biases would make proofs vacuous.

    All from N(0, 0.08²). What is all ones stays centred at 1, whatever its shape: scales of (C, 1, 1) and temperatures
    of (heads, 1, 1) too; so do BatchNorm's weights unless they are all zeros, since Hugging Face starts some at noise.
    A model with BatchNorm gets N(0, 1 / fan-in) for the weights of its layers: in eval mode nothing there brings a
    signal back to its size, and at 0.08 the logits of a MobileViT differ by 1e-7 of themselves between two images.
    """
    generator = torch.Generator().manual_seed(seed)
    normed = [module for module in model.modules() if isinstance(getattr(module, "running_mean", None), Tensor)]
    layers = {id(m.weight): m.weight[0].numel() for m in model.modules() if isinstance(m, LAYERS)} if normed else {}
    scales = {id(m.weight) for m in normed if m.weight is not None and bool((m.weight != 0).any())}
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if id(parameter) in scales or bool((parameter == 1).all()) else 0.0
            spread = layers[id(parameter)] ** -0.5 if id(parameter) in layers else 0.08
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
        for module in normed:
            shape = module.running_mean.shape
            module.running_mean.copy_(0.1 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
    return model.eval()


def picture(side: int, batch: int = 1) -> Tensor:
    """Return the same noise at each call."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(3))


def _make(row: Row) -> tuple[nn.Module, Example]:
    build, example = row
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for what is drawn into buffers
        model = randomise(build())
    return model, picture(example) if isinstance(example, int) else example()


ZOO: dict[str, Callable[[], tuple[nn.Module, Example]]] = {
    name: partial(_make, row) for table in (TIMM, HF, TORCH) for name, row in table.items()
}
