"""The rows of the paper, by their real classes: reduction, backward, save, reload, torch.export and ONNX.

    python benchmarks/paper.py [name …]      # goes on where it was stopped
    python benchmarks/paper.py --write       # docs/paper.md

Random weights: this shows that each conversion works and what it costs, not what accuracy it keeps.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers as tr
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.finding.example import logits_of
from ltm_retrofit.finding.walk import fill
from ltm_retrofit.macs import count_macs

LOG, PAGE = Path("benchmarks/paper.jsonl"), Path("docs/paper.md")


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def _swin(dim: int, depths: list[int], heads: list[int]) -> Callable[[], nn.Module]:
    config = {"embed_dim": dim, "depths": depths, "num_heads": heads, "num_labels": 1000}
    return lambda: tr.SwinForImageClassification(tr.SwinConfig(**config))


def _vit(dim: int, heads: int) -> Callable[[], nn.Module]:
    config = {"hidden_size": dim, "num_attention_heads": heads, "intermediate_size": 4 * dim, "num_labels": 1000}
    return lambda: tr.ViTForImageClassification(tr.ViTConfig(**config))


def _mobilevit(hidden: list[int], neck: list[int]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = tr.MobileViTConfig(hidden_sizes=hidden, neck_hidden_sizes=neck, num_labels=1000)
        model = tr.MobileViTForImageClassification(config)
        fill(model)  # transformers draws its weights so small that nothing of the image reaches the logits
        return model

    return build


#: name → how to build it, side of the image, share of the MACs that the paper keeps
ROWS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "vit_small_patch16_224": (_timm("vit_small_patch16_224"), 224, 0.86),
    "vit_base_patch16_224": (_timm("vit_base_patch16_224"), 224, 0.73),
    "swin_tiny_patch4_window7_224": (_timm("swin_tiny_patch4_window7_224"), 224, 0.84),
    "swin_base_patch4_window7_224": (_timm("swin_base_patch4_window7_224"), 224, 0.78),
    "mobilevit_xs": (_timm("mobilevit_xs"), 256, 0.74),
    "mobilevit_s": (_timm("mobilevit_s"), 256, 0.84),
    "efficientvit_b1": (_timm("efficientvit_b1"), 224, 0.85),
    "efficientvit_b1 at 288": (_timm("efficientvit_b1"), 288, 0.81),
    "hf ViT-S/16": (_vit(384, 6), 224, 0.86),
    "hf ViT-B/16": (_vit(768, 12), 224, 0.73),
    "hf Swin-T": (_swin(96, [2, 2, 6, 2], [3, 6, 12, 24]), 224, 0.84),
    "hf Swin-B": (_swin(128, [2, 2, 18, 2], [4, 8, 16, 32]), 224, 0.78),
    "hf MobileViT-XS": (_mobilevit([96, 120, 144], [16, 32, 48, 64, 80, 96, 384]), 256, 0.74),
    "hf MobileViT-S": (_mobilevit([144, 192, 240], [16, 32, 64, 96, 128, 160, 640]), 256, 0.84),
}


def convert(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Build and convert one row; at the nearest share below the paper's where that cannot be met."""
    build, side, share = ROWS[name]
    torch.manual_seed(0)
    model, example = build().eval(), torch.randn(1, 3, side, side)
    inputs = {"pixel_values": example} if hasattr(model, "config") else example
    try:
        ltm.retrofit(model, ltm.LTMConfig(flops=share), inputs)
    except ltm.BudgetError as error:
        ltm.retrofit(model, ltm.LTMConfig(flops=error.nearest), inputs)
    return model, example


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the class logits."""
    out = logits_of(model(images))
    assert out is not None
    return out


def walk(name: str) -> dict[str, Any]:
    """Do everything with one row."""
    began = time.perf_counter()
    model, example = convert(name)
    plan, row = ltm.get_plan(model), {"name": name, "convert_s": round(time.perf_counter() - began, 1)}
    inputs = {"pixel_values": example} if hasattr(model, "config") else example
    counted = count_macs(model, inputs).total
    row |= {"asked": ROWS[name][2], "macs": plan.macs_original, "converted": counted, "agrees": counted == plan.macs}
    row |= {"share": plan.share, "scopes": sorted({planned.scope for planned in plan.rows})}

    logits(model.train(), torch.randn(2, *example.shape[1:])).square().mean().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval().zero_grad()
    row["without_gradient"] = without
    with torch.no_grad():
        expected = logits(model, example)
    with tempfile.TemporaryDirectory() as folder:
        ltm.save_pretrained(model, Path(folder) / "saved")
        again = ltm.from_pretrained(Path(folder) / "saved")
        with torch.no_grad():
            row["reload_equal"] = bool(torch.equal(logits(again.eval(), example), expected))
        program = torch.export.export(model, (example,))
        with torch.no_grad():
            given = logits_of(program.module()(example))
        row["export_error"] = float((given - expected).abs().max())
        row["onnx_error"] = _onnx(model, example, expected, Path(folder) / "model.onnx")
    row["scale"] = float(expected.abs().max())
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def _onnx(model: nn.Module, example: torch.Tensor, expected: torch.Tensor, path: Path) -> float:
    import onnxruntime

    with torch.no_grad():  # with gradients torch 2.15 exports a fused attention with a mask that it cannot convert
        torch.onnx.export(model, (example,), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given, *_) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    return float((torch.from_numpy(given) - expected).abs().max())


def write() -> None:
    """Write the page."""
    logged = {row["name"]: row for row in map(json.loads, LOG.read_text().splitlines())}  # the last of each counts
    rows = [logged[name] for name in ROWS if name in logged]
    lines = [
        "# The paper's rows",
        "",
        "Written by `python benchmarks/paper.py --write` from `benchmarks/paper.jsonl`. Random weights, batch 1,",
        f"{platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, transformers {tr.__version__}.",
        "MACs are counted by fvcore and by torch, which agree, and are those that the plan predicts. *Paper* is the",
        "share that the paper keeps of the MACs it counts. Every parameter gets a gradient, the reloaded model gives",
        "the same logits bit for bit; the last columns are the largest difference of a logit after `torch.export` and",
        "under ONNX Runtime, as a share of the largest logit.",
        "",
        "| model | scope | GMACs | share | paper | reload | export | ONNX |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gone = f"{row['macs'] / 1e9:.3f} → {row['converted'] / 1e9:.3f}"
        cells = [row["name"], ", ".join(row["scopes"]), gone, f"{row['share']:.3f}", f"{row['asked']:.2f}"]
        cells += ["equal" if row["reload_equal"] else "**differs**"]
        cells += [f"{row[key] / row['scale']:.0e}" for key in ("export_error", "onnx_error")]
        lines.append("| " + " | ".join(cells) + " |")
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        return write()
    done = {json.loads(line)["name"] for line in LOG.read_text().splitlines()} if LOG.exists() else set()
    for name in args.names or ROWS:
        if name in done:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = walk(name)
        print(row, flush=True)
        with LOG.open("a") as log:
            log.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
