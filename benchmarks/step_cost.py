"""What the bound costs: training steps with and without it, paired and alternating, and the refresh of an epoch.

    python benchmarks/step_cost.py --threads 2        # step_cost.txt has what it printed, and with which rounds

Both kinds of step train the same converted model on the same batch: forward, loss, backward, optimizer. With the bound
that is the trace, the bound itself, the statistics of the feature and of every site, and the samples of the epoch's
information. The refresh fits all statistics anew to their memories, as at the end of an epoch, and estimates that
information. Other jobs on the machine make single pairs scatter: beside the median of the pairs stands its 95 %
interval (bootstrap), and the upper end of that is held against the limit.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from ablation_base import MODEL_ARGS

import ltm_retrofit as ltm
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.tuning.objective import Objective
from ltm_retrofit.tuning.parameters import make_optimizer

MODELS = {
    "vit_small_patch16_224": ({}, 0.65),
    "the ablation's, vit_tiny_patch16_224 at 32 × 32": (MODEL_ARGS, 0.5),
}
LIMIT_STEP, LIMIT_REFRESH = 1.05, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=41, help="pairs of steps that are timed")
    parser.add_argument("--epoch", type=int, default=45000, help="images of the epoch that a refresh is compared with")
    parser.add_argument("--models", nargs="+", help="beginnings of names; all where left out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{args.threads} threads, torch {torch.__version__}, batch {args.batch}; ratio: median of pairs (95 % interval)"
    )
    for name, (arguments, flops) in MODELS.items():
        if args.models and not any(name.startswith(start) for start in args.models):
            continue
        for classes in (10, 1000):
            torch.manual_seed(0)
            model = timm.create_model(name.split(", ")[-1].split(" ")[0], **{**arguments, "num_classes": classes})
            ltm.retrofit(model.eval(), ltm.LTMConfig(flops=flops))
            size = model.patch_embed.img_size[0]
            x, y = torch.randn(args.batch, 3, size, size), torch.randint(classes, (args.batch,))
            steps = {}
            for bound in ("none", "ceb"):
                config = ltm.TrainConfig(bound=bound, batch_size=args.batch)
                steps[bound] = Objective(model, config, classes), make_optimizer(model, config)
            model.train()
            fill(model, classes)
            times: dict[str, list[float]] = {bound: [] for bound in steps}
            for number in range(args.rounds + 2):
                for bound in sorted(steps, reverse=number % 2 == 0):
                    times[bound].append(timed_step(model, *steps[bound], x, y))
            pairs = sorted(c / n for c, n in list(zip(times["ceb"], times["none"], strict=True))[2:])
            low, middle, high = interval(pairs)
            began = time.perf_counter()
            assert steps["ceb"][0].information.estimate()
            for module in model.modules():
                if isinstance(module, Statistics):
                    assert module.refresh()
            refresh = time.perf_counter() - began
            epoch = statistics.median(times["none"]) * args.epoch / args.batch
            print(
                f"{name}, {classes} classes: step ×{middle:.3f} ({low:.3f} to {high:.3f}, {len(pairs)} pairs) of "
                f"{statistics.median(times['none']) * 1e3:.0f} ms; refresh {refresh:.2f} s, "
                f"{refresh / epoch:.2%} of an epoch of {args.epoch} images; "
                f"{'within' if high <= LIMIT_STEP and refresh <= LIMIT_REFRESH * epoch else 'ABOVE'} the limits",
                flush=True,
            )


def interval(values: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Return the median between the ends of its 95 % bootstrap interval."""
    sample = torch.tensor(values)
    places = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    medians = sample[places].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, statistics.median(values), high


def fill(model: torch.nn.Module, classes: int) -> None:
    """Let all statistics be fitted and their memories full, as they are for all but the first steps."""
    for module in model.modules():
        if isinstance(module, Statistics):
            targets = torch.nn.functional.one_hot(torch.randint(classes, (module.capacity,)), classes).float()
            module.update(torch.randn(module.capacity, module.centroids.shape[1]), targets)


def timed_step(model, objective, optimizer, x, y) -> float:
    began = time.perf_counter()
    with objective.information.listening():
        loss = objective(model, x, y)["loss"]
        loss.backward()
        objective.learn()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
