"""Writes the folders that `test_folders.py` loads: one of each method and scope, as the code of that day saved them.

Those of methods whose version has not changed since were written at 56bc864, before the package was rebuilt: what it
saved has to load for ever. Run it (from `tests/`) to add a folder of a new method, version or scope; an existing one is
never written again. What is of an earlier version of its method stays as `…-version-1`, and is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from zoo import randomise

import ltm_retrofit as ltm

FOLDERS = Path(__file__).parent / "folders"
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}


def timm_vit() -> nn.Module:
    return randomise(timm.create_model("vit_tiny_patch16_224", **TINY))


def hf_vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_hidden_layers=4,
        intermediate_size=64,
        num_labels=5,
    )
    return randomise(transformers.ViTForImageClassification(config))


def efficientvit() -> nn.Module:
    model = timm.create_model(
        "efficientvit_b0",
        num_classes=5,
        widths=(4, 8, 16, 16, 32),
        depths=(1, 1, 1, 1, 1),
        head_dim=8,
        head_widths=(32, 32),
    )
    return randomise(model)


#: name → (base, options of `LTMConfig` beside the budget, the image's side)
SAVED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], int]] = {
    "timm-vit-ltm-flow": (timm_vit, {}, 32),
    "timm-vit-tome-flow": (timm_vit, {"method": "tome"}, 32),
    "timm-vit-ltm-local": (timm_vit, {"scope": "LOCAL"}, 32),
    "timm-vit-tome-local": (timm_vit, {"scope": "LOCAL", "method": "tome"}, 32),
    "timm-efficientvit-ltm-grid": (efficientvit, {"scope": "GRID"}, 128),
    "timm-efficientvit-pool-grid": (efficientvit, {"scope": "GRID", "method": "pool"}, 128),
    "hf-vit-ltm-flow": (hf_vit, {}, 32),
    "timm-vit-finetuned": (timm_vit, {}, 32),
    "timm-vit-adapter": (timm_vit, {}, 32),
}


def images(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module, side: int) -> torch.Tensor:
    with torch.no_grad():
        out = model(images(side))
    return out if isinstance(out, torch.Tensor) else out.logits


def shake(model: nn.Module) -> None:
    """Move the masks, as training would: at its start a mask's parameters say nothing of whether they were read."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ltm." in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def write(name: str) -> None:
    build, options, side = SAVED[name]
    example = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(3))
    model = build()
    if name.endswith("adapter"):
        save_file(model.state_dict(), FOLDERS / f"{name}.base.safetensors")
    try:
        model = ltm.retrofit(model, ltm.LTMConfig(flops=0.75, **options), example)
    except ltm.BudgetError as error:
        model = ltm.retrofit(model, ltm.LTMConfig(flops=error.nearest, **options), example)
    if name.endswith(("finetuned", "adapter")):
        batch = images(side).repeat(4, 1, 1, 1), torch.arange(8) % 5
        train = "masks" if name.endswith("adapter") else "all"
        ltm.finetune(model, [batch] * 3, config=ltm.TrainConfig(batch_size=8, train=train, lr=1e-2))
        model.eval()
    else:
        shake(model)
    ltm.save_pretrained(model, FOLDERS / name, adapter=name.endswith("adapter"))
    save_file({"logits": logits(model, side)}, FOLDERS / f"{name}.expected.safetensors")


if __name__ == "__main__":
    for name in SAVED:
        if not (FOLDERS / name).exists():
            write(name)
            print(name)
