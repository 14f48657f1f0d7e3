"""What is left of the eager speed-up under torch.compile, ONNX Runtime, OpenVINO and in int8.

    python benchmarks/serving.py run --folder runs/half --threads 2   # appends; run again, it goes on where it was
    python benchmarks/serving.py table

Of each model the original and the converted one take turns in the same runtime. ``--models`` of timm have random
weights; ``--folder`` is a converted model, which is given both budgets. Exports are checked as `ltm.export` does it,
and kept in ``--work``. OpenVINO is left out where it is not installed, torch.compile where there is no C++ compiler.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.resizing import image_shape
from ltm_retrofit.saving.agreement import timed
from ltm_retrofit.saving.formats import FORMATS, quantize

RESULTS = Path(__file__).with_suffix(".jsonl")
RUNTIMES = {
    "eager": "eager",
    "compile": "torch.compile",
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "int8": "ONNX Runtime, int8",
}
Session = Callable[[Tensor], object]


def models(args: argparse.Namespace) -> Iterator[tuple[str, float, nn.Module]]:
    for name in args.models:
        for flops in args.flops:
            torch.manual_seed(0)
            yield name, flops, ltm.retrofit(timm.create_model(name).eval(), ltm.LTMConfig(flops=flops))
    for folder in args.folder:
        for flops in args.flops:
            yield folder.name, flops, ltm.from_pretrained(folder, flops=flops)


def exported(model: nn.Module, runtime: str, folder: Path) -> Session:
    """Return a session of the model's export, which is written where it is not there yet."""
    kind = FORMATS["onnx" if runtime == "int8" else runtime]
    if not folder.exists():
        if runtime == "int8":
            whole = folder.with_name(folder.name.replace("-int8", "-onnx"))
            exported(model, "onnx", whole)
            shutil.copytree(whole, folder)
            quantize(folder / kind.file)
        else:
            print(ltm.export(model, folder, format=runtime, seconds=0), flush=True)
    return kind.open(folder / kind.file)


def sessions(name: str, flops: float, model: nn.Module, runtime: str, work: Path) -> tuple[Session, Session]:
    original = ltm.restore(copy.deepcopy(model))
    if runtime == "eager":
        return original, model
    if runtime == "compile":
        torch._dynamo.reset()
        return torch.compile(original, dynamic=False), torch.compile(model, dynamic=False)
    places = (work / f"{name}-original-{runtime}", work / f"{name}-{flops}-{runtime}")
    return exported(original, runtime, places[0]), exported(model, runtime, places[1])


def available(args: argparse.Namespace) -> list[str]:
    left_out = {"openvino": find_spec("openvino") is None, "compile": shutil.which("g++") is None}
    for runtime in (runtime for runtime in args.runtimes if left_out.get(runtime)):
        print(f"{RUNTIMES[runtime]} is left out: it is not installed, or lacks a compiler")
    return [runtime for runtime in args.runtimes if not left_out.get(runtime)]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def key(row: dict) -> tuple:
    return row["model"], row["flops"], row["runtime"], row["batch"], row["threads"]


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    done = {key(row) for row in read(args.results)}
    args.work.mkdir(parents=True, exist_ok=True)
    runtimes = available(args)
    for name, flops, model in models(args):
        shape = image_shape(model)
        for runtime in runtimes:
            base = {"model": name, "flops": flops, "runtime": runtime, "threads": args.threads}
            missing = [batch for batch in args.batches if key({**base, "batch": batch}) not in done]
            if not missing:
                continue
            original, converted = sessions(name, flops, model, runtime, args.work)
            for batch in missing:
                images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
                with torch.no_grad():
                    taken = timed(
                        partial(original, images), partial(converted, images), args.seconds, rounds=args.rounds
                    )
                row = {
                    **base,
                    "batch": batch,
                    "original_ms": round(taken.original, 3),
                    "converted_ms": round(taken.converted, 3),
                    "speedup": [round(value, 4) for value in taken.speedup],
                    "share": ltm.get_plan(model).share,
                    "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
                    "versions": {lib: version(lib) for lib in ("onnxruntime", "openvino") if find_spec(lib)},
                }
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name} ×{flops} {runtime:<8} batch {batch:<3} {taken}", flush=True)


def table(args: argparse.Namespace) -> None:
    rows = {key(row)[:4]: row for row in read(args.results)}  # the latest of each
    batches = sorted({batch for *_, batch in rows})
    print(f"| model | MACs | runtime | {' | '.join(f'batch {batch}' for batch in batches)} | left of eager |")
    print(f"|---|---|---|{'---|' * (len(batches) + 1)}")
    for name, flops in dict.fromkeys(found[:2] for found in rows):
        for runtime, called in RUNTIMES.items():
            cells, left = [], []
            for batch in batches:
                row, eager = rows.get((name, flops, runtime, batch)), rows.get((name, flops, "eager", batch))
                if row is None:
                    cells.append("")
                    continue
                low, middle, high = row["speedup"]
                times = f"{row['original_ms']:.1f} → {row['converted_ms']:.1f} ms"
                cells.append(f"{times}, {middle:.2f} ({low:.2f} to {high:.2f})")
                left += [] if eager is None else [middle / eager["speedup"][1]]
            if any(cells):
                share = f"{median(left):.2f} ({min(left):.2f} to {max(left):.2f})" if left else ""
                print(f"| {name} | ×{flops} | {called} | {' | '.join(cells)} | {share} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running, showing = commands.add_parser("run"), commands.add_parser("table")
    for sub in (running, showing):
        sub.add_argument("--results", type=Path, default=RESULTS)
    running.add_argument("--models", nargs="*", default=["vit_small_patch16_224"], help="timm's, with random weights")
    running.add_argument("--folder", type=Path, action="append", default=[], help="a converted model; may be repeated")
    running.add_argument("--flops", type=float, nargs="+", default=[0.65, 0.5])
    running.add_argument("--runtimes", nargs="+", choices=list(RUNTIMES), default=list(RUNTIMES))
    running.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    running.add_argument("--threads", type=int, default=2)
    running.add_argument("--rounds", type=int, default=20)
    running.add_argument("--seconds", type=float, default=120.0, help="the most for one batch size of one runtime")
    running.add_argument("--work", type=Path, default=Path("runs/serving"), help="folder in which exports are kept")
    args = parser.parse_args()
    run(args) if args.command == "run" else table(args)


if __name__ == "__main__":
    main()
