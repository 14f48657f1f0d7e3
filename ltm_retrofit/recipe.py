"""Strict YAML ↔ dataclasses, and the run of one recipe: load, convert, fine-tune, compare, measure, save."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import yaml
from torch import nn

from ltm_retrofit.config import LTMConfig, Strict, check_keys
from ltm_retrofit.convert import retrofit
from ltm_retrofit.converted.record import get_plan
from ltm_retrofit.converted.resizing import ask_size, present_example
from ltm_retrofit.errors import CheckpointError, DataError, RecipeError
from ltm_retrofit.finding.example import run
from ltm_retrofit.finding.proofs import all_equal
from ltm_retrofit.folders import OURS, check_ours, written_whole
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.reporting.pictures import show_merges
from ltm_retrofit.reporting.report import Report, measure
from ltm_retrofit.saving.load import find_model, from_pretrained
from ltm_retrofit.saving.save import save_pretrained
from ltm_retrofit.tuning.checkpoints import checkpoints_beside
from ltm_retrofit.tuning.classes import check_same_classes, classes_in, evaluate, set_classes
from ltm_retrofit.tuning.processes import is_main
from ltm_retrofit.tuning.settings import TrainConfig
from ltm_retrofit.tuning.sources import DataSection, load_split, load_validation
from ltm_retrofit.tuning.train import decide, finetune
from ltm_retrofit.undisturbed import undisturbed

#: lists the files of a run; marks a folder as ours
MARK = "run.json"


@dataclass(frozen=True)
class ModelSection(Strict):
    """Which model: the embedded ``digits_vit``, a folder, a timm name or a Hub id.

    ``image_size`` is the side of its images, or height and width; left out, the model and what came with it say it.
    """

    name: str = "digits_vit"
    image_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check both."""
        if not isinstance(self.name, str) or not self.name:
            raise RecipeError(f"name is a folder, a timm name or a Hub id, got {self.name!r}")
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if self.image_size is not None and not (len(sides) == 2 and all(type(s) is int and s > 0 for s in sides)):
            raise RecipeError(f"image_size is one side, or height and width, of 1 or more, got {self.image_size!r}")


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
        if not isinstance(values, Mapping):
            raise RecipeError(f"a recipe has the sections {', '.join(SECTIONS)}, got {type(values).__name__}")
        check_keys(values, SECTIONS, "recipe")
        sections: dict[str, Any] = {}
        for name, section in values.items():
            if not isinstance(section, Mapping):
                raise RecipeError(f"section {name!r} holds keys and values, got {section!r}")
            try:
                sections[name] = SECTIONS[name].from_dict(section)
            except RecipeError as error:
                raise RecipeError(f"section {name!r}: {error}") from None
        return cls(**sections)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a YAML file, by safe loading only."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict({} if values is None else values)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", "it is no UTF-8 text")
            raise RecipeError(f"cannot read the recipe {path}: {reason}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not YAML: {error}") from error
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, all defaults said."""
        return {name: getattr(self, name).to_dict() for name in SECTIONS}


SECTIONS: dict[str, type[Strict]] = {"model": ModelSection, "ltm": LTMConfig, "data": DataSection, "train": TrainConfig}


def sliced_config(plan: MergePlan) -> LTMConfig:
    """Return the config that slices to the same token counts at the same sites."""
    rows = [row for row in plan.rows if row.action == "merge"]
    tokens, sites = tuple(row.tokens_out for row in rows), tuple(row.site for row in rows)
    return LTMConfig(tokens=tokens, sites=sites, method="slice", output_tokens=plan.config.output_tokens)


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
    check_ours(out, MARK)
    kept = checkpoints_beside(out, resume)
    model, origin = find_model(recipe.model.name)
    say(f"model    {recipe.model.name}: {origin}")
    if (size := recipe.model.image_size) is not None:
        ask_size(model, size if isinstance(size, tuple) else (size, size))
    train, val, test = _prepare(model, recipe, say)
    original = copy.deepcopy(model)
    retrofit(model, recipe.ltm)
    plan = get_plan(model)
    say(f"plan     {len(plan.rows)} sites, {plan.macs / plan.macs_original:.1%} of the MACs\n{plan}")
    arms = {"original": original, "converted": copy.deepcopy(model), "finetuned": model}
    recipe = replace(recipe, train=decide(model, recipe.train, say))  # what is written says it, too
    others = not str(recipe.train.train).startswith("masks")  # what has no mask cannot be tuned in the same way
    say("tuning   the converted model" + "; then the original and a sliced one, each in the same way" * others)
    # resume: where there is something to
    tune = partial(finetune, train=train, val=val, config=recipe.train, resume=True, say=indented(say))
    history = tune(model, checkpoints_to=kept / "converted")
    say(f"         {history}")
    if others:
        arms["original_finetuned"] = control = copy.deepcopy(original)
        say("tuning   the original")
        tune(control, checkpoints_to=kept / "original")
    merges = any(row.action == "merge" for row in plan.rows)  # else the plan is the exact slice, which loses nothing
    if others and merges:
        arms["sliced_finetuned"] = sliced = retrofit(copy.deepcopy(original), sliced_config(plan))
        say("tuning   the sliced one")
        tune(sliced, checkpoints_to=kept / "sliced")
    say(f"testing  all {len(arms)} on {len(test)} test images, which nothing was chosen by")
    accuracies = {name: evaluate(arm, test) for name, arm in arms.items()}
    say("timing   original and converted, in alternation")
    report = measure(model).with_accuracy(**accuracies)
    report = replace(report, extra={"recipe": recipe.to_dict(), "history": history.to_dict(), "test_images": len(test)})
    if not is_main():  # of several processes, the first one writes
        return report
    pictures = [test[index]["image"] for index in range(min(4, len(test)))]
    report = _write(model, recipe, report, pictures, out)
    shutil.rmtree(kept, ignore_errors=True)
    same = report.extra["reloaded_equal"]
    say(f"\n{report}\n\nreloaded model gives the same logits: {'yes' if same else 'NO'}\nwritten to {out}/")
    if not same:
        raise CheckpointError(f"the model reloaded from {out / 'model'} gives other logits than the one saved")
    return report


def indented(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return what says a line as a part of the latest stage."""
    return lambda line: say(f"         {line}")


def _prepare(model: nn.Module, recipe: Recipe, say: Callable[[str], None]) -> tuple[Any, Any, Any]:
    """Read training, validation and test images, and give the model a classifier of their classes.

    Validation images are None where the data have none apart.
    """
    data = recipe.data
    train, test = load_split(data, data.train_split), load_split(data, data.test_split)
    val = load_validation(data)
    known = train if data.labelled and not data.streaming else test
    names = classes_in(known, "training" if known is train else "test")
    classes = names if isinstance(names, int) else len(names)
    check_same_classes(train, test)
    if val is not None:
        check_same_classes(val, test, "validation")
    many = "a stream of" if data.streaming else len(train)
    between = "" if val is None else f", {len(val)} validation"
    say(f"data     {data.name}: {many} training{between} and {len(test)} test images, {classes} classes")
    new = set_classes(model, names)
    if new == "by name":
        say(f"classes  {classes}, found by name: the pretrained classifier keeps their rows")
    elif new is not None:
        if not data.labelled:
            raise DataError(
                f"{recipe.model.name} has another number of classes than the data's {classes}, and without labels "
                "no new classifier can be learned: take a model that knows these classes, or labelled: true"
            )
        say(f"classes  {classes}: the pretrained classifier has another number, so a new one starts untrained")
    return train, val, test


def _write(model: nn.Module, recipe: Recipe, report: Report, pictures: list[Any], out: Path) -> Report:
    """Write a run's folder whole; return the report, which now says whether the saved model gives the same logits."""
    with written_whole(out, MARK) as folder:
        save_pretrained(model, folder / "model", report=report, recipe=recipe.to_dict())
        if str(recipe.train.train).startswith("masks"):
            save_pretrained(model, folder / "adapter", adapter=True, report=report, recipe=recipe.to_dict())
        example = present_example(model)
        with undisturbed(model):
            same = all_equal(run(from_pretrained(folder / "model"), example), run(model, example))
        report = replace(report, extra={**report.extra, "reloaded_equal": same})
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        (folder / "report.md").write_text(report.to_markdown(), encoding="utf-8")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        for index, picture in enumerate(pictures):
            show_merges(model, picture).savefig(folder / f"merges_{index}.png", dpi=100)
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        (folder / MARK).write_text(json.dumps({"written_by": OURS, "files": [*files, MARK]}, indent=2))
    return report
