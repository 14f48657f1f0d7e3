"""What brings the accuracy back: arms with the same multiply-adds, data and learning-rate grid, on CIFAR-10.

    python benchmarks/ablation_base.py --data PATH     # once: the base
    python benchmarks/ablation.py plans --data PATH    # which blocks should merge: accuracies without any fine-tune
    python benchmarks/ablation.py run --data PATH      # appends a line for each finished run; goes on where it was
    python benchmarks/ablation.py try --data PATH      # likewise: variations of arms that were run
    python benchmarks/ablation.py table                # writes docs/ablation.md from ablation.jsonl

Every arm is tuned with each rate of one grid on the first 45,000 training images; the rate that is best on the 5,000
set aside is then run with every seed and reads the test images, once. What an arm does not say is as `TrainConfig` has
it. The first seed's run is the one that was chosen, kept under runs/ablation. The unconverted network's arms serve all
shares. Images are decoded once. The information is that of test images, with centroids and temperatures fitted to the
same 5,000 training images for all arms. Variations have their arm's rate and its first seed, and are read on the images
set aside. Two processes may append to one log, given different arms.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ablation_base as base
import torch
from ablation_arms import ARMS, BATCH, CHOICES, CLUSTERS, PERPLEXITY, RATES, VARIATIONS, Arm, change, convert
from ablation_page import write_page
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.flops import count_macs
from ltm_retrofit.graph.example import prepare_example
from ltm_retrofit.merging import ib
from ltm_retrofit.tuning.data import UNLABELLED

HERE = Path(__file__).parent


class Batches:
    """Augmented batches of the training images, drawn anew each time, from one seed."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, *, labelled: bool = True) -> None:
        self.images, self.labels = images, labels if labelled else torch.full_like(labels, UNLABELLED)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.images), generator=self.generator)[: len(self) * BATCH].split(BATCH):
            images = base.augmented(self.images[index], self.generator)
            yield base.to_batch(images), self.labels[index]


def tuned(arm: Arm, flops: float, epochs: int, rate: float, seed: int, train: tuple[Tensor, Tensor]) -> nn.Module:
    """Return an arm's network, converted and fine-tuned."""
    torch.manual_seed(seed)
    model = convert(arm.method, flops)
    if arm.settings is None:
        return model
    change(model, **arm.masks)
    settings = dict(arm.settings)
    labelled = settings.pop("labels", True)
    if "mask_lr" in settings:
        settings["mask_lr"] *= rate
    config = ltm.TrainConfig(epochs=epochs, lr=rate, seed=seed, **settings)
    ltm.finetune(model, Batches(*train, seed, labelled=labelled), config=config)
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
    train, held = split(args)
    test = tuple(part[: args.limit] for part in base.decoded(args.data, "test"))
    for name in args.arms or ARMS:
        arm = ARMS[name]
        setting = {"flops": args.flops if arm.method else 1.0, "epochs": args.epochs, "images": len(train[0])}
        for rate in RATES if arm.settings is not None else (0.0,):
            if find(args.log, arm=name, stage="choose", rate=rate, **setting):
                continue
            began = time.perf_counter()
            model = tuned(arm, args.flops, args.epochs, rate, 0, train)
            line = {"arm": name, "stage": "choose", "rate": rate, **setting}
            line |= {"macs": count_macs(model, prepare_example(model, None)).total}
            file = weights_of(name, rate, setting)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(model.state_dict(), file)
            note(args.log, line | read(model, held) | {"seconds": time.perf_counter() - began})
        best = rate_of(args.log, name, setting)
        for seed in range(args.seeds if arm.all_seeds else 1):
            if find(args.log, arm=name, stage="test", seed=seed, **setting):
                continue
            file = weights_of(name, best, setting)
            if seed == 0 and file.exists():
                model = convert(arm.method, args.flops).eval()
                model.load_state_dict(load_file(file))
            else:  # the same run once more, where its weights went with the machine
                model = tuned(arm, args.flops, args.epochs, best, seed, train)
            line = {"arm": name, "stage": "test", "seed": seed, "rate": best, **setting}
            note(args.log, line | information(model, held, test) | read(model, test))


def vary(args: argparse.Namespace) -> None:
    """Try every variation that the log does not have and whose arm it has."""
    train, held = split(args)
    setting = {"flops": args.flops, "epochs": args.epochs, "images": len(train[0])}
    for name in args.arms or VARIATIONS:
        of, settings, masks = VARIATIONS[name]
        rate = rate_of(args.log, of, setting)
        if rate is None or find(args.log, arm=name, stage="vary", **setting):
            continue
        began = time.perf_counter()
        arm = ARMS[of]._replace(settings=ARMS[of].settings | settings, masks=masks)
        model = tuned(arm, args.flops, args.epochs, rate, 0, train)
        line = {"arm": name, "stage": "vary", "of": of, "rate": rate, **setting}
        note(args.log, line | read(model, held) | {"seconds": time.perf_counter() - began})


def plans(args: argparse.Namespace) -> None:
    """Note how well each choice of blocks does off the shelf, on the images set aside."""
    held = split(args)[1]
    for blocks in CHOICES:
        line = {"arm": f"LTM, not tuned, blocks {blocks}", "stage": "plan", "flops": args.flops}
        if not find(args.log, **line):
            model = convert("ltm", args.flops, blocks).eval()
            counts = {row.site: row.tokens_out for row in ltm.get_plan(model).rows}
            note(args.log, line | {"tokens": counts} | read(model, held))


def split(args: argparse.Namespace) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the images that train and those that are set aside, with their labels."""
    images, labels = base.decoded(args.data, "train")
    train = images[: -base.ASIDE][: args.limit], labels[: -base.ASIDE][: args.limit]
    return train, (images[-base.ASIDE :], labels[-base.ASIDE :])


def rate_of(log: Path, arm: str, setting: dict[str, Any]) -> float | None:
    """Return the rate that is best for an arm on the images set aside; None where not all were tried."""
    lines = find(log, arm=arm, stage="choose", **setting)
    if len(lines) < (1 if ARMS[arm].settings is None else len(RATES)):
        return None
    return max(lines, key=lambda line: line["accuracy"])["rate"]


def read(model: nn.Module, images: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return the accuracy in percent, and a character for each image: x where it is recognised."""
    right = hits(model, *images)
    return {"accuracy": share(right), "right": bytes(right.to(torch.uint8).tolist()).translate(BITS).decode()}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("plans", "run", "try", "table"))
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="of the headline arms; the others have one")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *VARIATIONS], metavar="ARM")
    parser.add_argument("--limit", type=int, help="images, to try things out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log", type=Path, default=HERE / "ablation.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "ablation.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "table":
        write_page(noted(args.log), args.out)
    else:
        {"plans": plans, "run": run, "try": vary}[args.command](args)


if __name__ == "__main__":
    main()
