"""Train the ablation's base: a vision transformer of 6 blocks and 65 tokens, from scratch, on CIFAR-10.

    python benchmarks/ablation_base.py --data ../shared/data/cifar10      # 90 epochs of about 100 s on two cores

The last 5,000 training images are set aside: neither the base nor a fine-tune learns from them, learning rates are
chosen on them. Two phases, each with a cosine of its own: the first ends with the training images known by heart; the
second mixes half of the batches (MixUp, CutMix), as the recipes of pretrained vision transformers do, and none in its
last epochs. Images are decoded once. Interrupted, the training goes on from the last finished epoch, with the same
weights as if it had not been, with as many threads. The test images are read once, at the end.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "ablation"
# In the repository, for a machine may go before it is done: hours of training, and what is reached of them so far.
BASE, TRAINING = HERE / "ablation_base.safetensors", HERE / "ablation_training.pt"
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10}
ASIDE = 5000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
BATCH, LR, WEIGHT_DECAY, SMOOTHING, WARMUP = 128, 2e-3, 0.05, 0.1, 2
#: epochs of each phase, and how many of them mix images
PHASES = ((50, 0), (40, 32))


def decoded(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return a split's images ``(n, 3, 32, 32)`` uint8 and labels, decoded once and kept."""
    kept = RUNS / f"{split}.npz"
    if not kept.exists():
        from datasets import Image as ImageColumn
        from datasets import load_dataset

        table = load_dataset("parquet", data_files=str(data / f"{split}.parquet"), split="train")
        table = table.cast_column("image", ImageColumn(decode=False))
        images = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"]]
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, x=np.stack(images).transpose(0, 3, 1, 2), y=np.asarray(table["label"]))
    loaded = np.load(kept)
    return torch.from_numpy(loaded["x"]), torch.from_numpy(loaded["y"]).long()


def to_batch(images: Tensor) -> Tensor:
    """``(n, 3, 32, 32)`` uint8 → normalised floats."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augmented(images: Tensor, generator: torch.Generator, most: int = 4) -> Tensor:
    """Shift each image by up to ``most`` pixels, zeros coming in, and mirror half of them."""
    n, _, height, width = images.shape
    padded = F.pad(images, (most,) * 4)
    down, right = torch.randint(0, 2 * most + 1, (2, n), generator=generator)
    rows = down[:, None] + torch.arange(height)
    columns = right[:, None] + torch.arange(width)
    mirror = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    index = torch.arange(n)[:, None, None]
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
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    model.eval()
    parts = zip(images.split(250), labels.split(250), strict=True)
    return 100 * sum(int((model(to_batch(x)).argmax(-1) == y).sum()) for x, y in parts) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--log", type=Path, default=HERE / "ablation_base.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images, labels = decoded(args.data, "train")
    held_x, held_y = images[-ASIDE:], labels[-ASIDE:]
    images, labels = images[:-ASIDE], labels[:-ASIDE]
    torch.manual_seed(0)
    model = build()
    state = torch.load(TRAINING, weights_only=True) if TRAINING.exists() else {"model": model.state_dict(), "phase": 0}
    model.load_state_dict(state["model"])
    for phase in range(state["phase"], len(PHASES)):
        for line, parts in epochs_of(phase, model, images, labels, state if phase == state["phase"] else {}):
            note(args.log, line | {"aside": accuracy(model, held_x, held_y)})
            torch.save({"model": model.state_dict(), "phase": phase, **parts}, f"{TRAINING}.new")
            os.replace(f"{TRAINING}.new", TRAINING)
    save_file(model.state_dict(), BASE)
    TRAINING.unlink(missing_ok=True)
    note(args.log, {"epoch": sum(length for length, _ in PHASES), "test": accuracy(model, *decoded(args.data, "test"))})


def epochs_of(
    phase: int, model: nn.Module, images: Tensor, labels: Tensor, state: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Train for a phase, from where its state says; yield for each epoch what it brought and where it stands."""
    (epochs, mixed), before = PHASES[phase], sum(length for length, _ in PHASES[:phase])
    optimizer = create_optimizer_v2(model, opt="nmuon", lr=LR, weight_decay=WEIGHT_DECAY)
    steps, warm = len(images) // BATCH, WARMUP / epochs

    def rate(step: int) -> float:
        done = step / (steps * epochs)
        return (done + 1e-4) / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    mix = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.5, label_smoothing=SMOOTHING, num_classes=10)
    if "epoch" in state:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for epoch in range(state.get("epoch", 0), epochs):
        start, total = time.perf_counter(), 0.0
        model.train()
        generator = torch.Generator().manual_seed(before + epoch)
        np.random.seed(before + epoch)  # timm's mixing draws from it
        for index in torch.randperm(len(images), generator=generator)[: steps * BATCH].split(BATCH):
            x, y = to_batch(augmented(images[index], generator)), labels[index]
            if epoch < mixed:
                x, soft = mix(x, y)
                loss = F.cross_entropy(model(x), soft)
            else:
                loss = F.cross_entropy(model(x), y, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() / steps
        line = {"epoch": before + epoch + 1, "phase": phase + 1, "loss": total, "seconds": time.perf_counter() - start}
        yield line, {"epoch": epoch + 1, "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}


def note(log: Path, line: dict[str, object]) -> None:
    """Append a line to the log, and print it."""
    with log.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    main()
