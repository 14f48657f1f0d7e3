"""Train four tiny bases on the embedded canvases, convert each, and compare with what else costs as much.

    python benchmarks/hybrids.py train      # three to eight minutes a base on one core; a base that exists is skipped
    python benchmarks/hybrids.py compare    # an arm that is in hybrids.jsonl already is skipped
    python benchmarks/hybrids.py table      # writes docs/results.md from hybrids.jsonl

The bases are described in `hybrid_bases.py`; the test digits are read in ``compare`` only.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hybrid_bases import BASES, CANVAS, load, note, noted, train
from torch import nn

HERE = Path(__file__).parent
#: share of MACs to keep
FLOPS = {"swin": 0.84, "mobilevit": 0.74, "efficientvit": 0.85, "rope": 0.80}
#: the same for every arm
LR = 3e-4
#: arm → method, and whether it is fine-tuned
ARMS: dict[str, tuple[str | None, bool]] = {
    "original": (None, False),
    "original + fine-tune": (None, True),
    "converted": ("ltm", False),
    "converted + fine-tune": ("ltm", True),
    "pooled + fine-tune": ("pool", True),
    "sliced + fine-tune": ("slice", True),
}


def convert(name: str, method: str) -> nn.Module:
    """Convert a base by ``ltm`` to its share of MACs, or by another method to the counts that ``ltm`` got."""
    from ltm_retrofit import BudgetError, LTMConfig, get_plan, retrofit
    from ltm_retrofit.recipe import sliced_config

    model = load(name)
    try:
        retrofit(model, LTMConfig(flops=FLOPS[name]))
    except BudgetError as error:
        print(f"{name}: {error}; taking {error.nearest:.4f} instead")
        retrofit(model, LTMConfig(flops=error.nearest))
    if method == "ltm":
        return model
    return retrofit(load(name), replace(sliced_config(get_plan(model)), method=method))


def compare(name: str, log: Path, seed: int, epochs: int | None, limit: int | None) -> None:
    """Run every arm of a base that the log does not have with these settings."""
    from ltm_retrofit import RetrofitError, TrainConfig, evaluate, finetune, get_plan
    from ltm_retrofit.finding.example import prepare_example
    from ltm_retrofit.macs import count_macs
    from ltm_retrofit.merging.methods import get_method
    from ltm_retrofit.tuning.parameters import MASKS_FASTER
    from ltm_retrofit.tuning.sources import DataSection, load_split

    section = DataSection(canvas=CANVAS)
    config = TrainConfig(
        train="all", distill=0.0, distill_token=0.0, epochs=epochs or 1, batch_size=64, lr=LR, label_smoothing=0.1,
        augment="crop", seed=seed,
    )  # fmt: skip
    data, test = (load_split(section, split) for split in (section.train_split, section.test_split))
    if limit:
        data, test = (table.select(range(limit)) for table in (data, test))
    for arm, (method, tuned) in ARMS.items():
        key = {"stage": "compare", "base": name, "arm": arm, "seed": seed if tuned else 0, "lr": LR if tuned else 0}
        key |= {"asked": FLOPS[name]} if method is not None else {}
        key |= {"mask": get_method("ltm").version, "faster": MASKS_FASTER} if method == "ltm" else {}
        key |= {"epochs": config.epochs if tuned else 0, "train_images": len(data), "test_images": len(test)}
        if any(key.items() <= line.items() for line in noted(log, "compare") if "error" not in line):
            print(f"{name}, {arm}, seed {seed}: in {log} already, skipped")
            continue
        line: dict[str, Any] = dict(key)
        try:
            torch.manual_seed(seed)
            model = load(name) if method is None else convert(name, method)
            if method is not None:
                plan = get_plan(model)
                line["sites"] = [f"{row.site} {row.scope} {row.tokens_in} → {row.tokens_out}" for row in plan.rows]
                line |= {"asked": FLOPS[name], "share": plan.share}
            line["macs"] = count_macs(model, prepare_example(model, None)).total
            if tuned:
                line["seconds"] = sum(epoch["seconds"] for epoch in finetune(model, data, config=config).epochs)
            line["accuracy"] = evaluate(model, test)
        except RetrofitError as error:  # a scope or method that the package lacks: tried again next time
            line["error"] = f"{type(error).__name__}: {error}"
        note(log, line)


def table(log: Path, out: Path) -> None:
    """Write the accuracies as a Markdown table."""
    lines = [line for line in noted(log, "compare") if "error" not in line and line["lr"] in (0, LR)]
    lines = [line for line in lines if line.get("asked") in (None, FLOPS[line["base"]])]
    kept = {(line["base"], line["arm"], line["seed"]): line for line in lines}  # the last of each counts
    rows, sites = [f"| base | MACs | share | {' | '.join(ARMS)} |", "|---" * (len(ARMS) + 3) + "|"], []
    for name in FLOPS:
        before, after = kept.get((name, "original", 0)), kept.get((name, "converted", 0))
        if before is None or after is None:
            continue
        share = f"{after['macs'] / before['macs']:.3f}"
        if not after["asked"] - 0.02 <= after["share"] <= after["asked"]:
            share += f", asked for {after['asked']} (BudgetError.nearest)"
        cells = [name, f"{before['macs'] / 1e6:.2f} M → {after['macs'] / 1e6:.2f} M", share]
        for arm in ARMS:
            values = [line["accuracy"] for key, line in kept.items() if key[:2] == (name, arm)]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}" if values else "–")
        rows.append(f"| {' | '.join(cells)} |")
        sites.append(f"- {name}: {'; '.join(after['sites'])}")
    trained = ", ".join(f"{name} {value}" for name, value in {x["base"]: x["val"] for x in noted(log, "train")}.items())
    old = [line["base"] for line in kept.values() if line["arm"] == "converted" and "mask" not in line]
    told = f"The masks of {', '.join(old)} are of the first version (commit 810c14b)."
    tests, epochs, seeds, machines = (
        ", ".join(sorted({str(line[key]) for line in kept.values() if line[key] or key == "seed"}))
        for key in ("test_images", "epochs", "seed", "hardware")
    )
    out.write_text(
        f"""# Accuracy at a share of the multiply-adds

Made by `python benchmarks/hybrids.py train`, `compare` and `table`, from `benchmarks/hybrids.jsonl`.
Hardware: {machines}.

{chr(10).join(rows)}

Top-1 accuracy in percent on {tests} test canvases, drawn from 360 source digits that no training canvas shows. The
fine-tune is of all weights at a rate of {LR:g}, {epochs} epoch(s), the same for every arm;
seeds {seeds}, mean and range where there are
several. {told if old else ""}
Pooled and sliced have the token counts of converted at the same sites. MACs are counted on the models
themselves, masks included. The bases are tiny and were trained for minutes on canvases of the same kind (validation
accuracy at the end: {trained or "not in the log"}); rope started from the first
stage of `train_base.py`.
MobileViT sees 128 pixels, so that its sequences have 64 and 16 tokens, as those of the real one have 256, 64 and 16; at
64 pixels (16 and 4 tokens) the same share cost two points, and pooling did as well (commit 780e6ad).

Token counts:

{chr(10).join(sites)}
""",
        encoding="utf-8",
    )
    print(out.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "compare", "table"))
    parser.add_argument("bases", nargs="*", metavar="base", help=f"of {', '.join(FLOPS)}; all where left out")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of the fine-tune")
    parser.add_argument("--epochs", type=int, help="of the fine-tune, instead of the quickstart's")
    parser.add_argument("--limit", type=int, help="images for training and for testing, to try things out")
    parser.add_argument("--log", type=Path, default=HERE / "hybrids.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results.md", help="of the table")
    args = parser.parse_args()
    if unknown := set(args.bases) - set(FLOPS):
        parser.error(f"no such base: {', '.join(sorted(unknown))}; there are {', '.join(FLOPS)}")
    torch.set_num_threads(1)
    if args.command == "table":
        return table(args.log, args.out)
    for name in args.bases or FLOPS:
        if args.command == "train" and name in BASES:
            train(name, args.log)
        for seed in range(args.seeds if args.command == "compare" else 0):
            compare(name, args.log, seed, args.epochs, args.limit)


if __name__ == "__main__":
    main()
