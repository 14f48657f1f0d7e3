"""Four tiny bases for `hybrids.py`: a windowed, two convolutional and a rotary transformer, trained in minutes.

They see the embedded canvases. EfficientViT gets them enlarged from 64 × 64 to 128 × 128, so that it attends on an
8 × 8 grid. Every base is trained from scratch but ``rope``, which starts from the first stage of ``train_base.py``
(the same transformer without the rotary embedding). At first a shrinking share of the images has no clutter. Only the
validation digits are looked at.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.mobilevit import _inverted_residual_block, _mobilevit_block
from torch import Tensor, nn
from torch.nn import functional as F

from ltm_retrofit.tuning.sources import draw_split, source_digits

RUNS = Path(__file__).parent.parent / "runs" / "hybrids"
NARROW = RUNS.parent / "train_base" / "canvas64.pt"  # what the first stage of train_base.py left
CANVAS = 64
PER_DIGIT, PER_EPOCH, BATCH = 20, 4, 64  # canvases drawn of each source digit; of them in an epoch; in a step
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
#: lessons: share of the training in which images without clutter die out
BASES: dict[str, dict[str, Any]] = {
    "swin": {
        "architecture": "swin_tiny_patch4_window7_224",
        "args": {"img_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 4], "num_heads": [2, 4]}
        | {"window_size": 4, "drop_path_rate": 0.0},
        **{"size": 64, "epochs": 15, "lr": 2e-3, "lessons": 0.4},
    },
    "mobilevit": {
        "architecture": "mobilevit_xxs",
        "args": {"num_features": 128},
        "blocks": [
            {"c": 16, "s": 2},
            {"c": 32, "s": 2, "transformer_dim": 64, "transformer_depth": 4},
            {"c": 48, "s": 2, "transformer_dim": 80, "transformer_depth": 3},
        ],
        **{"size": 128, "epochs": 11, "lr": 2e-3, "lessons": 0.3},  # 64 and 16 tokens a sequence, as MobileViT has
    },
    "efficientvit": {
        "architecture": "efficientvit_b0",
        "args": {"widths": [8, 8, 16, 48, 64], "depths": [0, 1, 1, 3, 2], "head_dim": 16, "head_widths": [192, 192]},
        **{"size": 128, "epochs": 7, "lr": 2e-3, "lessons": 0.3},
    },
    "rope": {
        "architecture": "vit_small_patch16_rope_ape_224",
        "args": {**VIT, "init_values": 1.0, "no_embed_class": False},
        **{"warm": str(NARROW), "size": 64, "epochs": 3, "lr": 3e-4, "lessons": 0.0},
    },
}


def build(base: dict[str, Any]) -> nn.Module:
    """Build an untrained base from its description."""
    args = dict(base["args"])
    if "blocks" in base:
        args["blocks"] = tuple(
            _mobilevit_block(d=1, patch_size=2, br=2.0, **block)
            if "transformer_dim" in block
            else _inverted_residual_block(d=1, br=2.0, **block)
            for block in base["blocks"]
        )
    model = timm.create_model(base["architecture"], num_classes=10, **args)
    told = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bilinear", "tag": "digits"}
    model.pretrained_cfg = {**model.pretrained_cfg, **told, "input_size": (3, base["size"], base["size"])}
    return model


def load(name: str) -> nn.Module:
    """Load a trained base."""
    model = build(json.loads((RUNS / name / "base.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(RUNS / name / "model.safetensors"))
    return model.eval()


def initialise(model: nn.Module, warm: str | None) -> None:
    """Copy every weight of the same name and shape from another model, or draw the weights larger than timm does."""
    if warm is not None:
        given, own = torch.load(warm, weights_only=True)["model"], model.state_dict()
        fitting = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
        model.load_state_dict({**own, **fitting})
        print(f"{len(fitting)} of {len(own)} tensors from {warm}; others: {sorted(set(own) - set(fitting))}")
        return
    for module in model.modules():  # 0.02 is meant for hundreds of channels; with dozens it learns nothing for minutes
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def canvases(split: str, per_digit: int) -> tuple[Tensor, Tensor]:
    """Return a split's canvases, drawn once and kept."""
    kept = RUNS / f"{split}_{per_digit}.npz"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        # the seed of the shipped base; the fine-tune draws with another
        x, y = draw_split(split, per_digit, seed=0, canvas=CANVAS)
        np.savez(kept, x=x, y=y)
    loaded = np.load(kept)
    return torch.from_numpy(loaded["x"]), torch.from_numpy(loaded["y"])


def to_batch(x: Tensor, size: int) -> Tensor:
    """``(n, 64, 64)`` in 0..255 → ``(n, 3, size, size)`` in −1..1."""
    x = ((x.float() / 255 - 0.5) / 0.5)[:, None]
    if size != x.shape[-1]:
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def shifted(x: Tensor, most: int = 6) -> Tensor:
    """Move each canvas by up to ``most`` pixels, wrapping around."""
    shifts = torch.randint(-most, most + 1, (len(x), 2)).tolist()
    return torch.stack([one.roll((down, right), (0, 1)) for one, (down, right) in zip(x, shifts, strict=True)])


def uncluttered(digits: Tensor) -> Tensor:
    """Draw source digits ``(n, 8, 8)`` at random places and scales on canvases ``(n, 64, 64)`` with noise only."""
    size = 8 * torch.empty(len(digits), 1).uniform_(2.5, 4.0)
    middle = (size + (64 - 2 * size) * torch.rand(len(digits), 2)) / 32 - 1  # half a digit off the edge at least
    theta = torch.zeros(len(digits), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = (64 / size)[:, 0]
    theta[:, :, 2] = -middle * 64 / size
    grid = F.affine_grid(theta, [len(digits), 1, 64, 64], align_corners=False)
    drawn = F.grid_sample(digits[:, None].float(), grid, align_corners=False)[:, 0]
    return (drawn * torch.empty(len(digits), 1, 1).uniform_(0.7, 1.0) + 20 * torch.randn(drawn.shape)).clamp(0, 255)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, size: int) -> float:
    """Return top-1 accuracy in percent."""
    model.eval()
    pairs = zip(x.split(128), y.split(128), strict=True)
    return 100 * sum(int((model(to_batch(a, size)).argmax(-1) == b).sum()) for a, b in pairs) / len(y)


def note(log: Path, line: dict[str, Any]) -> None:
    """Append a line to the log, with what it was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    line["hardware"] = f"{cpu}, {torch.get_num_threads()} thread, torch {torch.__version__}, timm {timm.__version__}"
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def noted(log: Path, stage: str) -> Iterator[dict[str, Any]]:
    """Go through the log's lines of a stage."""
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        if (line := json.loads(text))["stage"] == stage:
            yield line


def train(name: str, log: Path) -> None:
    """Train one base, unless it exists."""
    base, folder = BASES[name], RUNS / name
    if (folder / "model.safetensors").exists():
        return print(f"{name}: exists in {folder}, skipped")
    torch.manual_seed(0)
    model = build(base).to(memory_format=torch.channels_last)
    initialise(model, base.get("warm"))
    decay, rest = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=base["lr"], foreach=True)
    (x, y), (val_x, val_y) = canvases("train", PER_DIGIT), canvases("validation", 8)
    digits = torch.from_numpy(source_digits("train")[0])  # canvas i shows digit i modulo their number
    order = torch.randperm(len(y)).split(len(y) * PER_EPOCH // PER_DIGIT)
    steps = len(order[0]) // BATCH
    size, total, step, began = base["size"], base["epochs"] * steps, 0, time.perf_counter()
    for epoch in range(base["epochs"]):
        index, seen, start = order[epoch % len(order)], 0.0, time.perf_counter()
        model.train()
        for chosen in index[torch.randperm(len(index))].split(BATCH)[:steps]:
            for group in optimizer.param_groups:
                group["lr"] = base["lr"] * min(10 * (step + 1) / total, 0.5 * (1 + math.cos(math.pi * step / total)))
            images = shifted(x[chosen]).float()
            easy = torch.rand(len(chosen)) < 1 - step / (base["lessons"] * total + 1e-9)
            if easy.any():
                images[easy] = uncluttered(digits[chosen[easy] % len(digits)])
            loss = F.cross_entropy(model(to_batch(images, size)), y[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen, step = seen + float(loss.detach()) / steps, step + 1
        line = {"stage": "train", "base": name, "epoch": epoch + 1, "of": base["epochs"], "loss": round(seen, 4)}
        line["seconds"] = round(time.perf_counter() - start, 1)
        note(log, {**line, "val": round(accuracy(model, val_x, val_y, size), 2)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.json").write_text(json.dumps({**base, "seconds": time.perf_counter() - began}, indent=2))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
