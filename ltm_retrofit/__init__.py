"""Retrofit pretrained vision transformers with learnable token merging.

>>> import ltm_retrofit as ltm
>>> model = ltm.retrofit(model, ltm.LTMConfig(flops=0.7))

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ltm_retrofit.config import LTMConfig
from ltm_retrofit.errors import (
    AlreadyRetrofitted,
    BaseMismatch,
    BudgetError,
    CheckpointError,
    CountError,
    DataError,
    ExampleError,
    NoAttentionError,
    NotRetrofitted,
    RecipeError,
    RetrofitError,
    TrainingError,
    UnsupportedBlock,
)

if TYPE_CHECKING:
    from ltm_retrofit.convert import disabled, get_plan, is_retrofitted, restore, retrofit
    from ltm_retrofit.find import find_sites
    from ltm_retrofit.plan import MergePlan, make_plan
    from ltm_retrofit.reporting.pictures import show_merges
    from ltm_retrofit.reporting.report import Report, measure
    from ltm_retrofit.saving.hub import from_pretrained, save_pretrained
    from ltm_retrofit.tracing import MergeTrace, bound_loss, trace
    from ltm_retrofit.tuning.classes import evaluate
    from ltm_retrofit.tuning.loop import History
    from ltm_retrofit.tuning.settings import TrainConfig
    from ltm_retrofit.tuning.sources import load_digits
    from ltm_retrofit.tuning.train import finetune

__version__ = version("ltm-retrofit")

_HOMES = {
    "find": ("find_sites",),
    "plan": ("MergePlan", "make_plan"),
    "convert": ("disabled", "get_plan", "is_retrofitted", "restore", "retrofit"),
    "tracing": ("MergeTrace", "bound_loss", "trace"),
    "tuning.classes": ("evaluate",),
    "tuning.loop": ("History",),
    "tuning.settings": ("TrainConfig",),
    "tuning.sources": ("load_digits",),
    "tuning.train": ("finetune",),
    "reporting.report": ("Report", "measure"),
    "reporting.pictures": ("show_merges",),
    "saving.hub": ("from_pretrained", "save_pretrained"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AlreadyRetrofitted",
    "BaseMismatch",
    "BudgetError",
    "CheckpointError",
    "CountError",
    "DataError",
    "ExampleError",
    "History",
    "LTMConfig",
    "MergePlan",
    "MergeTrace",
    "NoAttentionError",
    "NotRetrofitted",
    "RecipeError",
    "Report",
    "RetrofitError",
    "TrainConfig",
    "TrainingError",
    "UnsupportedBlock",
    "__version__",
    "bound_loss",
    "disabled",
    "evaluate",
    "find_sites",
    "finetune",
    "from_pretrained",
    "get_plan",
    "is_retrofitted",
    "load_digits",
    "make_plan",
    "measure",
    "restore",
    "retrofit",
    "save_pretrained",
    "show_merges",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Show the public names."""
    return sorted(__all__)
