"""How long does it take to convert a ViT-L with all proofs, and to plan a 7-billion-parameter model without numbers?

python benchmarks/conversion_time.py --threads 2
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter

import timm
import torch
from accelerate import init_empty_weights
from torch import nn

import ltm_retrofit as ltm


class Passes:
    """Counts how often the patch embedding runs: passes over the whole model, and those that were cut off early."""

    def __init__(self, model: nn.Module) -> None:
        self.count = Counter[str]()
        model.patch_embed.register_forward_hook(lambda *_: self.count.update(["passes"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, timm {timm.__version__}")

    model = timm.create_model("vit_large_patch16_224").eval()
    passes = Passes(model)
    began = time.perf_counter()
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
    print(
        f"vit_large_patch16_224, retrofit with all proofs: {time.perf_counter() - began:.1f} s, "
        f"{passes.count['passes']} passes over the model"
    )
    del model

    with init_empty_weights(include_buffers=False):
        model = timm.create_model("vit_7b_patch16_dinov3").eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    began = time.perf_counter()
    sites = ltm.find_sites(model)
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=0.7))
    print(
        f"vit_7b_patch16_dinov3 ({size / 1e9:.2f} G parameters, on the meta device), sites and plan: "
        f"{time.perf_counter() - began:.1f} s"
    )
    print(plan)


if __name__ == "__main__":
    main()
