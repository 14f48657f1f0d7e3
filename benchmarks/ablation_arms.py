"""The ablation's arms: what each converts by, how it is tuned, and what else is tried."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import ablation_base as base
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import learns
from ltm_retrofit.merging.statistics import Statistics

RATES = (3e-5, 1e-4, 3e-4)
CLUSTERS, PERPLEXITY = 64, 8.0
#: blocks that could merge, for the lines "plan"; the last one's patch tokens are dead, and sliced off
CHOICES = (
    *((0, 5), (1, 5), (0, 2, 5), (0, 3, 5), (1, 3, 4, 5), (0, 1, 3, 5)),
    *((0, 1, 2, 3, 5), (1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
)
BATCH = ltm.TrainConfig().batch_size


class Arm(NamedTuple):
    """A conversion method, the settings of the fine-tune (None: none at all), and whether it has all seeds."""

    method: str | None
    settings: dict[str, Any] | None = None
    all_seeds: bool = False
    #: changes to the masks before the fine-tune: ``eta`` (stays zero), ``clusters``, ``temperature``
    masks: Mapping[str, Any] = MappingProxyType({})
    #: learning rates that it chooses from
    rates: tuple[float, ...] = RATES


CE, CEB, IBB = ({"bound": kind} for kind in ("none", "ceb", "ibb"))
#: from logits and feature, on images mixed by CutMix, and without labels: the base knows its training labels by heart
DISTILL = {"distill": 1.0, "distill_token": 1.0, "cutmix": 1.0, "labels": False}
ARMS = {
    "original": Arm(None),
    "original, tuned": Arm(None, CE, True),
    "original, tuned, distillation": Arm(None, CE | DISTILL, True),
    "LTM, not tuned": Arm("ltm"),
    "LTM, CE": Arm("ltm", CE, True),
    "LTM, CE + IBB": Arm("ltm", IBB, True),
    "LTM, CE + CEB": Arm("ltm", CEB, True),
    "LTM, CE + CEB, no IB step": Arm("ltm", CEB, masks={"eta": False}),
    "LTM, distillation": Arm("ltm", CE | DISTILL, True),
    "LTM, distillation + CEB": Arm("ltm", CEB | DISTILL, True),
    "LTM, masks only, CE + CEB": Arm("ltm", CEB | {"train": "masks", "mask_lr": 30.0}),
    "ToMe, not tuned": Arm("tome"),
    "ToMe, CE": Arm("tome", CE, True),
    "ToMe, distillation": Arm("tome", CE | DISTILL, True),
    "average pooling, CE": Arm("pool", CE),
}
#: with what `TrainConfig` and the masks had before these were tried; ``mask_lr`` is in multiples of the rate
SLOW, SLOW_RATES = {"mask_lr": 1.0}, (1e-4, 3e-4, 1e-3)
ARMS |= {
    f"slow {name}": arm._replace(
        settings=None if arm.settings is None else arm.settings | SLOW, masks={"temperature": 0.05}, rates=SLOW_RATES
    )
    for name, arm in ARMS.items()
    if name in {"LTM, not tuned", *(f"LTM, {loss}" for loss in ("CE", "CE + IBB", "CE + CEB"))}
    or name.startswith("LTM, distillation")
}
#: what was tried → of which arm, and the settings or masks that it changes
TRIED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"γ = {gamma:g}": ("CE + CEB", {"gamma": gamma}, {}) for gamma in (0.0, 3.0)},
    **{f"λ = {weight:g}": ("CE + CEB", {"bound_weight": weight}, {}) for weight in (0.01, 0.3, 1.0)},
    **{f"β for a perplexity of {target:g}": ("CE + CEB", {"perplexity": target}, {}) for target in (2.0, 24.0)},
    **{f"{clusters} clusters": ("CE + CEB", {}, {"clusters": clusters}) for clusters in (16, 160)},
    "bound from the first step": ("CE + CEB", {"bound_warmup": 0.0}, {}),
    "masks at 30 times the rate": ("CE + CEB", {"mask_lr": 30.0}, {}),
    "no IB step": ("CE + CEB", {}, {"eta": False}),
    "masks only, at 30 times the rate": ("CE + CEB", {"train": "masks", "mask_lr": 30.0}, {}),
    "masks at 30 times the rate, distillation": ("distillation", {"mask_lr": 30.0}, {}),
    "with labels, distillation": ("distillation", {"labels": True}, {}),
    "of logits alone, distillation": ("distillation", {"distill_token": 0.0}, {}),
    "without CutMix, distillation": ("distillation", {"cutmix": 0.0}, {}),
    "a temperature of 0.01 to begin with, distillation": ("distillation", {}, {"temperature": 0.01}),
    "soft labels by mixup, CE": ("CE", {"mixup": 0.2}, {}),
    "soft labels by mixup, CE + CEB": ("CE + CEB", {"mixup": 0.2}, {}),
    "soft labels by CutMix, CE": ("CE", {"cutmix": 1.0}, {}),
    "soft labels by CutMix, CE + CEB": ("CE + CEB", {"cutmix": 1.0}, {}),
}
#: how fast masks learn, and where they begin
MASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"masks at {faster} times the rate, a temperature of {start:g} to begin with, distillation": (
        "distillation",
        {"mask_lr": float(faster)},
        {"temperature": start},
    )
    for faster, start in product((1, 10, 30, 100), (0.05, 0.02, 0.01))
}
VARIATIONS = {name: (f"slow LTM, {of}", *changes) for name, (of, *changes) in (TRIED | MASKS).items()}
#: what was tried of which arm by settings that are gone: the page still shows its runs, and no new ones can be made
GONE = {
    "bound at every site too": "slow LTM, CE + CEB",
    "gate": "slow LTM, CE + CEB",
    "gate, distillation": "slow LTM, distillation",
    "counts annealed over half the run, distillation": "slow LTM, distillation",
}
#: images that train, and what variations make do with
ALL, FEW = 50_000 - base.ASIDE, 11_250
#: what is run, in this order: share of the multiply-adds, epochs, images, arms or variations
PROGRAMME: tuple[tuple[float, int, int, tuple[str, ...]], ...] = (
    (1.0, 0, ALL, ("original",)),
    *((share, 0, ALL, ("slow LTM, not tuned", "LTM, not tuned", "ToMe, not tuned")) for share in (0.5, 0.65, 0.35)),
    *((1.0, epochs, ALL, ("original, tuned, distillation", "original, tuned")) for epochs in (1, 5)),
    (0.5, 1, ALL, ("ToMe, CE", "ToMe, distillation")),
    (0.5, 1, ALL, ("LTM, distillation", "LTM, CE", "LTM, CE + CEB")),
    (0.35, 1, ALL, ("LTM, distillation",)),
    (0.65, 1, ALL, ("LTM, distillation",)),
    (0.5, 1, ALL, ("LTM, distillation + CEB",)),
    (0.5, 1, ALL, ("average pooling, CE", "LTM, CE + IBB", "LTM, masks only, CE + CEB", "LTM, CE + CEB, no IB step")),
    # what made the masks fast, and what was tried before that
    (0.5, 1, ALL, tuple(MASKS)),
    *((share, 1, ALL, ("slow LTM, distillation",)) for share in (0.65, 0.5, 0.35)),
    (0.5, 1, ALL, ("slow LTM, CE", "slow LTM, CE + CEB", "slow LTM, CE + IBB", "slow LTM, distillation + CEB")),
    (0.5, 2, ALL, ("slow LTM, distillation",)),
    (0.5, 1, FEW, tuple(TRIED)),
    # a harder budget, and longer runs
    (0.35, 1, FEW, ("LTM, CE", "LTM, CE + CEB", "ToMe, CE", "LTM, distillation", "ToMe, distillation")),
    (0.35, 5, FEW, ("LTM, CE", "LTM, CE + CEB")),
    (0.5, 5, ALL, ("LTM, distillation",)),
    (0.35, 5, ALL, ("LTM, distillation",)),
)


def arm_of(name: str) -> Arm:
    """Return an arm, or what a variation makes of its arm."""
    if name in ARMS:
        return ARMS[name]
    of, settings, masks = VARIATIONS[name]
    arm = ARMS[of]
    return arm._replace(settings=(arm.settings or {}) | settings, masks=dict(arm.masks) | masks)


def convert(method: str | None, flops: float, blocks: tuple[int, ...]) -> nn.Module:
    """Return the base, converted to a share of its multiply-adds; pooling gets the counts of ``ltm``."""
    model = base.load()
    sites = tuple(f"blocks.{index}" for index in blocks)
    if method in ("ltm", "tome"):
        return ltm.retrofit(model, ltm.LTMConfig(flops=flops, method=method, sites=sites))
    if method == "pool":
        rows = [row for row in ltm.get_plan(convert("ltm", flops, blocks)).rows if row.action == "merge"]
        sites, counts = tuple(row.site for row in rows), tuple(row.tokens_out for row in rows)
        return ltm.retrofit(model, ltm.LTMConfig(tokens=counts, sites=sites, method="pool"))
    return model


def change(
    model: nn.Module,
    *,
    eta: bool = True,
    clusters: int = CLUSTERS,
    temperature: float | None = None,
) -> None:
    """Change the masks of a network before its fine-tune."""
    for module in list(model.modules()):
        if learns(module):
            module.eta.requires_grad_(eta)
            if temperature is not None:
                nn.init.constant_(module.log_scale, -math.log(temperature))
        for name, part in list(module.named_children()):
            if isinstance(part, Statistics) and clusters != CLUSTERS:
                (_, dim), classes = part.centroids.shape, part.counts.shape[1]
                setattr(module, name, Statistics(dim, classes, clusters))
