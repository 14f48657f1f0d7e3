"""Train the small vision transformer that ships with the package, from scratch, on the embedded canvases.

    python benchmarks/train_base.py --out ltm_retrofit/assets/digits_vit

Writes a folder that timm loads (``local-dir:``). Interrupted, it goes on from the last finished epoch. It learns in two
stages. First a model of width 96 on canvases of 64 × 64 (65 tokens), which is fast. Then the same model made twice as
wide (Net2Net, arXiv 1511.05641: the same answers, twice the neurons) on canvases of 128 × 128 (257 tokens): the digits
are as large as before, and there is four times as much around them. Every choice (lengths, learning rates,
augmentation) was made on the validation digits; the test digits are read once, at the end. About two hours on 2 cores,
in bfloat16. ``--first`` takes the first stage's model from a folder: what ships now began with the one that shipped up
to commit e875e25, which this script had trained in float32. ``train_base.jsonl`` is the log of both.
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
from timm.layers import PatchDropout, resample_abs_pos_embed
from torch.nn import functional as F

from ltm_retrofit.tuning.sources import draw_split

ARCHITECTURE = "vit_tiny_patch16_224"
PATCH, HEADS = 8, 3


@dataclass(frozen=True)
class Stage:
    """What is trained on what, and for how long."""

    canvas: int
    width: int
    epochs: int
    crowded: int  # first epochs with smaller digits and brighter clutter
    dropping: int  # first epochs in which half of the patches are left out: twice as fast
    per_digit: int  # canvases drawn of each digit
    fresh: bool  # whether they are drawn anew for each epoch
    lr: float
    batch: int

    @property
    def model_args(self) -> dict[str, int]:
        """What timm builds the stage's model from."""
        return {
            "img_size": self.canvas,
            "patch_size": PATCH,
            "embed_dim": self.width,
            "depth": 6,
            "num_heads": HEADS,
        }


STAGES = (
    Stage(64, 96, epochs=16, crowded=10, dropping=0, per_digit=30, fresh=False, lr=1e-3, batch=128),
    Stage(128, 192, epochs=13, crowded=0, dropping=5, per_digit=8, fresh=True, lr=2e-4, batch=64),
)


def widened(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Double every width and change no answer: neurons twice, and half of each weight to either of an input's two.

    A little noise that the two cancel lets them part ways in training. Heads stay as many and become twice as wide:
    q·k doubles and the scale shrinks by √2, so q and k are divided by 2^¼ each.
    """
    out = {}
    for name, weight in weights.items():
        wide = weight
        if name not in ("patch_embed.proj.weight", "pos_embed", "cls_token") and weight.ndim == 2:
            noise = 0.05 * weight.std() * torch.randn_like(weight)
            wide = torch.cat([weight / 2 + noise, weight / 2 - noise], 1)
        if ".qkv." in name:
            wide = wide.reshape(3, HEADS, -1, *wide.shape[1:])
            wide = torch.cat([wide, wide], 2)
            wide[:2] *= 2**-0.25
            wide = wide.flatten(0, 2)
        elif name in ("pos_embed", "cls_token"):
            wide = torch.cat([wide, wide], -1)
        elif not name.startswith("head."):
            wide = torch.cat([wide, wide], 0)
        out[name] = wide
    # between the heads' outputs and `proj` each head has its two halves side by side
    for name in [name for name in out if name.endswith("attn.proj.weight")]:
        first, second = (half.reshape(len(half), HEADS, -1) for half in out[name].chunk(2, 1))
        out[name] = torch.cat([first, second], 2).flatten(1)
    return out


def build(stage: Stage, before: dict[str, torch.Tensor] | None) -> torch.nn.Module:
    """Build a stage's model; with the weights of the stage before made wide, its positions resampled."""
    model = timm.create_model(ARCHITECTURE, num_classes=10, **stage.model_args)
    if before is not None:
        wide = widened(before)
        wide["pos_embed"] = resample_abs_pos_embed(wide["pos_embed"], new_size=list(model.patch_embed.grid_size))
        model.load_state_dict(wide)
    return model


def to_batch(canvases: torch.Tensor) -> torch.Tensor:
    """``(n, side, side)`` uint8 → ``(n, 3, side, side)`` in −1..1, as the model's config asks."""
    return ((canvases.float() / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)


def shifted(canvases: torch.Tensor, most: int = 6) -> torch.Tensor:
    """Move each canvas by up to ``most`` pixels, wrapping around: clutter and digit may leave on one side."""
    shifts = torch.randint(-most, most + 1, (len(canvases), 2)).tolist()
    return torch.stack([c.roll((down, right), (0, 1)) for c, (down, right) in zip(canvases, shifts, strict=True)])


@torch.no_grad()
def accuracy(model: torch.nn.Module, canvases: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of right answers, in percent."""
    model.eval()
    hits = sum(
        int((model(to_batch(x)).argmax(-1) == y).sum())
        for x, y in zip(canvases.split(256), labels.split(256), strict=True)
    )
    return 100 * hits / len(labels)


def learn(model: torch.nn.Module, stage: Stage, work: Path) -> None:
    """Train through a stage, or what is left of it."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}])
    val_x, val_y = map(torch.from_numpy, draw_split("validation", 8, seed=0, canvas=stage.canvas))
    start, state_file = 0, work / f"canvas{stage.canvas}.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    drawn_for, train_x, train_y = None, torch.empty(0), torch.empty(0)
    for epoch in range(start, stage.epochs):
        began, seen_loss = time.perf_counter(), 0.0
        crowded = epoch < stage.crowded
        if drawn_for != (wanted := (crowded, 2 + epoch if stage.fresh else 0)):
            drawn = draw_split("train", stage.per_digit, seed=wanted[1], canvas=stage.canvas, crowded=crowded)
            drawn_for, (train_x, train_y) = wanted, map(torch.from_numpy, drawn)
        torch.manual_seed(epoch + 1)
        steps = len(train_y) // stage.batch
        model.patch_drop = PatchDropout(0.5) if epoch < stage.dropping else torch.nn.Identity()
        model.train()
        for step, index in enumerate(torch.randperm(len(train_y)).split(stage.batch)[:steps]):
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
        line = {"canvas": stage.canvas, "epoch": epoch + 1, "loss": seen_loss, "val": accuracy(model, val_x, val_y)}
        line["seconds"] = time.perf_counter() - began
        with (work / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, state_file)
    model.patch_drop = torch.nn.Identity()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_vit"))
    parser.add_argument("--work", type=Path, default=Path("runs/train_base"))
    parser.add_argument("--first", type=Path, help="a folder with the first stage's model: it is not trained again")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    first, second = STAGES
    if args.first:
        narrow = timm.create_model(f"local-dir:{args.first.resolve()}", pretrained=True)
    else:
        narrow = build(first, None)
        learn(narrow, first, args.work)
    model = build(second, narrow.state_dict())
    learn(model, second, args.work)

    model.half().float()  # as it is stored
    test_x, test_y = map(torch.from_numpy, draw_split("test", 8, seed=0, canvas=second.canvas))
    print(f"test accuracy, read once: {accuracy(model, test_x, test_y):.2f} %")
    size = (3, second.canvas, second.canvas)
    model.pretrained_cfg.update(
        input_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bilinear", tag="digits"
    )
    shutil.rmtree(args.out, ignore_errors=True)
    timm.models.save_for_hf(
        model.half(),
        args.out,
        model_config={"label_names": [str(d) for d in range(10)]},
        model_args=second.model_args,
        safe_serialization=True,
    )
    print("wrote", *(f"{file} ({file.stat().st_size / 1e6:.2f} MB)" for file in sorted(args.out.iterdir())))


if __name__ == "__main__":
    main()
