"""The README's path for models that were read from files: retrofit, save, load in a fresh process, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tr
from pieces import WIDE
from torch import nn
from zoo import randomise

import ltm_retrofit as ltm
from ltm_retrofit.finding.example import tensors_of

torch.set_num_threads(1)

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))

FRESH = """
import sys, torch
import ltm_retrofit as ltm
from ltm_retrofit.finding.example import tensors_of
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    images, expected = torch.load(folder + ".pt")
    with torch.no_grad():
        given = tensors_of(ltm.from_pretrained(folder)(images))
    assert len(given) == len(expected) > 0 and all(map(torch.equal, given, expected)), folder
"""


def outputs(model: nn.Module, images: torch.Tensor = IMAGES) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_of(model(images))


def vit(**changes: Any) -> nn.Module:
    return randomise(tr.ViTForImageClassification(tr.ViTConfig(num_labels=7, **{**WIDE, **changes})))


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[..., str]:
    """Write a transformers checkpoint as transformers does."""

    def write(model: nn.Module, **options: Any) -> str:
        model.save_pretrained(tmp_path / "host", **options)
        tr.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "host")
        return str(tmp_path / "host")

    return write


def classifier(folder: str, **options: Any) -> nn.Module:
    return tr.AutoModelForImageClassification.from_pretrained(folder, **options)


def without_pooling(folder: str) -> nn.Module:
    return tr.ViTModel.from_pretrained(folder, add_pooling_layer=False)


#: name → (how it is written, how it is read)
READ: dict[str, tuple[Callable[[Any], str], Callable[[str], nn.Module]]] = {
    "mapped": (lambda write: write(vit()), classifier),
    "sharded": (lambda write: write(vit(), max_shard_size="40KB"), classifier),
    "stored-in-half": (lambda write: write(vit().to(torch.bfloat16)), classifier),
    "read-in-half": (lambda write: write(vit()), lambda folder: classifier(folder, dtype=torch.bfloat16)),
    "placed": (lambda write: write(vit()), lambda folder: classifier(folder, device_map="cpu")),
    "keywords": (
        lambda write: write(vit()),
        lambda folder: classifier(
            folder, attn_implementation="eager", layer_norm_eps=1e-3, num_labels=5, ignore_mismatched_sizes=True
        ),
    ),
    "argument-of-the-class": (lambda write: write(vit()), without_pooling),
    "mask-token": (lambda write: write(vit()), lambda folder: tr.ViTModel.from_pretrained(folder, use_mask_token=True)),
}


def saved_and_expected(model: nn.Module, folder: Path) -> str:
    images = IMAGES.to(next(model.parameters()).dtype)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
    expected = outputs(model, images)
    ltm.save_pretrained(model, folder)
    assert all(map(torch.equal, outputs(model, images), expected))
    torch.save((images, expected), f"{folder}.pt")
    return str(folder)


def test_a_model_of_transformers_comes_back_from_a_fresh_process(file_of, tmp_path: Path) -> None:
    folders = []
    for name, (write, read) in READ.items():
        torch.manual_seed(1)  # a classifier of another size begins at random
        folders.append(saved_and_expected(read(write(file_of)), tmp_path / name))
        for file in (tmp_path / "host").iterdir():
            file.unlink()
    subprocess.run([sys.executable, "-c", FRESH, *folders], check=True, timeout=300)


def local(folder: Path, **options: Any) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


@pytest.mark.slow
def test_a_model_of_timm_comes_back_from_a_fresh_process(tmp_path: Path) -> None:
    host = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY))
    timm.models.save_for_hf(host, tmp_path / "host", model_args=TINY, safe_serialization=True)
    ways = {
        "as-it-is": {},
        "in-half": {"dtype": torch.bfloat16},
        "other-classes": {"num_classes": 3},
        "averaged": {"global_pool": "avg", "fc_norm": False, "drop_path_rate": 0.1},
    }
    folders = [
        saved_and_expected(local(tmp_path / "host", **options), tmp_path / name) for name, options in ways.items()
    ]
    from_file = timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, checkpoint_path=str(tmp_path / "host" / "model.safetensors"), **TINY
    )
    folders.append(saved_and_expected(from_file.eval(), tmp_path / "from-file"))
    subprocess.run([sys.executable, "-c", FRESH, *folders], check=True, timeout=300)


def test_converting_says_nothing_of_where_weights_lie(file_of) -> None:
    """Mapped from a file, weights lie at odd addresses, where products round otherwise."""
    model = classifier(file_of(vit()))
    assert any(parameter.data_ptr() % 64 for parameter in model.parameters())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    with pytest.raises(ltm.BudgetError):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.01))
    assert any(parameter.data_ptr() % 64 for parameter in model.parameters()), "a failure leaves no trace"
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
    assert not any(tensor.data_ptr() % 64 for tensor in (*model.parameters(), *model.buffers()))
    after = {name: value for name, value in model.named_parameters() if name in before}
    assert all(value is parameters[name] and torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("there", [False, True])
def test_what_could_not_be_loaded_alone_is_not_written(there: bool, tmp_path: Path) -> None:
    model = ltm.retrofit(timm.models.vit_tiny_patch16_224(img_size=32, patch_size=8, depth=4, num_classes=7).eval())
    folder = tmp_path / "saved"
    if there:
        folder.mkdir()
    with pytest.raises(ltm.CheckpointError, match=r"VisionTransformer.*cannot be rebuilt.*allow_unloadable=True"):
        ltm.save_pretrained(model, folder)
    assert folder.exists() == there and not list(folder.glob("*"))
    ltm.save_pretrained(model, folder, allow_unloadable=True)
    with pytest.raises(ltm.CheckpointError, match="base="):
        ltm.from_pretrained(folder)
