"""Strict YAML ↔ dataclasses, and the run of one recipe: load, convert, fine-tune, compare, measure, save."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import yaml
from torch import nn

from ltm_retrofit.config import LTMConfig, Strict, check_keys
from ltm_retrofit.convert import restore, retrofit
from ltm_retrofit.converted.record import get_plan, is_retrofitted, was_finetuned
from ltm_retrofit.converted.resizing import ask_size, present_example
from ltm_retrofit.errors import AlreadyRetrofitted, CheckpointError, DataError, RecipeError
from ltm_retrofit.finding.example import run
from ltm_retrofit.finding.proofs import all_equal
from ltm_retrofit.folders import OURS, check_ours, written_whole
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.reporting.pictures import show_merges
from ltm_retrofit.reporting.report import Report, measure
from ltm_retrofit.saving.load import find_model, from_pretrained
from ltm_retrofit.saving.save import rewrite_card, save_pretrained
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
    if is_retrofitted(model):
        raise AlreadyRetrofitted(
            f"{recipe.model.name} is converted already, to ×{get_plan(model).share:.2f} of its MACs, and a run "
            "converts by itself: give the checkpoint that it was made from"
        )
    train, val, test = _prepare(model, recipe, say)
    retrofit(model, recipe.ltm)
    plan, converted = get_plan(model), copy.deepcopy(model)
    say(f"plan     {len(plan.rows)} sites, {plan.macs / plan.macs_original:.1%} of the MACs\n{plan}")
    recipe = replace(recipe, train=decide(model, recipe.train, train, say))  # what is written says it, too
    others = not str(recipe.train.train).startswith("masks")  # what has no mask cannot be tuned in the same way
    say("tuning   the converted model")
    # resume: where there is something to
    tune = partial(finetune, train=train, val=val, config=recipe.train, resume=True, say=indented(say))
    history = tune(model, checkpoints_to=kept / "converted")
    say(f"         {history}")
    if is_main():  # of several processes, the first one writes
        same = _write_model(model, recipe, out)
        say(f"written  {out}/model, before anything is measured")
        if not same:
            raise CheckpointError(f"the model reloaded from {out / 'model'} gives other logits than the one saved")
    arms: dict[str, nn.Module] = {}
    if others:
        say("tuning   the original, in the same way: to compare with")
        arms["original_finetuned"] = control = restore(copy.deepcopy(converted))
        tune(control, checkpoints_to=kept / "original")
    merges = any(row.action == "merge" for row in plan.rows)  # else the plan is the exact slice, which loses nothing
    if others and merges:
        say("tuning   a sliced one, in the same way")
        arms["sliced_finetuned"] = sliced = retrofit(restore(copy.deepcopy(converted)), sliced_config(plan))
        tune(sliced, checkpoints_to=kept / "sliced")
    say(f"testing  all on {len(test)} test images, which nothing was chosen by; original and converted in alternation")
    called = f"{recipe.data.test_split} of {recipe.data.name}"
    before = converted if was_finetuned(model) else None  # an untouched model is the converted one
    report = measure(model, data=test, original=before, split=called, say=indented(say))
    report = report.with_accuracy(**{name: evaluate(arm, test) for name, arm in arms.items()})
    extra = {"recipe": recipe.to_dict(), "history": history.to_dict(), "test_images": len(test), "reloaded_equal": True}
    report = replace(report, extra=extra)
    if not is_main():
        return report
    _write_report(model, recipe, report, [test[index]["image"] for index in range(min(4, len(test)))], out)
    shutil.rmtree(kept, ignore_errors=True)
    say(f"\n{report}\n\nreloaded model gives the same logits: yes\nwritten to {out}/ (see report.html)")
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


def _write_model(model: nn.Module, recipe: Recipe, out: Path) -> bool:
    """Write a run's folder with its model; return whether that gives the same logits when it is loaded again."""
    with written_whole(out, MARK) as folder:
        save_pretrained(model, folder / "model", recipe=recipe.to_dict())
        if str(recipe.train.train).startswith("masks"):
            save_pretrained(model, folder / "adapter", adapter=True, recipe=recipe.to_dict())
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        _list_files(folder)
    example = present_example(model)
    with undisturbed(model):
        return all_equal(run(from_pretrained(out / "model"), example), run(model, example))


def _write_report(model: nn.Module, recipe: Recipe, report: Report, pictures: list[Any], out: Path) -> None:
    """Write what was measured beside the model that is there: all of it, or nothing."""
    with written_whole(out, MARK) as folder:
        shutil.copytree(out, folder, copy_function=_linked, dirs_exist_ok=True)
        report.write(folder)
        for saved in ("model", "adapter"):
            if (folder / saved).is_dir():
                rewrite_card(folder / saved, report, recipe.to_dict())
        for index, picture in enumerate(pictures):
            show_merges(model, picture).savefig(folder / f"merges_{index}.png", dpi=100)
        _list_files(folder)


def _linked(source: str, target: str) -> None:
    """Give a file a second name, for weights may be large; copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _list_files(folder: Path) -> None:
    """Write the list by which a folder is known as ours."""
    files = sorted({str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} | {MARK})
    (folder / MARK).unlink(missing_ok=True)  # a link to the one before, which stays as it is
    (folder / MARK).write_text(json.dumps({"written_by": OURS, "files": files}, indent=2))
