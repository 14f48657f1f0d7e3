"""Latency of a converted ViT against the original: random weights, paired and alternating, one process.

python benchmarks/latency.py --model vit_small_patch16_224 --flops 0.65 --threads 2
"""

from __future__ import annotations

import argparse
import platform
import time

import timm
import torch

import ltm_retrofit as ltm
from ltm_retrofit.finding.example import prepare_example
from ltm_retrofit.reporting.bench import batch_latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--flops", type=float, default=0.65)
    parser.add_argument("--method", default="ltm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval().to(args.device)
    began = time.perf_counter()
    ltm.retrofit(model, ltm.LTMConfig(flops=args.flops, method=args.method))
    seconds = time.perf_counter() - began
    plan = ltm.get_plan(model)
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{args.model}, {args.method}, random weights, {hardware}, {args.threads} threads, torch {torch.__version__}")
    print(plan)
    print(f"conversion with proofs: {seconds:.1f} s")
    print(f"{'batch':>5}  {'original ms':>11}  {'converted ms':>12}  {'ratio (quartiles)':>22}  {'merging':>7}")
    example = prepare_example(model, None)
    for batch, paired in batch_latencies(model, example, tuple(args.batches), rounds=args.rounds).items():
        assert paired.ratio is not None and paired.converted is not None and paired.merging is not None
        ratio = "{:.3f} ({:.3f} to {:.3f})".format(*paired.ratio)
        print(f"{batch:>5}  {paired.original:>11.1f}  {paired.converted:>12.1f}  {ratio:>22}  {paired.merging:>7.1%}")


if __name__ == "__main__":
    main()
