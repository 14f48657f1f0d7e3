"""How long does it take to convert a ViT-L with all proofs, and to plan a 7-billion-parameter model without numbers?

python benchmarks/conversion_time.py --threads 2

And what of it goes into asking which tokens know of which (``finding/views.py``), in plain, windowed and causal models.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from statistics import median
from typing import Any

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


def small_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_hidden_layers": 12}
    return CLIPModel(CLIPConfig(text_config=sizes, vision_config={**sizes, "patch_size": 16})).eval()


def share_of_views(name: str, repeats: int = 5) -> str:
    """Convert anew ``repeats`` times; return the share of the time that ``find_views`` takes, median and range."""
    from ltm_retrofit.finding import walk

    find_views, shares, example = walk.find_views, [], None
    if name == "CLIP":
        example = {"input_ids": torch.arange(77)[None], "pixel_values": torch.zeros(1, 3, 224, 224)}
    for _ in range(repeats):
        model, inside = small_clip() if name == "CLIP" else timm.create_model(name).eval(), 0.0

        def timed(*args: Any) -> Any:
            nonlocal inside
            began = time.perf_counter()
            found = find_views(*args)
            inside += time.perf_counter() - began
            return found

        walk.find_views = timed
        began = time.perf_counter()
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8), example=example)
        shares.append(inside / (time.perf_counter() - began))
    walk.find_views = find_views
    return f"{name}: {100 * median(shares):.1f} % ({100 * min(shares):.1f} to {100 * max(shares):.1f})"


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
    print("share of a conversion in which it is asked which tokens know of which, of five:")
    for name in ("vit_small_patch16_224", "swin_tiny_patch4_window7_224", "CLIP"):
        print(share_of_views(name))


if __name__ == "__main__":
    main()
