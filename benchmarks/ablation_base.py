"""Train the ablation's base: a vision transformer of 6 blocks and 257 tokens, from scratch, on CIFAR-10.

    python benchmarks/ablation_base.py --data PATH      # 40 epochs of about 4 s on an H200

The last 5,000 training images are set aside: neither the base nor a fine-tune learns from them, learning rates are
chosen on them. Half of the batches are mixed (MixUp, CutMix), as the recipes of pretrained vision transformers do, and
none in the last epochs. Images are decoded once. Interrupted, the training goes on from the last finished epoch. The
test images are read once, at the end.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "ablation"
BASE, TRAINING = HERE / "ablation_base.safetensors", RUNS / "training.pt"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 2, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10}
ASIDE = 5000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
BATCH, LR, WEIGHT_DECAY, SMOOTHING, WARMUP = 256, 3e-3, 0.05, 0.1, 2
#: how many there are, and how many of them mix images
EPOCHS, MIXED = 40, 36


def decoded(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return a split's images ``(n, 3, 32, 32)`` uint8 and labels, decoded once and kept."""
    kept = RUNS / f"{split}.npz"
    if not kept.exists():
        table = parquet.read_table(data / f"{split}.parquet")
        images = [np.asarray(Image.open(io.BytesIO(x["bytes"])).convert("RGB")) for x in table["image"].to_pylist()]
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, x=np.stack(images).transpose(0, 3, 1, 2), y=np.asarray(table["label"]))
    loaded = np.load(kept)
    return torch.from_numpy(loaded["x"]), torch.from_numpy(loaded["y"]).long()


def to_batch(images: Tensor) -> Tensor:
    """``(n, 3, 32, 32)`` uint8 → normalised floats."""
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augmented(images: Tensor, generator: torch.Generator, most: int = 4) -> Tensor:
    """Shift each image by up to ``most`` pixels, zeros coming in, and mirror half of them."""
    (n, _, height, width), device = images.shape, images.device
    padded = F.pad(images, (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, n), generator=generator).to(device)
    mirror = (torch.rand(n, generator=generator) < 0.5).to(device)
    rows = down[:, None] + torch.arange(height, device=device)
    columns = right[:, None] + torch.arange(width, device=device)
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    index = torch.arange(n, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def build() -> nn.Module:
    """Build the untrained base."""
    model = timm.create_model(ARCHITECTURE, **MODEL_ARGS)
    told = {"mean": MEAN, "std": STD, "input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}
    model.pretrained_cfg = {**model.pretrained_cfg, **told, "tag": "cifar10"}
    return model


def load() -> nn.Module:
    """Load the trained base."""
    model = build()
    model.load_state_dict(load_file(BASE))
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits ``(n, classes)`` of images that lie where the model does."""
    model.eval()
    return torch.cat([model(to_batch(part)) for part in images.split(250)])


def hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return whether each image is recognised ``(n,)``; images and labels lie where the model does."""
    return logits_of(model, images).argmax(-1) == labels


def share(right: Tensor) -> float:
    """Return how many are right, in percent."""
    return 100 * float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="images, to try things out")
    parser.add_argument("--log", type=Path, default=HERE / "ablation_base.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images, labels = (part.to(DEVICE) for part in decoded(args.data, "train"))
    held = images[-ASIDE:], labels[-ASIDE:]
    images, labels = images[:-ASIDE][: args.limit], labels[:-ASIDE][: args.limit]
    torch.manual_seed(0)
    model = build().to(DEVICE)
    for line, state in epochs(model, images, labels):
        note(args.log, line | {"aside": share(hits(model, *held))})
        torch.save(state, f"{TRAINING}.new")
        os.replace(f"{TRAINING}.new", TRAINING)
    save_file(model.state_dict(), BASE)
    TRAINING.unlink(missing_ok=True)
    test = (part.to(DEVICE) for part in decoded(args.data, "test"))
    note(args.log, {"epoch": EPOCHS, "test": share(hits(model, *test)), "hardware": hardware()})


def epochs(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Train, from where an earlier run was interrupted; yield for each epoch what it brought and where it stands."""
    optimizer = create_optimizer_v2(model, opt="nmuon", lr=LR, weight_decay=WEIGHT_DECAY)
    steps, warm = len(images) // BATCH, WARMUP / EPOCHS

    def rate(step: int) -> float:
        done = step / (steps * EPOCHS)
        return (done + 1e-4) / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    mix = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.5, label_smoothing=SMOOTHING, num_classes=10)
    first, parts = 0, {"model": model, "optimizer": optimizer, "schedule": schedule}
    if TRAINING.exists():
        state = torch.load(TRAINING, weights_only=True, map_location=DEVICE)
        first = state.pop("epoch")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for epoch in range(first, EPOCHS):
        start, total = time.perf_counter(), torch.zeros((), device=DEVICE)
        model.train()
        generator = torch.Generator().manual_seed(epoch)
        np.random.seed(epoch)  # timm's mixing draws from it
        order = torch.randperm(len(images), generator=generator).to(DEVICE)
        for index in order[: steps * BATCH].split(BATCH):
            x, y = to_batch(augmented(images[index], generator)), labels[index]
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                if epoch < MIXED:
                    x, soft = mix(x, y)
                    loss = F.cross_entropy(model(x), soft)
                else:
                    loss = F.cross_entropy(model(x), y, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach() / steps
        line = {"epoch": epoch + 1, "loss": total.item(), "seconds": time.perf_counter() - start}
        yield line, {"epoch": epoch + 1, **{name: part.state_dict() for name, part in parts.items()}}


def hardware() -> str:
    """Name what runs here."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    return f"{device}, torch {torch.__version__}"


def note(log: Path, line: dict[str, Any], hidden: str = "") -> None:
    """Append a line to a log, and print it but for what is hidden."""
    with log.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    print({key: value for key, value in line.items() if key != hidden}, flush=True)


if __name__ == "__main__":
    main()
