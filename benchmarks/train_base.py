"""Train the small vision transformer that ships with the package, from scratch, on the embedded canvases.

    python benchmarks/train_base.py --out ltm_retrofit/assets/digits_vit

Writes a folder that timm loads (``local-dir:``). Interrupted, it goes on from the last finished epoch. Every choice
(length, learning rate, augmentation) was made on the validation digits; the test digits are read once, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

from ltm_retrofit.tuning.sources import draw_split

ARCHITECTURE = "vit_tiny_patch16_224"
CROWDED_EPOCHS = 10  # of the schedule's: smaller digits and brighter clutter first
MODEL_ARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}


def to_batch(canvases: torch.Tensor) -> torch.Tensor:
    """``(n, 64, 64)`` uint8 → ``(n, 3, 64, 64)`` in −1..1, as the model's config asks."""
    return ((canvases.float() / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def shifted(canvases: torch.Tensor, most: int = 6) -> torch.Tensor:
    """Move each canvas by up to ``most`` pixels, wrapping around: clutter and digit may leave on one side."""
    shifts = torch.randint(-most, most + 1, (len(canvases), 2)).tolist()
    return torch.stack([c.roll((down, right), (0, 1)) for c, (down, right) in zip(canvases, shifts, strict=True)])


@torch.no_grad()
def accuracy(model: torch.nn.Module, canvases: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(to_batch(x)).argmax(-1) == y).sum())
        for x, y in zip(canvases.split(256), labels.split(256), strict=True)
    )
    return 100 * hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_vit"))
    parser.add_argument("--work", type=Path, default=Path("runs/train_base"))
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--per-digit", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])

    def canvases(epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = draw_split("train", args.per_digit, seed=0, crowded=epoch < CROWDED_EPOCHS)
        return torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1])

    val_x, val_y = map(torch.from_numpy, draw_split("validation", 8, seed=0))

    state_file = args.work / "state.pt"
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    train_x, train_y = canvases(start)
    batch, steps = 128, len(train_y) // 128
    for epoch in range(start, args.epochs):
        if epoch == CROWDED_EPOCHS:
            train_x, train_y = canvases(epoch)
        torch.manual_seed(epoch + 1)
        model.train()
        began, seen_loss = time.perf_counter(), 0.0
        for step, index in enumerate(torch.randperm(len(train_y)).split(batch)[:steps]):
            done = (epoch * steps + step) / (args.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(done / 0.05, 0.5 * (1 + math.cos(math.pi * done)))
            loss = F.cross_entropy(model(to_batch(shifted(train_x[index]))), train_y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen_loss += float(loss) / steps
        line = {"epoch": epoch + 1, "loss": seen_loss, "val": accuracy(model, val_x, val_y)}
        line["seconds"] = time.perf_counter() - began
        with (args.work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, state_file)

    test_x, test_y = map(torch.from_numpy, draw_split("test", 8, seed=0))
    print(f"test accuracy, read once: {accuracy(model, test_x, test_y):.2f} %")
    model.pretrained_cfg.update(
        input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bilinear", tag="digits"
    )
    shutil.rmtree(args.out, ignore_errors=True)
    timm.models.save_for_hf(
        model,
        args.out,
        model_config={"label_names": [str(d) for d in range(10)]},
        model_args=MODEL_ARGS,
        safe_serialization=True,
    )
    print("wrote", *(f"{file} ({file.stat().st_size / 1e6:.2f} MB)" for file in sorted(args.out.iterdir())))


if __name__ == "__main__":
    main()
