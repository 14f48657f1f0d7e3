"""Retrofit pretrained vision transformers with learnable token merging.

>>> import timm
>>> import ltm_retrofit as ltm
>>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4)
>>> model = ltm.retrofit(model, ltm.LTMConfig(flops=0.7))

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if (
    TYPE_CHECKING
):  # what type checkers read instead of `_HOMES`; "as" says that a name is meant to be imported from here
    from ltm_retrofit.config import LTMConfig as LTMConfig
    from ltm_retrofit.convert import disabled as disabled
    from ltm_retrofit.convert import get_plan as get_plan
    from ltm_retrofit.convert import is_retrofitted as is_retrofitted
    from ltm_retrofit.convert import restore as restore
    from ltm_retrofit.convert import retrofit as retrofit
    from ltm_retrofit.errors import AlreadyRetrofitted as AlreadyRetrofitted
    from ltm_retrofit.errors import BaseMismatch as BaseMismatch
    from ltm_retrofit.errors import BudgetError as BudgetError
    from ltm_retrofit.errors import CheckpointError as CheckpointError
    from ltm_retrofit.errors import CountError as CountError
    from ltm_retrofit.errors import DataError as DataError
    from ltm_retrofit.errors import ExampleError as ExampleError
    from ltm_retrofit.errors import NoAttentionError as NoAttentionError
    from ltm_retrofit.errors import NotRetrofitted as NotRetrofitted
    from ltm_retrofit.errors import RecipeError as RecipeError
    from ltm_retrofit.errors import RetrofitError as RetrofitError
    from ltm_retrofit.errors import TrainingError as TrainingError
    from ltm_retrofit.errors import UnsupportedBlock as UnsupportedBlock
    from ltm_retrofit.find import find_sites as find_sites
    from ltm_retrofit.plan import MergePlan as MergePlan
    from ltm_retrofit.plan import make_plan as make_plan
    from ltm_retrofit.reporting.pictures import show_merges as show_merges
    from ltm_retrofit.reporting.report import Report as Report
    from ltm_retrofit.reporting.report import measure as measure
    from ltm_retrofit.saving.load import from_pretrained as from_pretrained
    from ltm_retrofit.saving.load import load_model as load_model
    from ltm_retrofit.saving.save import save_pretrained as save_pretrained
    from ltm_retrofit.tracing import MergeTrace as MergeTrace
    from ltm_retrofit.tracing import bound_loss as bound_loss
    from ltm_retrofit.tracing import trace as trace
    from ltm_retrofit.tuning.history import History as History
    from ltm_retrofit.tuning.settings import TrainConfig as TrainConfig
    from ltm_retrofit.tuning.train import finetune as finetune

__version__ = version("ltm-retrofit")

_ROOMS = {
    "config": "LTMConfig",
    "convert": "disabled get_plan is_retrofitted restore retrofit",
    "errors": "AlreadyRetrofitted BaseMismatch BudgetError CheckpointError CountError DataError ExampleError "
    "NoAttentionError NotRetrofitted RecipeError RetrofitError TrainingError UnsupportedBlock",
    "find": "find_sites",
    "plan": "MergePlan make_plan",
    "reporting.pictures": "show_merges",
    "reporting.report": "Report measure",
    "saving.load": "from_pretrained load_model",
    "saving.save": "save_pretrained",
    "tracing": "MergeTrace bound_loss trace",
    "tuning.history": "History",
    "tuning.settings": "TrainConfig",
    "tuning.train": "finetune",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Show the public names."""
    return sorted(__all__)
