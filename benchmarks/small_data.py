"""What a fine-tune on few photographs does to a converted checkpoint, against leaving it as it is.

    python benchmarks/small_data.py run --model runs/dinov2s --images PHOTOS --sizes 200 800 3068 --seeds 0 1 2
    python benchmarks/small_data.py table

The checkpoint is that of ``real_checkpoint.py make``, converted to ×0.5; PHOTOS as there. Each run takes as many
training photographs as ``--sizes`` says, another draw for each seed, and fine-tunes by `ltm.finetune` with one of
SETTINGS. The best state by the validation photographs is kept, and it alone is asked for the test photographs, once.
Results are lines of ``benchmarks/small_data.jsonl``; those that are there are not made again. With ``--explore`` the
test photographs are not read at all: that is how settings were chosen.

Kept from run to run: photographs as the image processor crops them, what the original's classifier reads of each (the
teacher; nothing is augmented, so it never changes), and what validation says of the converted model.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from real_checkpoint import load, normalized, tensors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import fingerprints_of
from ltm_retrofit.tuning import objective
from ltm_retrofit.tuning.classes import predictions
from ltm_retrofit.tuning.validation import Validation

HERE = Path(__file__).parent
RESULTS = HERE / "small_data.jsonl"
CACHE = HERE.parent / "runs" / "small_data"

SIZES = (200, 800, 3068)
ALONE = {"distill": 0.0, "distill_token": 0.0}
TEACHER = {"distill": 1.0, "distill_token": 1.0, "bound": "none"}
#: name → settings of the fine-tune, the rest as `finetune` decides; ``labels``: whether those of the images are read
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},  # all that `finetune` decides by itself
    "before": {"lr": 3e-4, "batch_size": 64, "epochs": 1, **ALONE},  # the defaults at first
    **{f"all {rate:g}": {"lr": rate, "labels": False, **TEACHER} for rate in (1e-6, 3e-6, 1e-5, 3e-5)},
    **{
        f"masks+norms {rate:g}": {"train": "masks+norms", "lr": rate, "labels": False, **TEACHER}
        for rate in (3e-5, 1e-4, 3e-4, 1e-3)
    },
    **{f"masks {rate:g}": {"train": "masks", "lr": rate, "labels": False, **TEACHER} for rate in (3e-3, 1e-2)},
    **{f"all {rate:g}, labels": {"lr": rate, **TEACHER} for rate in (3e-6, 1e-5, 3e-5)},
    "all 1e-05, layers, labels": {"lr": 1e-5, "layer_decay": 0.75, **TEACHER},
    "all 1e-05, labels alone": {"lr": 1e-5, "bound": "none", **ALONE},
    "masks+norms 0.001, labels": {"train": "masks+norms", "lr": 1e-3, "mask_lr": 3e-3, **TEACHER},
}


class Photographs(Dataset[tuple[Tensor, int]]):
    """Photographs as the model reads them; without labels they have -1."""

    def __init__(self, images: Tensor, labels: Tensor, labelled: bool = True) -> None:
        self.images, self.labels, self.labelled = images, labels, labelled

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalized(self.images[index]), int(self.labels[index]) if self.labelled else -1


# ---------------------------------------------------------------------------------------------------- what is kept


class Remembered(nn.Module):
    """The original as a teacher: what its classifier reads of each photograph is known, the classifier is its own."""

    def __init__(self, known: dict[bytes, Tensor], classifier: nn.Module) -> None:
        super().__init__()
        self.known, self.classifier = known, classifier

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.stack([self.known[key_of(image)] for image in pixel_values]))
        return logits


def key_of(image: Tensor) -> bytes:
    """Tell photographs apart by some of their pixels."""
    return image[:, 3::16, 5::16].numpy().tobytes()


def taught(original: nn.Module, images: Tensor, chosen: list[int]) -> dict[bytes, Tensor]:
    """Return what the original's classifier reads of the chosen photographs."""
    file = CACHE / "features.pt"
    kept: dict[int, Tensor] = torch.load(file) if file.is_file() else {}
    missing = [index for index in chosen if index not in kept]
    read: list[Tensor] = []
    handle = original.classifier.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.inference_mode():
        for first in range(0, len(missing), 16):
            part = missing[first : first + 16]
            original(normalized(images[part]))
            kept |= zip(part, read.pop().clone(), strict=True)
    handle.remove()
    if missing:
        torch.save(kept, file)
    return {key_of(normalized(images[index])): kept[index] for index in chosen}


def remembering(measure: Any) -> Any:
    """Let validation remember what it found of which weights: every run begins with the same ones."""

    def remembered(self: Validation, model: nn.Module, *args: Any) -> Any:
        file = CACHE / "validated.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        name = hashlib.sha256(repr(sorted(fingerprints_of(model).items())).encode()).hexdigest()
        if name not in known:
            known[name] = measure(self, model, *args)
            file.write_text(json.dumps(known))
        return known[name]

    return remembered


# ---------------------------------------------------------------------------------------------------------- the runs


def draw(labels: Tensor, size: int, seed: int) -> list[int]:
    """Return which training photographs a run has: another draw for each seed."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:size]
    assert len(labels[drawn].unique()) == len(labels.unique()), "a class without photographs"
    return sorted(drawn.tolist())


def told(model: nn.Module, loader: DataLoader[Any]) -> tuple[float, str]:
    """Return top-1 in percent, and for each photograph whether its class was recognised: ones and zeros."""
    guesses, truths = predictions(model, loader)
    right = guesses == truths
    return round(100 * right.float().mean().item(), 2), "".join(str(int(one)) for one in right)


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def write(line: dict[str, Any]) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    CACHE.mkdir(parents=True, exist_ok=True)
    Validation.measure = remembering(Validation.measure)  # type: ignore[method-assign]
    split = {name: tensors(args.images, name, args.model) for name in ("train", "validation", "test")}
    val, test = (DataLoader(Photographs(*split[name]), batch_size=16) for name in ("validation", "test"))
    original = load(args.model)
    example = torch.zeros(1, 3, 224, 224)
    converted = ltm.retrofit(load(args.model), ltm.LTMConfig(flops=args.flops), example=example)
    there = [(line["setting"], line["size"], line["seed"], line["explored"]) for line in lines()]
    for name, model in (("original", original), ("converted", converted)):
        if not args.explore and (name, 0, 0, False) not in there:
            accuracy, right = told(model, test)
            write({"setting": name, "size": 0, "seed": 0, "explored": False, "test": accuracy, "right": right})
    for seed in args.seeds:
        for size in args.sizes:
            for name in args.settings:
                if (name, size, seed, args.explore) in there:
                    continue
                line = one(name, size, seed, original, copy.deepcopy(converted), split["train"], val, args)
                if not args.explore:
                    line["test"], line["right"] = told(line.pop("model"), test)
                line.pop("model", None)
                write(line)
                print(line["setting"], size, seed, "kept", line["kept"], line["before"], line["epochs"], flush=True)


def one(
    name: str,
    size: int,
    seed: int,
    original: nn.Module,
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    val: DataLoader[Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Make one fine-tune; return its line, with the model."""
    settings: dict[str, Any] = {**SETTINGS[name], "seed": seed, **json.loads(args.change)}
    labelled = settings.pop("labels", True)
    config = ltm.TrainConfig(**settings).decided(taught=True, images=size)
    chosen = draw(train[1], size, seed)
    known = taught(original, train[0], chosen)
    objective.teacher_of = lambda model: Remembered(known, original.classifier)
    # a teacher that remembers attends nowhere, so nobody could find out what its classifier is called
    objective.record = lambda *_: SimpleNamespace(readouts=lambda classes: ("classifier",))  # type: ignore[assignment]
    loader = DataLoader(
        Photographs(train[0][chosen], train[1][chosen], labelled),
        batch_size=config.batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    began = time.perf_counter()
    history = ltm.finetune(model, loader, val, config=config)
    shown = ("loss", "val_accuracy", "val_loss")
    return {
        **{"setting": name, "size": size, "seed": seed, "explored": args.explore, "labels": labelled},
        "config": config.to_dict(),
        "before": {key: round(history.before[key], 4) for key in shown[1:]},
        "epochs": [{key: round(epoch[key], 4) for key in shown} for epoch in history.epochs],
        "kept": history.kept,
        "seconds": round(time.perf_counter() - began),
        "model": model,
    }


# --------------------------------------------------------------------------------------------------------- the table


def table(args: argparse.Namespace) -> None:
    """Print what each setting changed on the test photographs, from the converted model, mean of all seeds."""
    found = [line for line in lines() if not line["explored"]]
    print(
        "| photographs | settings, seed | validation before, % | after each epoch | epoch kept |\n|---|---|---|---|---|"
    )
    for line in lines():
        if line["explored"]:
            after = ", ".join(f"{epoch['val_accuracy']:.2f}" for epoch in line["epochs"])
            cells = (line["size"], f"{line['setting']}, {line['seed']}", f"{line['before']['val_accuracy']:.2f}", after)
            print(f"| {' | '.join(map(str, cells))} | {line['kept']} of {len(line['epochs'])} |")
    if not found:
        print("\nNothing was measured on test photographs yet.")
        return
    base = next(line for line in found if line["setting"] == "converted")
    start = bits(base)
    print(f"Converted, not tuned: {base['test']:.2f} % of {len(start)} test photographs; ", end="")
    print(f"original {next(line for line in found if line['setting'] == 'original')['test']:.2f} %.\n")
    print("| photographs | settings | change of top-1, points | of each seed | epoch kept |\n|---|---|---|---|---|")
    keys = dict.fromkeys((line["size"], line["setting"]) for line in found if line["size"])
    for size, setting in sorted(keys, key=lambda key: key[0]):
        runs = [line for line in found if (line["size"], line["setting"]) == (size, setting)]
        changes = torch.stack([bits(line) - start for line in runs])
        mean = changes.mean(dim=0)  # of a photograph over the seeds: the error is that of the photographs
        each = ", ".join(f"{100 * change:+.2f}" for change in changes.mean(dim=1).tolist())
        kept = ", ".join(f"{line['kept']} of {len(line['epochs'])}" for line in runs)
        error = 100 * mean.std().item() / len(mean) ** 0.5
        print(f"| {size:,} | {setting} | {100 * mean.mean():+.2f} ± {error:.2f} | {each} | {kept} |")


def bits(line: dict[str, Any]) -> Tensor:
    return torch.tensor([float(one) for one in line["right"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("run")
    sub.set_defaults(call=run)
    sub.add_argument("--model", type=Path, required=True, help="folder that real_checkpoint.py made")
    sub.add_argument("--images", type=Path, required=True, help="train, validation and test, a folder a class in each")
    sub.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=SIZES)
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sub.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    sub.add_argument("--flops", type=float, default=0.5)
    sub.add_argument("--threads", type=int, default=1)
    sub.add_argument("--change", default="{}", help="JSON of settings that all runs have instead")
    sub.add_argument("--explore", action="store_true", help="leave the test photographs unread")
    sub = commands.add_parser("table")
    sub.set_defaults(call=table)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
