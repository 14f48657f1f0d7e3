"""Strict YAML ↔ dataclasses, and the run of one recipe: load, convert, fine-tune, compare, measure, save."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import yaml
from torch import nn

from ltm_retrofit.config import LTMConfig, Strict, check_keys
from ltm_retrofit.convert import get_plan, retrofit
from ltm_retrofit.errors import CheckpointError, DataError, RecipeError
from ltm_retrofit.finding.example import prepare_example, run
from ltm_retrofit.finding.proofs import all_equal
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.reporting.pictures import show_merges
from ltm_retrofit.reporting.report import Report, measure
from ltm_retrofit.saving.hub import from_pretrained, save_pretrained, swap
from ltm_retrofit.saving.load import load_model
from ltm_retrofit.tuning.checkpoints import checkpoints_beside
from ltm_retrofit.tuning.classes import check_same_classes, classes_in, evaluate, set_classes
from ltm_retrofit.tuning.processes import is_main
from ltm_retrofit.tuning.settings import TrainConfig
from ltm_retrofit.tuning.sources import DataSection, load_split
from ltm_retrofit.tuning.train import finetune
from ltm_retrofit.undisturbed import undisturbed

#: lists the files of a run; marks a folder as ours
MARK = "run.json"


@dataclass(frozen=True)
class ModelSection(Strict):
    """Which model: the embedded ``digits_vit``, a folder, a timm name or a Hub id."""

    name: str = "digits_vit"

    def __post_init__(self) -> None:
        """Check the name's type."""
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"name is a folder, a timm name or a Hub id, got {self.name!r}")


@dataclass(frozen=True)
class Recipe:
    """The four sections."""

    model: ModelSection = field(default_factory=ModelSection)
    ltm: LTMConfig = field(default_factory=lambda: LTMConfig(flops=0.7))
    data: DataSection = field(default_factory=DataSection)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from nested mappings; unknown sections and keys are `RecipeError`s that suggest the nearest one."""
        kinds: dict[str, type[Strict]] = {
            "model": ModelSection,
            "ltm": LTMConfig,
            "data": DataSection,
            "train": TrainConfig,
        }
        if not isinstance(values, Mapping):
            raise RecipeError(f"a recipe has the sections {', '.join(kinds)}, got {type(values).__name__}")
        check_keys(values, kinds, "recipe")
        sections: dict[str, Any] = {}
        for name, section in values.items():
            if not isinstance(section, Mapping):
                raise RecipeError(f"section {name!r} holds keys and values, got {section!r}")
            try:
                sections[name] = kinds[name].from_dict(section)
            except RecipeError as error:
                raise RecipeError(f"section {name!r}: {error}") from None
        return cls(**sections)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a YAML file, by safe loading only."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = yaml.safe_load(text)
        except OSError as error:
            raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"cannot read the recipe {path}: it is no UTF-8 text") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not YAML: {error}") from error
        try:
            return cls.from_dict({} if values is None else values)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, all defaults said."""
        return {name: getattr(self, name).to_dict() for name in ("model", "ltm", "data", "train")}


def sliced_config(plan: MergePlan) -> LTMConfig:
    """Return the config that slices to the same token counts at the same sites."""
    rows = [row for row in plan.rows if row.action == "merge"]
    return LTMConfig(
        tokens=tuple(row.tokens_out for row in rows),
        sites=tuple(row.site for row in rows),
        method="slice",
        output_tokens=plan.config.output_tokens,
    )


def run_recipe(recipe: Recipe, out: str | Path, *, say: Callable[[str], None] = print, resume: bool = False) -> Report:
    """Carry out a recipe and write model, report and pictures to ``out``.

    Args:
        recipe: what to do.
        out: a folder that does not exist, is empty, or was written by an earlier run.
        say: receives one line for each stage.
        resume: go on where an earlier run to ``out`` was interrupted; its checkpoints lie beside ``out``.

    Raises:
        CheckpointError: the folder cannot be written, or holds files that no run wrote.
    """
    out = Path(out).resolve()
    check_folder(out)
    kept = checkpoints_beside(out, resume)
    loaded = load_model(recipe.model.name)
    model = loaded.model
    say(f"model    {recipe.model.name}: {loaded.origin}")
    train, test = (load_split(recipe.data, split) for split in (recipe.data.train_split, recipe.data.test_split))
    known = train if recipe.data.labelled and not recipe.data.streaming else test
    names = classes_in(known, "training" if known is train else "test")
    classes = names if isinstance(names, int) else len(names)
    check_same_classes(train, test)
    many = "a stream of" if recipe.data.streaming else len(train)
    say(f"data     {recipe.data.name}: {many} training and {len(test)} test images, {classes} classes")
    head = set_classes(model, names)
    if head == "by name":
        say(f"head     the pretrained one's rows for these {classes} classes, found by name")
    elif head is not None:
        if not recipe.data.labelled:
            raise DataError(
                f"{recipe.model.name} has another number of classes than the data's {classes}, and without labels "
                "no new head can be learned: take a model that knows these classes, or labelled: true"
            )
        say(f"head     new, for {classes} classes: the pretrained one has another number, so it starts untrained")
    original = copy.deepcopy(model)

    accuracies = {"original": evaluate(model, test)}
    retrofit(model, recipe.ltm)
    plan = get_plan(model)
    say(f"plan     {len(plan.rows)} sites, {plan.macs / plan.macs_original:.1%} of the MACs\n{plan}")
    accuracies["converted"] = evaluate(model, test)
    others = not recipe.train.train.startswith("masks")  # what has no mask cannot be tuned in the same way
    say("tuning   the converted model" + ", the original and a sliced one, each in the same way" * others)
    tune = partial(finetune, train=train, config=recipe.train, resume=True)  # where there is something to resume
    history = tune(model, checkpoints_to=kept / "converted")
    say(f"         {history}")
    accuracies["finetuned"] = evaluate(model, test)
    if others:
        control = copy.deepcopy(original)
        tune(control, checkpoints_to=kept / "original")
        accuracies["original_finetuned"] = evaluate(control, test)
    merges = any(row.action == "merge" for row in plan.rows)  # else the plan is the exact slice, which loses nothing
    if others and merges:
        sliced = retrofit(copy.deepcopy(original), sliced_config(plan))
        tune(sliced, checkpoints_to=kept / "sliced")
        accuracies["sliced_finetuned"] = evaluate(sliced, test)
    say("timing   original and converted, in alternation")
    report = measure(model).with_accuracy(**accuracies)
    report = replace(report, extra={"recipe": recipe.to_dict(), "history": history.to_dict(), "test_images": len(test)})
    if not is_main():  # of several processes, the first one writes
        return report
    with _WrittenWhole(out) as folder:
        save_pretrained(model, folder / "model", report=report, recipe=recipe.to_dict())
        if not others:
            save_pretrained(model, folder / "adapter", adapter=True, report=report, recipe=recipe.to_dict())
        same = _reloads_equal(model, folder / "model")
        report = replace(report, extra={**report.extra, "reloaded_equal": same})
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        for index in range(min(4, len(test))):
            show_merges(model, test[index]["image"]).savefig(folder / f"merges_{index}.png", dpi=100)
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        (folder / MARK).write_text(json.dumps({"written_by": "ltm_retrofit", "files": [*files, MARK]}, indent=2))
    shutil.rmtree(kept, ignore_errors=True)
    say(f"\n{report}\n\nreloaded model gives the same logits: {'yes' if same else 'NO'}\nwritten to {out}/")
    if not same:
        raise CheckpointError(f"the model reloaded from {out / 'model'} gives other logits than the one saved")
    return report


def _reloads_equal(model: nn.Module, folder: Path) -> bool:
    example = prepare_example(model, None)
    with undisturbed(model):
        return all_equal(run(from_pretrained(folder), example), run(model, example))


def check_folder(out: Path) -> None:
    """Check before any work that a run may write here.

    Raises:
        CheckpointError: naming what is in the way.
    """
    parent = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"cannot write to {out}: {parent} is not a folder that can be written")
    entries = list(out.rglob("*")) if out.exists() else []
    present = {  # links, and folders that hold nothing, are somebody's too
        str(entry.relative_to(out))
        for entry in entries
        if entry.is_symlink() or not entry.is_dir() or not any(entry.iterdir())
    }
    if not present:
        return
    try:
        ours = set(json.loads((out / MARK).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if foreign := sorted(present - ours):
        raise CheckpointError(
            f"{out} holds files that no run of ltm-retrofit wrote: {', '.join(foreign[:5])}: choose another --out, or "
            "move them away"
        )


class _WrittenWhole:
    """A temporary folder that takes the place of ``out`` when everything was written, and vanishes otherwise."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.absolute().parent))
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        self.temporary.chmod(0o755)
        if self.out.exists():
            check_folder(self.out)
        swap(self.temporary, self.out)
