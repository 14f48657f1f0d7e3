"""What brings the accuracy back: arms with the same multiply-adds, data and learning-rate grid, on CIFAR-10.

    python benchmarks/ablation_base.py --data PATH     # once: the base
    python benchmarks/ablation.py run --data PATH      # appends a line for each finished run; goes on where it was
    python benchmarks/ablation.py table                # writes docs/ablation.md from ablation.jsonl

Every arm is tuned for an epoch with each rate of one grid on 45,000 training images; the rate that is best on the 5,000
set aside is run with every seed and reads the test images, once; longer runs take the rate that was best after one
epoch. What an arm does not say is as `TrainConfig` has it. The first seed's run of one epoch is the one
that was chosen, kept under runs/ablation. The unconverted network's arms serve all shares. The information is that of
test images, with centroids and temperatures fitted to the same 5,000 training images for all arms. Variations have
their arm's rate and its first seed, learn from a quarter of the images, as their arm then does too, and are read on
the images set aside.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ablation_base as base
from ablation_arms import ALL, ARMS, PROGRAMME, VARIATIONS, arm_of
from ablation_job import Job, do
from ablation_page import write_page

HERE = Path(__file__).parent


def noted(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def job_of(line: dict[str, Any]) -> Job:
    return Job(**{field: line[field] for field in Job._fields})


def best_of(jobs: list[Job], accuracies: dict[Job, float]) -> Job | None:
    """Return the job with the highest accuracy on the images set aside; None while one of them is missing."""
    return max(jobs, key=accuracies.__getitem__) if all(job in accuracies for job in jobs) else None


def wanted(programme: list[tuple[float, int, int, str]], done: dict[Job, float], seeds: int) -> Iterator[Job]:
    """Yield every job whose choice has been made, done or not, in the order of the programme."""
    for flops, epochs, images, name in programme:
        arm, of = arm_of(name), VARIATIONS[name][0] if name in VARIATIONS else name
        setting = {"flops": flops, "epochs": epochs, "images": images}
        if arm.settings is None:
            yield Job("test", name, **setting)
            continue
        choices = [Job("choose", of, rate=rate, **setting | {"epochs": 1}) for rate in arm.rates]
        yield from choices
        best = best_of(choices, done)
        if best is None:
            continue
        chosen = best._replace(epochs=epochs)
        if name in VARIATIONS:
            varied = chosen._replace(stage="vary", arm=name)
            yield from (varied._replace(seed=seed) for seed in range(1 if images < ALL else min(2, seeds)))
        else:
            yield from (chosen._replace(stage="test", seed=seed) for seed in range(seeds if arm.all_seeds else 1))


def run(args: argparse.Namespace) -> None:
    """Do every job that the log does not have, several at once; one that fails does not stop the others."""
    programme = [
        (flops, epochs, args.images or images, name)
        for flops, epochs, images, names in PROGRAMME
        for name in names
        if (not args.arms or name in args.arms)
        and (not args.flops or flops in (*args.flops, 1.0))
        and (not args.epochs or epochs in (*args.epochs, 0))
    ]
    for split in ("train", "test"):
        base.decoded(args.data, split)
    done = {job_of(line): line["accuracy"] for line in noted(args.log)}
    failed: set[Job] = set()
    flying: dict[Future[dict[str, Any]], Job] = {}
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        while True:
            for job in wanted(programme, done, args.seeds):
                if len(flying) < args.workers and not (job in done or job in failed or job in flying.values()):
                    flying[pool.submit(do, job, args.data, args.threads)] = job
            if not flying:
                break
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                job = flying.pop(future)
                try:
                    line = future.result()
                except Exception:  # whatever it is, the others' hours are not to be lost
                    traceback.print_exc()
                    failed.add(job)
                else:
                    base.note(args.log, line, hidden="right")
                    done[job] = line["accuracy"]
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {sorted(failed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *VARIATIONS], metavar="ARM", help="only these")
    parser.add_argument("--flops", nargs="+", type=float, help="only these shares")
    parser.add_argument("--epochs", nargs="+", type=int, help="only this many")
    parser.add_argument("--seeds", type=int, default=3, help="of the headline arms; the others have one")
    parser.add_argument("--images", type=int, help="that train, of every run, to try things out")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("--log", type=Path, default=HERE / "ablation.jsonl")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "ablation.md")
    args = parser.parse_args()
    if args.command == "table":
        write_page(noted(args.log), args.out)
    else:
        run(args)


if __name__ == "__main__":
    main()
