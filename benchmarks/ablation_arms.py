"""The ablation's arms: what each converts by, how it is tuned, and what else is tried."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import ablation_base as base
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.merging.statistics import Statistics

RATES = (3e-5, 1e-4, 3e-4)
CLUSTERS, PERPLEXITY = 64, 8.0
BATCH = 64


class Arm(NamedTuple):
    """A conversion method, the settings of the fine-tune (None: none at all), and whether it has all seeds."""

    method: str | None
    settings: dict[str, Any] | None = None
    all_seeds: bool = False
    #: options of the conversion, and ``clusters`` of the statistics
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
    "LTM, CE + CEB, IB step": Arm("ltm", CEB, masks={"ib_step": True}),
    "LTM, distillation": Arm("ltm", CE | DISTILL, True),
    "LTM, distillation + CEB": Arm("ltm", CEB | DISTILL, True),
    "LTM, masks only, CE + CEB": Arm("ltm", CEB | {"train": "masks", "mask_lr": 30.0}),
    # as published: in every block
    "ToMe, not tuned": Arm("tome", masks={"schedule": "every"}),
    "ToMe, CE": Arm("tome", CE, True, masks={"schedule": "every"}),
    "ToMe, distillation": Arm("tome", CE | DISTILL, True, masks={"schedule": "every"}),
    "average pooling, CE": Arm("pool", CE),
}
#: what was tried → of which arm, and the settings or masks that it changes
TRIED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"γ = {gamma:g}": ("CE + CEB", {"gamma": gamma}, {}) for gamma in (0.0, 3.0)},
    **{f"λ = {weight:g}": ("CE + CEB", {"bound_weight": weight}, {}) for weight in (0.01, 0.3, 1.0)},
    **{f"β for a perplexity of {target:g}": ("CE + CEB", {"perplexity": target}, {}) for target in (2.0, 24.0)},
    **{f"{clusters} clusters": ("CE + CEB", {}, {"clusters": clusters}) for clusters in (16, 160)},
    "bound from the first step": ("CE + CEB", {"bound_warmup": 0.0}, {}),
    "masks that do not learn, distillation": ("distillation", {"mask_lr": 0.0}, {}),
    "masks at the rate of all else, distillation": ("distillation", {"mask_lr": 1.0}, {}),
    "with labels, distillation": ("distillation", {"labels": True}, {}),
    "of logits alone, distillation": ("distillation", {"distill_token": 0.0}, {}),
    "without CutMix, distillation": ("distillation", {"cutmix": 0.0}, {}),
    "soft labels by mixup, CE": ("CE", {"mixup": 0.2}, {}),
    "soft labels by mixup, CE + CEB": ("CE + CEB", {"mixup": 0.2}, {}),
    "soft labels by CutMix, CE": ("CE", {"cutmix": 1.0}, {}),
    "soft labels by CutMix, CE + CEB": ("CE + CEB", {"cutmix": 1.0}, {}),
}
VARIATIONS = {name: (f"LTM, {of}", *changes) for name, (of, *changes) in TRIED.items()}
#: images that train, and what variations make do with
ALL, FEW = 50_000 - base.ASIDE, 11_250
#: what is run, in this order: share of the multiply-adds, epochs, images, arms or variations
PROGRAMME: tuple[tuple[float, int, int, tuple[str, ...]], ...] = (
    (1.0, 0, ALL, ("original",)),
    *((share, 0, ALL, ("LTM, not tuned", "ToMe, not tuned")) for share in (0.5, 0.65, 0.35)),
    *((1.0, epochs, ALL, ("original, tuned, distillation", "original, tuned")) for epochs in (1, 5)),
    (0.5, 1, ALL, ("ToMe, CE", "ToMe, distillation")),
    (0.5, 1, ALL, ("LTM, distillation", "LTM, CE", "LTM, CE + CEB")),
    (0.35, 1, ALL, ("LTM, distillation",)),
    (0.65, 1, ALL, ("LTM, distillation",)),
    (0.5, 1, ALL, ("LTM, distillation + CEB",)),
    (0.5, 1, ALL, ("average pooling, CE", "LTM, CE + IBB", "LTM, masks only, CE + CEB", "LTM, CE + CEB, IB step")),
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


def convert(method: str | None, flops: float, options: Mapping[str, Any]) -> nn.Module:
    """Return the base, converted to a share of its multiply-adds; pooling gets the counts of ``ltm``."""
    model = base.load()
    asked = {name: value for name, value in options.items() if name != "clusters"}
    if method in ("ltm", "tome"):
        ltm.retrofit(model, ltm.LTMConfig(flops=flops, method=method, **asked))
    if method == "pool":
        rows = [row for row in ltm.get_plan(convert("ltm", flops, {})).rows if row.action == "merge"]
        sites, counts = tuple(row.site for row in rows), tuple(row.tokens_out for row in rows)
        ltm.retrofit(model, ltm.LTMConfig(tokens=counts, sites=sites, method="pool"))
    for module in list(model.modules()) if "clusters" in options else []:
        for name, part in list(module.named_children()):
            if isinstance(part, Statistics):
                (_, dim), classes = part.centroids.shape, part.counts.shape[1]
                setattr(module, name, Statistics(dim, classes, options["clusters"]))
    return model
