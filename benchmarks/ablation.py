"""What brings the accuracy back: arms with the same multiply-adds, data and learning-rate grid, on CIFAR-10.

    python benchmarks/ablation_base.py --data PATH     # once: the base
    python benchmarks/ablation.py run --data PATH      # appends a line for each finished run; goes on where it was
    python benchmarks/ablation.py table                # writes docs/ablation.md from ablation.jsonl

Every arm is tuned with each rate of one grid on the first 45,000 training images; the rate that is best on the 5,000
set aside is then run with every seed and reads the test images, once. The first seed's run is the one that was chosen,
kept under runs/ablation. The unconverted network's arms serve all shares. Images are decoded once. The information is
that of test images, with centroids and temperatures fitted to the same 5,000 training images for all arms. Two
processes may append to one log, given different arms.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablation_base as base
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.flops import count_macs
from ltm_retrofit.graph.example import prepare_example
from ltm_retrofit.interception.masks import LEARNABLE
from ltm_retrofit.merging import ib

HERE = Path(__file__).parent
RATES = (1e-4, 3e-4, 1e-3)
CLUSTERS, PERPLEXITY = 64, 8.0
FINETUNE = {"batch_size": 128, "label_smoothing": base.SMOOTHING}
#: arm → conversion method, settings of the fine-tune (None: none at all), and whether it has all seeds
ARMS: dict[str, tuple[str | None, dict[str, Any] | None, bool]] = {
    "original": (None, None, False),
    "original, tuned": (None, {"bound": "none"}, True),
    "original, tuned, distillation": (None, {"bound": "none", "distill": 1.0}, True),
    "LTM, not tuned": ("ltm", None, False),
    "LTM, CE": ("ltm", {"bound": "none"}, True),
    "LTM, CE + IBB": ("ltm", {"bound": "ibb"}, False),
    "LTM, CE + CEB": ("ltm", {"bound": "ceb"}, True),
    "LTM, CE + CEB, no IB step": ("ltm", {"bound": "ceb", "step": False}, False),
    "LTM, distillation": ("ltm", {"bound": "none", "distill": 1.0}, True),
    "LTM, distillation + CEB": ("ltm", {"bound": "ceb", "distill": 1.0}, True),
    "LTM, masks only, CE + CEB": ("ltm", {"bound": "ceb", "train": "masks"}, False),
    "ToMe, not tuned": ("tome", None, False),
    "ToMe, CE": ("tome", {"bound": "none"}, True),
    "ToMe, distillation": ("tome", {"bound": "none", "distill": 1.0}, True),
    "average pooling, CE": ("pool", {"bound": "none"}, False),
}


class Batches:
    """Augmented batches of the training images, drawn anew each time, from one seed."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // FINETUNE["batch_size"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = FINETUNE["batch_size"]
        for index in torch.randperm(len(self.images), generator=self.generator)[: len(self) * size].split(size):
            images = base.augmented(self.images[index], self.generator)
            yield base.to_batch(images), self.labels[index]


def convert(method: str | None, flops: float) -> nn.Module:
    """Return the base, converted to a share of its multiply-adds; pooling gets the counts of ``ltm``."""
    model = base.load()
    if method in ("ltm", "tome"):
        return ltm.retrofit(model, ltm.LTMConfig(flops=flops, method=method))
    if method == "pool":
        rows = [row for row in ltm.get_plan(convert("ltm", flops)).rows if row.action == "merge"]
        sites, counts = tuple(row.site for row in rows), tuple(row.tokens_out for row in rows)
        return ltm.retrofit(model, ltm.LTMConfig(tokens=counts, sites=sites, method="pool"))
    return model


def tuned(arm: str, flops: float, epochs: int, rate: float, seed: int, train: tuple[Tensor, Tensor]) -> nn.Module:
    """Return an arm's network, converted and fine-tuned."""
    method, settings, _ = ARMS[arm]
    torch.manual_seed(seed)
    model = convert(method, flops)
    if settings is None:
        return model
    settings = dict(settings)
    if not settings.pop("step", True):
        for module in model.modules():
            if isinstance(module, LEARNABLE):
                module.eta.requires_grad_(False)
    config = replace(ltm.TrainConfig(epochs=epochs, lr=rate, seed=seed, **settings), **FINETUNE)
    ltm.finetune(model, Batches(*train, seed), config=config)
    return model.eval()


@torch.no_grad()
def hits(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return whether each image is recognised ``(n,)``."""
    parts = zip(images.split(250), labels.split(250), strict=True)
    return torch.cat([model(base.to_batch(x)).argmax(-1) == y for x, y in parts])


@torch.no_grad()
def information(model: nn.Module, fit: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return IB, I(X̃;X) and I(X̃;Y) of the classifier's feature on test images, clusters fitted on others."""
    read: list[Tensor] = []
    handles = [
        model.head.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        model.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args[0].mean(dim=1))),
    ]
    phis = {}
    for name, (images, _) in (("fit", fit), ("test", test)):
        read.clear()
        for part in images.split(250):
            model(base.to_batch(part))
        inputs, features = torch.cat(read[::2]), torch.cat(read[1::2])
        if name == "fit":
            generator = torch.Generator().manual_seed(0)
            places = [ib.kmeans(x, CLUSTERS, generator=generator) for x in (inputs, features)]
            betas = [ib.beta_for_perplexity(x, c, PERPLEXITY) for x, c in zip((inputs, features), places, strict=True)]
        phis[name] = [ib.log_assign(x, c, b).exp() for x, c, b in zip((inputs, features), places, betas, strict=True)]
    for handle in handles:
        handle.remove()
    phi_x, phi = phis["test"]
    targets = ib.soft_targets(test[1], 10)
    i_input, i_label = (value.item() for value in ib.informations(phi, phi_x, targets))
    return {"ib": i_input - i_label, "i_input": i_input, "i_label": i_label}


def noted(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def run(args: argparse.Namespace) -> None:
    """Do every run that the log does not have."""
    torch.set_num_threads(args.threads)
    images, labels = base.decoded(args.data, "train")
    held = images[-base.ASIDE :], labels[-base.ASIDE :]
    train = images[: -base.ASIDE][: args.limit], labels[: -base.ASIDE][: args.limit]
    test = tuple(part[: args.limit] for part in base.decoded(args.data, "test"))
    for arm in args.arms or ARMS:
        method, settings, all_seeds = ARMS[arm]
        setting = {"flops": args.flops if method else 1.0, "epochs": args.epochs, "images": len(train[0])}
        for rate in RATES if settings is not None else (0.0,):
            if find(args.log, arm=arm, stage="choose", rate=rate, **setting):
                continue
            began = time.perf_counter()
            model = tuned(arm, args.flops, args.epochs, rate, 0, train)
            line = {"arm": arm, "stage": "choose", "rate": rate, **setting, "aside": share(hits(model, *held))}
            line |= {"macs": count_macs(model, prepare_example(model, None)).total}
            file = weights_of(arm, rate, setting)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), file)
            note(args.log, line | {"seconds": time.perf_counter() - began})
        best = max(find(args.log, arm=arm, stage="choose", **setting), key=lambda line: line["aside"])["rate"]
        for seed in range(args.seeds if all_seeds else 1):
            if find(args.log, arm=arm, stage="test", seed=seed, **setting):
                continue
            file = weights_of(arm, best, setting)
            if seed == 0 and file.exists():
                model = convert(method, args.flops).eval()
                model.load_state_dict(load_file(file))
            else:  # the same run once more, where its weights went with the machine
                model = tuned(arm, args.flops, args.epochs, best, seed, train)
            right = hits(model, *test)
            line = {"arm": arm, "stage": "test", "seed": seed, "rate": best, **setting, "accuracy": share(right)}
            line |= information(model, held, test)
            note(args.log, line | {"right": bytes(right.to(torch.uint8).tolist()).translate(BITS).decode()})


def weights_of(arm: str, rate: float, setting: dict[str, Any]) -> Path:
    """Return where the first seed's network is kept."""
    words = [arm, f"{rate:g}", *(f"{key}{value:g}" for key, value in setting.items())]
    return base.RUNS / f"{'_'.join(words).replace(' ', '').replace(',', '+')}.safetensors"


#: one character for each image, so that differences are paired
BITS = bytes.maketrans(b"\x00\x01", b".x")


def share(right: Tensor) -> float:
    return 100 * float(right.float().mean())


def find(log: Path, **wanted: Any) -> list[dict[str, Any]]:
    return [line for line in noted(log) if wanted.items() <= line.items()]


def note(log: Path, line: dict[str, Any]) -> None:
    line["hardware"] = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    with log.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    print({key: value for key, value in line.items() if key != "right"}, flush=True)


def paired(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean difference in points and its standard error: over seeds, paired by test image."""
    seeds = sorted({line["seed"] for line in one} & {line["seed"] for line in other})
    rows = []
    for seed in seeds:
        first, second = (next(x["right"] for x in lines if x["seed"] == seed) for lines in (one, other))
        rows.append([(a == "x") - (b == "x") for a, b in zip(first, second, strict=True)])
    images = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    return 100 * statistics.fmean(images), 100 * statistics.stdev(images) / len(images) ** 0.5


def table(args: argparse.Namespace) -> None:
    """Write all settings of the log as Markdown tables."""
    lines = noted(args.log)
    settings = sorted({(x["flops"], x["epochs"], x["images"]) for x in lines if x["flops"] < 1}, reverse=True)
    curve = noted(HERE / "ablation_base.jsonl")
    page = [
        "# Ablation",
        "",
        "Made by `benchmarks/ablation_base.py`, `ablation.py run` and `table`, from `benchmarks/ablation.jsonl`.",
        f"Hardware: {', '.join(sorted({x['hardware'] for x in lines}))}.",
        f"Base: {base.ARCHITECTURE} {base.MODEL_ARGS}, {curve[-1]['epoch']} epochs, test accuracy "
        f"{curve[-1].get('test', float('nan')):.2f} %.",
        f"Rates {RATES}, chosen on {base.ASIDE} training images set aside. Differences are paired by test image, ± one",
        "standard error; *control* is the better of the original and the original given the same fine-tune.",
    ]
    for flops, epochs, images in settings:
        here = [x for x in lines if x["flops"] in (flops, 1) and (x["epochs"], x["images"]) == (epochs, images)]
        tests = {arm: [x for x in here if x["arm"] == arm and x["stage"] == "test"] for arm in ARMS}
        macs = {arm: next((x["macs"] for x in here if x["arm"] == arm and "macs" in x), 0) for arm in ARMS}
        control = max(
            (arm for arm in ARMS if arm.startswith("original") and tests[arm]),
            key=lambda arm: statistics.fmean(x["accuracy"] for x in tests[arm]),
        )
        page += ["", f"## ×{flops} of the multiply-adds, {epochs} epoch(s) of {images} images", ""]
        page += [
            f"Control: {control}.",
            "",
            "| arm | rate | MACs | top-1 (range) | to the control | IB | I(X̃;X) | I(X̃;Y) |",
        ]
        page += ["|---|---|---|---|---|---|---|---|"]
        for arm, runs in tests.items():
            if not runs:
                continue
            values = [x["accuracy"] for x in runs]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            gap = "" if arm == control else "{:+.2f} ± {:.2f}".format(*paired(runs, tests[control]))
            known = [f"{statistics.fmean(x[key] for x in runs):.3f}" for key in ("ib", "i_input", "i_label")]
            cells = [arm, f"{runs[0]['rate']:g}", f"×{macs[arm] / macs['original']:.3f}"]
            page.append(f"| {' | '.join([*cells, f'{statistics.fmean(values):.2f}{spread}', gap, *known])} |")
        for one, other in (("LTM, CE + CEB", "LTM, CE"), ("LTM, CE", "ToMe, CE"), ("LTM, CE + CEB", "ToMe, CE")):
            if tests[one] and tests[other]:
                page += ["", "{} against {}: {:+.2f} ± {:.2f}".format(one, other, *paired(tests[one], tests[other]))]
    args.out.write_text("\n".join(page) + "\n", encoding="utf-8")
    print("\n".join(page))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="of the headline arms; the others have one")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM")
    parser.add_argument("--limit", type=int, help="images, to try things out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log", type=Path, default=HERE / "ablation.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "ablation.md")
    args = parser.parse_args()
    {"run": run, "table": table}[args.command](args)


if __name__ == "__main__":
    main()
