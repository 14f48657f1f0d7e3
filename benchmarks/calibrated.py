"""Does ``schedule="calibrated"`` bring more than ``"auto"``? Trained networks × budgets, on images it did not see.

    python benchmarks/calibrated.py run --networks dinov2s cifar digits swin --data PHOTOS --cifar CIFAR
    python benchmarks/calibrated.py run --networks dinov2s cifar --seen other --data PHOTOS --cifar CIFAR
    python benchmarks/calibrated.py table

Each network is converted both ways at each budget. Calibration sees 32 images without labels: training images, or with
``--seen other`` the first of those that the model was not trained on, and then it is not judged on these. KL is of the
answers to the original's, on other images, with the paired standard error of the difference. ``dinov2s`` is the
checkpoint of ``real_checkpoint.py``, ``cifar`` the base of ``ablation_base.py``, ``digits`` the embedded model; other
names are those of ``hybrid_bases.py``. Lines are appended to ``benchmarks/calibrated.jsonl``; those that are there are
not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hybrid_bases
import torch
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.calibrate import difference

RESULTS = Path(__file__).with_suffix(".jsonl")
SEEN = 32
#: a network, how to load it anew, the images of the calibration, and others
Case = tuple[Callable[[], nn.Module], Tensor, Tensor]


def network(name: str, args: argparse.Namespace) -> Case:
    if name == "dinov2s":
        from real_checkpoint import FOLDER, load, normalized, tensors

        folder = args.folder or FOLDER
        train, other = (tensors(args.data, split, folder)[0] for split in ("train", "validation"))
        return (lambda: load(folder)), normalized(train[:SEEN]), normalized(other)
    if name == "cifar":
        import ablation_base as base

        train, other = (base.decoded(args.cifar, split)[0] for split in ("train", "test"))
        return (lambda: base.load().cpu()), base.to_batch(train[:SEEN]), base.to_batch(other[: args.images])
    if name == "digits":
        drawn = {split: list(ltm.load_digits(split, per_digit=4)["image"]) for split in ("train", "validation")}
        model = ltm.load_model("digits_vit")
        train, other = (ltm.load_images(model, drawn[split], n) for split, n in (("train", SEEN), ("validation", 720)))
        return (lambda: ltm.load_model("digits_vit")), train, other
    size = hybrid_bases.BASES[name]["size"]
    train, other = (hybrid_bases.canvases(split, 8)[0] for split in ("train", "validation"))
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:SEEN]]
    return (lambda: hybrid_bases.load(name)), *(
        hybrid_bases.to_batch(x, size) for x in (shuffled, other[: args.images])
    )


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits ``(n, classes)``."""
    out = [model(part) for part in images.split(16)]
    return torch.cat([getattr(each, "logits", each) for each in out])


def run(args: argparse.Namespace) -> None:
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    for name in args.networks:
        load, seen, other = network(name, args)
        if args.seen == "other":
            seen, other = other[:SEEN], other[SEEN:]
        known = [(x["network"], x["flops"], x["seen"]) for x in done]
        wanted = [flops for flops in args.flops if (name, flops, args.seen) not in known]
        before = answers(load(), other) if wanted else torch.empty(0)
        for flops in wanted:
            line: dict[str, Any] = {"network": name, "flops": flops, "seen": args.seen, "images": len(other)}
            losses = {}
            for schedule in ("auto", "calibrated"):
                began, model = time.perf_counter(), load()
                images = seen if schedule == "calibrated" else None
                ltm.retrofit(model, ltm.LTMConfig(flops=flops, schedule=schedule), example=seen[:1], images=images)
                plan = ltm.get_plan(model)
                line[schedule] = {"seconds": round(time.perf_counter() - began, 1), "share": round(plan.share, 4)}
                line[schedule]["tokens"] = [f"{row.site}: {row.tokens_in} → {row.tokens_out}" for row in plan.rows]
                losses[schedule] = difference([before], [answers(model, other)]).by
                line[schedule]["kl"] = losses[schedule].mean().item()
            more = losses["calibrated"] - losses["auto"]
            line["difference"] = more.mean().item()
            line["se"] = more.std().item() / len(more) ** 0.5
            with RESULTS.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            print(row_of(line), flush=True)


def row_of(line: dict[str, Any]) -> str:
    cells = [
        line["network"],
        line["seen"],
        f"×{line['flops']}",
        *(f"{line[way]['kl']:.2e}" for way in ("auto", "calibrated")),
    ]
    cells += [f"{line['difference']:+.1e} ± {line['se']:.0e}", f"{line['calibrated']['seconds']:.0f} s"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--networks", nargs="+", default=["dinov2s", "cifar", "digits", "swin"])
    parser.add_argument("--flops", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--folder", type=Path, help="of the checkpoint that real_checkpoint.py made")
    parser.add_argument("--data", type=Path, help="photographs, as real_checkpoint.py reads them")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as parquet files")
    parser.add_argument("--seen", choices=("train", "other"), default="train")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    if args.command == "run":
        return run(args)
    print("| network | calibrated on | MACs | KL, auto | KL, calibrated | difference | conversion |")
    print("|---" * 7 + "|")
    for line in sorted(
        map(json.loads, RESULTS.read_text().splitlines()), key=lambda x: (x["network"], x["seen"], -x["flops"])
    ):
        print(row_of(line))


if __name__ == "__main__":
    main()
