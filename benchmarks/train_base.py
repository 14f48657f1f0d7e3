"""Train the small vision transformer that ships with the package, from scratch, on the embedded canvases.

    python benchmarks/train_base.py --out ltm_retrofit/assets/digits_vit

Writes a folder that timm loads (``local-dir:``). Interrupted, it goes on from the last finished epoch. It learns in two
stages: on patches of 8 (65 tokens), which is four times as fast, then on patches of 4 (257 tokens), where its patch
embedding and positions are resampled (FlexiViT, arXiv 2212.08013, by timm). Every choice (lengths, learning rates,
augmentation) was made on the validation digits; the test digits are read once, at the end. About an hour on 2 cores
that multiply bfloat16 in hardware.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch.nn import functional as F

from ltm_retrofit.tuning.sources import draw_split

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 64, "embed_dim": 192, "depth": 6, "num_heads": 3}
BATCH = 128


@dataclass(frozen=True)
class Stage:
    """Epochs at one patch size; the first ``crowded`` of them have smaller digits and brighter clutter."""

    patch: int
    epochs: int
    crowded: int
    per_digit: int  # canvases drawn of each digit, anew for each epoch
    lr: float


STAGES = (Stage(8, 7, 5, 30, 1e-3), Stage(4, 7, 1, 8, 5e-4))


def to_batch(canvases: torch.Tensor) -> torch.Tensor:
    """``(n, 64, 64)`` uint8 → ``(n, 3, 64, 64)`` in −1..1, as the model's config asks."""
    return ((canvases.float() / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def shifted(canvases: torch.Tensor, most: int = 6) -> torch.Tensor:
    """Move each canvas by up to ``most`` pixels, wrapping around: clutter and digit may leave on one side."""
    shifts = torch.randint(-most, most + 1, (len(canvases), 2)).tolist()
    return torch.stack([c.roll((down, right), (0, 1)) for c, (down, right) in zip(canvases, shifts, strict=True)])


def build(patch: int, weights: dict[str, torch.Tensor] | None) -> torch.nn.Module:
    """Build the model at a patch size, with the weights of another resampled where there are some."""
    model = timm.create_model(ARCHITECTURE, num_classes=10, patch_size=patch, **MODEL_ARGS)
    if weights is not None:
        grid = model.patch_embed.grid_size
        weights["patch_embed.proj.weight"] = resample_patch_embed(weights["patch_embed.proj.weight"], [patch, patch])
        weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], new_size=list(grid))
        model.load_state_dict(weights)
    return model


@torch.no_grad()
def accuracy(model: torch.nn.Module, canvases: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(to_batch(x)).argmax(-1) == y).sum())
        for x, y in zip(canvases.split(256), labels.split(256), strict=True)
    )
    return 100 * hits / len(labels)


def learn(model: torch.nn.Module, stage: Stage, before: int, work: Path) -> None:
    """Train through a stage, or what is left of it."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])
    val_x, val_y = map(torch.from_numpy, draw_split("validation", 8, seed=0))
    start, state_file = 0, work / f"patch{stage.patch}.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    for epoch in range(start, stage.epochs):
        began, seen_loss = time.perf_counter(), 0.0
        seed = before + epoch
        torch.manual_seed(seed + 1)
        drawn = draw_split("train", stage.per_digit, seed=seed, crowded=epoch < stage.crowded)
        train_x, train_y = map(torch.from_numpy, drawn)
        steps = len(train_y) // BATCH
        model.train()
        for step, index in enumerate(torch.randperm(len(train_y)).split(BATCH)[:steps]):
            done = (epoch * steps + step) / (stage.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = stage.lr * min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(to_batch(shifted(train_x[index])))
            loss = F.cross_entropy(logits.float(), train_y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen_loss += loss.item() / steps
        line = {"patch": stage.patch, "epoch": epoch + 1, "loss": seen_loss, "val": accuracy(model, val_x, val_y)}
        line["seconds"] = time.perf_counter() - began
        with (work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, state_file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_vit"))
    parser.add_argument("--work", type=Path, default=Path("runs/train_base"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model, before = None, 0
    for stage in STAGES:
        model = build(stage.patch, None if model is None else model.state_dict())
        learn(model, stage, before, args.work)
        before += stage.epochs

    model.half().float()  # as it is stored
    test_x, test_y = map(torch.from_numpy, draw_split("test", 8, seed=0))
    print(f"test accuracy, read once: {accuracy(model, test_x, test_y):.2f} %")
    model.pretrained_cfg.update(
        input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bilinear", tag="digits"
    )
    shutil.rmtree(args.out, ignore_errors=True)
    timm.models.save_for_hf(
        model.half(),
        args.out,
        model_config={"label_names": [str(d) for d in range(10)]},
        model_args={**MODEL_ARGS, "patch_size": STAGES[-1].patch},
        safe_serialization=True,
    )
    print("wrote", *(f"{file} ({file.stat().st_size / 1e6:.2f} MB)" for file in sorted(args.out.iterdir())))


if __name__ == "__main__":
    main()
