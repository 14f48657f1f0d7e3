"""Is this checkout slower than another? Conversion, training step and latency of both, taking turns in one run.

    git worktree add /tmp/other 56bc864
    python benchmarks/against.py /tmp/other --rounds 30

Each checkout has a worker process of its own, and in every round both do the same work, one after the other, in turns
first and second. The ratio is of this one's seconds to the other's. It has failed where the lower quartile of the
ratios is above 1.03: then three rounds in four were slower, which noise does not explain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

LIMIT = 1.03
HERE = Path(__file__).parent.parent

WORKER = """
import copy, json, sys, time, warnings
import timm, torch
import ltm_retrofit as ltm
warnings.simplefilter("ignore")
torch.set_num_threads(int(sys.argv[1]))
answers, sys.stdout = sys.stdout, sys.stderr  # a fine-tune says aloud what it does
plain = timm.create_model("vit_small_patch16_224").eval()
converted = ltm.retrofit(copy.deepcopy(plain), ltm.LTMConfig(flops=0.65))
local = ltm.retrofit(timm.create_model("swin_tiny_patch4_window7_224").eval(), ltm.LTMConfig(flops=0.8))
images = {batch: torch.randn(batch, 3, 224, 224) for batch in (1, 8)}
trained = copy.deepcopy(converted)
batch = [(images[8], torch.arange(8))]

def convert():
    model = copy.deepcopy(plain)
    began = time.perf_counter()
    ltm.retrofit(model, ltm.LTMConfig(flops=0.65))
    return time.perf_counter() - began

def step():
    began = time.perf_counter()
    ltm.finetune(trained, batch * 2, config=ltm.TrainConfig(batch_size=8, bound_warmup=0.0))
    return time.perf_counter() - began

def forward(model, size, times):
    with torch.inference_mode():
        began = time.perf_counter()
        for _ in range(times):
            model(images[size])
        return time.perf_counter() - began

work = {
    "conversion, ViT-S": convert,
    "training, two steps of 8": step,
    "ViT-S, batch 1": lambda: forward(converted, 1, 8),
    "ViT-S, batch 8": lambda: forward(converted, 8, 1),
    "Swin-T, batch 1": lambda: forward(local, 1, 6),
}
for name in work:
    work[name]()
print("ready", file=sys.stderr, flush=True)
for line in sys.stdin:
    print(json.dumps(work[line.strip()]()), file=answers, flush=True)
"""
NAMES = ("conversion, ViT-S", "training, two steps of 8", "ViT-S, batch 1", "ViT-S, batch 8", "Swin-T, batch 1")


def start(checkout: Path, threads: int) -> subprocess.Popen[str]:
    """Start a worker that imports the package of one checkout."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
        cwd=checkout,
    )


def ask(worker: subprocess.Popen[str], name: str) -> float:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{name}\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker died at {name!r}: run it by itself to see why")
    return float(json.loads(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the code to compare with")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    args = parser.parse_args()
    workers = [start(HERE, args.threads), start(args.other.resolve(), args.threads)]
    failed = False
    print(f"{args.rounds} rounds, {args.threads} thread(s); this checkout's seconds to the other's, paired")
    for name in args.only:
        ratios = []
        for number in range(args.rounds):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            seconds = {index: ask(workers[index], name) for index in order}
            ratios.append(seconds[0] / seconds[1])
        low, middle, high = statistics.quantiles(ratios, n=4)
        slower = low > LIMIT
        failed |= slower
        print(f"{name:<26} ×{middle:.3f} (quartiles {low:.3f} to {high:.3f}){'  SLOWER' if slower else ''}", flush=True)
    for worker in workers:
        worker.kill()
    sys.exit(failed)


if __name__ == "__main__":
    main()
