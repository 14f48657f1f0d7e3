"""The command line. Everything heavy is imported when a command runs, so that ``--help`` answers at once.

Over 400 lines: each command's options stand beside what it does with them, and beside how messages are put in them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ltm_retrofit.config import OUTPUT_TOKENS, SCHEDULES, LTMConfig
from ltm_retrofit.errors import AlreadyRetrofitted, NotRetrofitted, RecipeError, RetrofitError
from ltm_retrofit.folders import OURS, check_ours, checkpoints_of, written_whole
from ltm_retrofit.merging.methods import Scope, method_names

EXAMPLES = {
    "inspect": "ltm-retrofit inspect vit_small_patch16_224\n  ltm-retrofit inspect ./my_checkpoint --json",
    "convert": "ltm-retrofit convert digits_vit --flops 0.7 --out runs/converted\n"
    "  ltm-retrofit convert ./my_checkpoint --tokens 138 97 68 --method tome --out runs/tome",
    "plan": "ltm-retrofit plan ./my_checkpoint --flops 0.5 --calibrate ./photos --out plan.yaml\n"
    "  ltm-retrofit plan ./my_checkpoint --plan plan.yaml --against other.yaml",
    "finetune": "ltm-retrofit finetune runs/converted --data digits --epochs 1 --out runs/tuned\n"
    "  ltm-retrofit finetune runs/converted --data digits --epochs 1 --out runs/tuned --resume",
    "report": "ltm-retrofit report runs/tuned --data digits\n"
    "  ltm-retrofit report runs/tuned --data ./photos --original ./my_checkpoint --batches 1 8",
    "compare": "ltm-retrofit compare ./my_checkpoint --data ./photos --budgets 0.8 0.65 0.5 --methods ltm tome\n"
    "  ltm-retrofit compare ./my_checkpoint --data ./photos --budgets 0.5 --calibrate ./unlabelled",
    "export": "ltm-retrofit export runs/tuned --onnx served --data ./photos\n"
    "  ltm-retrofit export runs/tuned --openvino served_by_openvino",
    "predict": "ltm-retrofit predict runs/converted photo.jpg\n"
    "  ltm-retrofit predict runs/converted ./photos --top 3 --picture merges.png",
    "run": "ltm-retrofit run recipes/quickstart.yaml\n"
    "  ltm-retrofit run recipes/quickstart.yaml --model ./my_checkpoint --out runs/mine",
}
MODEL = "a folder, digits_vit (embedded), a timm name, or a Hub id, tried in this order"
IMAGE_SIZE = "side of the images, or height and width (default: what the image processor makes, else the model's own)"
RESUME = "go on where an earlier run to the same folder was interrupted"
DATA = "digits (embedded), a folder (parquet files or class folders), or a Hub id"


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    top = argparse.ArgumentParser(
        prog="ltm-retrofit",
        description="Retrofit pretrained vision transformers with learnable token merging.",
        epilog="examples:\n  " + "\n  ".join(EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        epilog, raw = "examples:\n  " + EXAMPLES[name], argparse.RawDescriptionHelpFormatter
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=raw)
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return sub

    def sized(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--image-size", type=int, nargs="+", metavar="N", help=IMAGE_SIZE)

    uncalibrated = [name for name in SCHEDULES if name != "calibrated"]

    def calibrated(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--calibrate", metavar="FOLDER", help="choose by what merging does to images in this folder")
        sub.add_argument("--images", type=int, default=32, help="how many of them (default 32; 16 to 64 are usual)")

    def written(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--out", type=Path, required=True, help="folder to write")
        sub.add_argument("--overwrite", action="store_true", help="replace a folder that this tool wrote")

    sub = command("inspect", "Show where a model attends, which blocks can be cut, and why others are left out.")
    sub.add_argument("model", help=MODEL)
    sized(sub)

    def budgeted(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("model", help=MODEL)
        sized(sub)
        budget = sub.add_mutually_exclusive_group()
        budget.add_argument("--flops", type=float, help="share of the model's MACs to keep (default 0.7)")
        budget.add_argument("--latency", type=float, help="share of its time to keep, measured here")
        budget.add_argument("--tokens", type=int, nargs="+", help="token counts after each site, prefix included")
        budget.add_argument("--plan", type=Path, help="a plan, edited or not: what `plan --out` or --json wrote")
        sub.add_argument("--latency-batch", type=int, metavar="N", help="images at once for --latency (default 8)")
        calibrated(sub)
        sub.add_argument("--method", choices=method_names(), help=f"default {LTMConfig.method}")
        sub.add_argument("--schedule", choices=uncalibrated, help=f"default {LTMConfig.schedule}")
        sub.add_argument("--sites", nargs="+", help="blocks to choose from, instead of the schedule")
        sub.add_argument("--scope", choices=[scope.value for scope in Scope], help="default: the best that is proven")
        sub.add_argument("--output-tokens", choices=OUTPUT_TOKENS, help=f"default {LTMConfig.output_tokens}")
        sub.add_argument("--rounds", type=int, help="in how many rounds tokens leave at a site (default: the method's)")
        sub.add_argument(
            "--ib-step", action="store_const", const=True, help="masks weigh tokens by a step of the bound"
        )

    sub = command("plan", "Show what a conversion would merge and cost; write it down, compare it. Converts nothing.")
    budgeted(sub)
    sub.add_argument("--against", type=Path, help="another plan: say in what the two differ")
    sub.add_argument("--out", type=Path, help="file to write, .yaml or .json: edit it, then `convert --plan` it")

    sub = command("convert", "Insert masks, initialised from the pretrained weights, and save the model.")
    budgeted(sub)
    written(sub)

    sub = command("finetune", "Fine-tune a converted model with the information-bottleneck bound.")
    sub.add_argument("model", help="a folder that convert or run wrote")
    sub.add_argument("--data", required=True, help=DATA)
    written(sub)
    sub.add_argument("--epochs", type=int, help="left out, 1 to 4: more where there are fewer than 1600 images")
    sub.add_argument("--lr", type=float, help="highest rate; left out, what suits model and data, and it is said")
    sub.add_argument("--batch-size", type=int, help="images in a step; left out, 16 to 64 by how many there are")
    sub.add_argument("--bound", choices=("ceb", "ibb", "none"), help="which bound joins the loss (default ceb)")
    sub.add_argument("--bound-weight", type=float, help="its weight")
    sub.add_argument("--distill", type=float, help="weight of distillation from the unconverted model")
    sub.add_argument("--train", choices=("all", "masks", "masks+norms", "lora"), help="what learns (default all)")
    sub.add_argument("--seed", type=int)
    sub.add_argument("--workers", type=int, help="of the data loader (default 0)")
    sub.add_argument("--checkpoint-every", type=int, help="steps between two checkpoints (default 500)")
    sub.add_argument("--resume", action="store_true", help=RESUME)

    sub = command("report", "Measure MACs, latency, memory and, with --data, what the versions of a model recognise.")
    sub.add_argument("model", help=MODEL)
    sized(sub)
    sub.add_argument("--data", help=DATA)
    sub.add_argument("--split", default="test", help="of the data (default test)")
    sub.add_argument("--original", help="what a tuned model was before, where its folder does not say where that is")
    sub.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes to time (default 1 8 32)")
    sub.add_argument("--seconds", type=float, default=60.0, help="the most that timing may take (default 60)")
    sub.add_argument("--out", type=Path, help="folder for report.html, .json and .md (default: the model's, -report)")

    sub = command("compare", "Convert in several ways and measure each: accuracy against MACs and time. Tunes nothing.")
    sub.add_argument("model", help=MODEL)
    sized(sub)
    sub.add_argument("--data", required=True, help=DATA)
    sub.add_argument("--split", default="test", help="of the data (default test)")
    sub.add_argument("--limit", type=int, help="look at so many images of it (default: all)")
    sub.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="shares of the MACs to keep")
    sub.add_argument("--methods", nargs="+", choices=method_names(), default=["ltm", "tome"], help="default: ltm tome")
    sub.add_argument("--schedules", nargs="+", choices=uncalibrated, default=[LTMConfig.schedule], help="default: auto")
    calibrated(sub)
    sub.add_argument("--batch", type=int, default=8, help="images in a timed pass (default 8)")
    sub.add_argument("--out", type=Path, help="folder for compare.png, .json and .md (default: runs/MODEL-compare)")

    sub = command("export", "Write a model for ONNX Runtime, OpenVINO or torch.export, check and time it there.")
    sub.add_argument("model", help=MODEL)
    sized(sub)
    kinds = sub.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--onnx", type=Path, metavar="OUT", help="folder to write model.onnx into")
    kinds.add_argument("--openvino", type=Path, metavar="OUT", help="folder to write openvino_model.xml into")
    kinds.add_argument("--torch", type=Path, metavar="OUT", help="folder to write model.pt2 into, by torch.export")
    sub.add_argument("--int8", action="store_true", help="of --onnx: products with weights in 8 bits")
    sub.add_argument("--data", metavar="FOLDER", help="images to check it on, beside random ones; no labels are needed")
    sub.add_argument("--images", type=int, default=32, help="how many of them (default 32)")
    sub.add_argument("--seconds", type=float, default=20.0, help="the most that timing may take (default 20; 0: none)")
    sub.add_argument("--overwrite", action="store_true", help="replace a folder that this command wrote")

    sub = command("predict", "Say which classes a converted model sees in images, before merging and after; draw it.")
    sub.add_argument("model", help="a folder that convert, finetune or run wrote, or a Hub id")
    sub.add_argument("image", nargs="+", help="an image, or a folder with images in it, at any depth")
    sub.add_argument("--top", type=int, default=5, help="how many classes of each image (default 5)")
    sub.add_argument("--picture", type=Path, metavar="FILE", help="draw what merges, all images in one file (.png)")
    sub.add_argument(
        "--highlight", type=int, nargs=2, metavar=("X", "Y"), help="in the picture: only what is one token with a pixel"
    )

    sub = command("run", "Carry out a recipe: convert, fine-tune, compare, measure, save.")
    sub.add_argument("recipe", type=Path, help="a YAML file, such as recipes/quickstart.yaml")
    sub.add_argument("--model", help=f"instead of the recipe's: {MODEL}")
    sized(sub)
    sub.add_argument("--data", help=f"instead of the recipe's: {DATA}")
    sub.add_argument("--out", type=Path, help="folder to write (default runs/NAME_OF_THE_RECIPE)")
    sub.add_argument("--resume", action="store_true", help=RESUME)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, 2 where the input was at fault, 130 where it was interrupted."""
    arguments = parser().parse_args(argv)
    with warnings.catch_warnings():
        _be_quiet(arguments)
        try:
            COMMANDS[arguments.command](arguments)
        except RetrofitError as error:
            text = _in_options(str(error), arguments)
            if arguments.json:
                print(json.dumps({"error": type(error).__name__, "message": text}))
            print(f"{type(error).__name__}: {text}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            if argv is None:  # this process ends here; a second one would show what some library does at the end
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            print(f"\nInterrupted. {_how_to_go_on(arguments, sys.argv[1:] if argv is None else argv)}", file=sys.stderr)
            return 130
    return 0


def _be_quiet(arguments: argparse.Namespace) -> None:
    """Keep other libraries' progress bars and warnings out of our output; say ours in a line."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(torch|timm|transformers|accelerate|datasets)(\..*)?")
    logging.getLogger("accelerate").setLevel(logging.ERROR)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"Warning: {_in_options(str(message), arguments)}", file=sys.stderr, flush=True)

    warnings.showwarning = show


def _in_options(text: str, arguments: argparse.Namespace) -> str:
    """Put a message in the words of the command line: ``flops=0.1`` is ``--flops 0.1`` there."""
    options = "|".join(name for name in vars(arguments) if name not in ("command", "model", "recipe", "image"))
    text = re.sub(rf"\b(?:TrainConfig\.|LTMConfig\.)?({options})=(?:True\b)?", r"--\1 ", text)
    text = re.sub(rf"\bTrainConfig\.({options})\b", r"--\1", text)
    text = re.sub(r"\bTrainConfig\.(\w+)", r"\1 in the train section of a recipe", text)
    text = re.sub(r"--(\w+)", lambda found: found[0].replace("_", "-"), text)
    # as they are typed: 60 30 instead of (60, 30)
    text = re.sub(r"(--[\w-]+) \(([\d, ]+)\)", lambda found: f"{found[1]} {found[2].replace(',', '')}".rstrip(), text)
    return re.sub(r"(--[\w-]+) +(?=[ .,:;)]|$)", r"\1", text)


def _how_to_go_on(arguments: argparse.Namespace, given: Sequence[str]) -> str:
    """Say after an interruption what there is to go on from."""
    if arguments.command == "compare":
        return "What was measured is kept: the same command goes on from there."
    if arguments.command not in ("finetune", "run"):
        return "Nothing was written: give the same command again."
    out = _out_of_run(arguments) if arguments.command == "run" else arguments.out
    if any(file.is_file() for file in checkpoints_of(out).rglob("*")):
        again = shlex.join([*given, *["--resume"] * (not arguments.resume)])
        return f"`ltm-retrofit {again}` goes on where it was."
    return "There is no checkpoint to go on from yet: give the same command again."


def _print(text: str, file: Any = None) -> None:
    """Print in the first process of several; in the others nothing."""
    from ltm_retrofit.tuning.processes import is_main

    if is_main():
        print(text, file=file, flush=True)


def _say(arguments: argparse.Namespace, text: str) -> None:
    """Tell what is going on; with ``--json`` not on stdout, which holds the JSON and nothing else."""
    _print(text, sys.stderr if arguments.json else sys.stdout)


def _show(arguments: argparse.Namespace, text: str, values: Any) -> None:
    """Print a command's result."""
    _print(json.dumps(values, indent=2, ensure_ascii=False) if arguments.json else text)


def _settings(kind: Any, arguments: argparse.Namespace) -> Any:
    """Build settings from the options of the same names; what was not given keeps its default."""
    given = {field.name: getattr(arguments, field.name, None) for field in fields(kind)}
    return kind(**{name: value for name, value in given.items() if value is not None})


def _load(arguments: argparse.Namespace) -> Any:
    from ltm_retrofit.converted.resizing import ask_size
    from ltm_retrofit.saving.load import find_model

    model, origin = find_model(arguments.model)
    _say(arguments, f"model    {arguments.model}: {origin}")
    if (size := _image_size(arguments)) is not None:
        ask_size(model, size)
    return model


def _load_original(arguments: argparse.Namespace) -> Any:
    """Load a model that is to be looked at or converted.

    Raises:
        AlreadyRetrofitted: where it is converted.
    """
    from ltm_retrofit.converted.record import get_plan, is_retrofitted

    model = _load(arguments)
    if is_retrofitted(model):
        raise AlreadyRetrofitted(
            f"{arguments.model} is converted already, to ×{get_plan(model).share:.2f} of its MACs: give the checkpoint "
            f"that it was made from. `ltm-retrofit report {arguments.model}` shows what became of it"
        )
    return model


def _image_size(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Return the height and width that were asked for, if any; one number is that of both."""
    given = getattr(arguments, "image_size", None)
    if given is None:
        return None
    if len(given) > 2 or min(given) < 1:
        raise RecipeError(f"--image-size is one side, or height and width, from 1 on, got {' '.join(map(str, given))}")
    return given[0], given[-1]


def _say_input(arguments: argparse.Namespace, model: Any) -> None:
    """Tell how large the images are that a model is fed, and who says so."""
    from ltm_retrofit.converted.resizing import sizes_now
    from ltm_retrofit.finding.example import sizes_in_words

    if said := sizes_now(model):
        _say(arguments, f"input    {sizes_in_words(said)}")


def _inspect(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.find import find_sites

    sites = find_sites(_load_original(arguments))
    values = {
        "macs": sites.total_macs,
        "sizes_said": sites.sizes_said,
        "tokens": sites.tokens,
        "sites": sites.rows(),
        "excluded": sites.excluded,
        "narrowed": sites.narrowed,
    }
    narrowed = "".join(f"\nno better scope: {name}: {reason}" for name, reason in sites.narrowed.items())
    ending = "prefix tokens only, so the last block may drop the others" if sites.ending.prefix_only else "all tokens"
    _show(arguments, f"{sites}{narrowed}\n{sites.total_macs / 1e9:.3f} GMACs; the classifier reads {ending}", values)


def _plan(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.convert import restore
    from ltm_retrofit.converted.record import is_retrofitted
    from ltm_retrofit.find import find_sites
    from ltm_retrofit.plan import read_plan
    from ltm_retrofit.planner import make_plan

    if arguments.out is not None and arguments.out.is_dir():
        raise RecipeError(f"--out {arguments.out} is a folder: name a file, such as {arguments.out / 'plan.yaml'}")
    if arguments.plan is not None:
        _, plan = _by_file(arguments)
    else:
        model, config, images = _asked(arguments)
        model = restore(model) if is_retrofitted(model) else model
        plan = make_plan(find_sites(model), config, model=model, images=images)
    if arguments.out is not None:
        plan.write(arguments.out)
    text = str(plan) if arguments.out is None else f"{plan}\nwritten to {arguments.out}"
    if arguments.against is not None:
        differing = plan.diff(read_plan(arguments.against)) or "the same"
        text = f"{text}\n\nthis plan | {arguments.against}\n{differing}"
    _show(arguments, text, plan.to_dict())


def _convert(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.convert import replan, retrofit
    from ltm_retrofit.converted.record import get_plan, is_retrofitted
    from ltm_retrofit.saving.save import CONFIG, save_pretrained

    check_ours(arguments.out, CONFIG, overwrite=arguments.overwrite)
    if arguments.plan is not None:
        model, plan = _by_file(arguments)
        retrofit(model, plan=plan)
    else:
        model, config, images = _asked(arguments)
        if is_retrofitted(model):
            replan(model, config, images=images)
        else:
            retrofit(model, config, images=images)
    plan = get_plan(model)
    save_pretrained(model, arguments.out, overwrite=arguments.overwrite)
    _show(arguments, f"{plan}\nwritten to {arguments.out}/", plan.to_dict())


def _asked(arguments: argparse.Namespace) -> tuple[Any, LTMConfig, Any]:
    """Return the model, what is asked for, and the images to choose by, if any."""
    if arguments.flops is None and arguments.tokens is None and arguments.latency is None:
        arguments.flops = 0.7
    if arguments.calibrate is not None:
        if arguments.schedule is not None:
            raise RecipeError("--calibrate chooses the sites: give it or --schedule, not both")
        arguments.schedule = "calibrated"
    config, model = _settings(LTMConfig, arguments), _load(arguments)
    return model, config, _images_of(arguments, model, arguments.calibrate)


def _images_of(arguments: argparse.Namespace, model: Any, folder: str | None) -> Any:
    """Load as many images of a folder as --images says, without labels; None where no folder was given."""
    from ltm_retrofit.tuning.images import load_images

    return None if folder is None else load_images(model, folder, arguments.images)


def _by_file(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Plan by what stands in a file. Where its rows were edited they decide, and the MACs are counted anew."""
    from ltm_retrofit.converted.resizing import ask_size, example_of, image_shape, planned_size
    from ltm_retrofit.find import find_sites
    from ltm_retrofit.plan import read_plan, recounted

    budget = {"flops", "latency", "tokens"}  # which the parser itself keeps apart from a plan
    settings = [*(field.name for field in fields(LTMConfig) if field.name not in budget), "image_size", "calibrate"]
    if given := [f"--{name.replace('_', '-')}" for name in settings if getattr(arguments, name, None) is not None]:
        raise RecipeError(f"--plan says all that {', '.join(given)} would say: give one or the other")
    plan = read_plan(arguments.plan)
    model = _load_original(arguments)
    if (size := planned_size(plan)) is not None and size != (image_shape(model) or (0,))[1:]:
        ask_size(model, size)
    counted = recounted(plan, find_sites(model, example_of(plan, model)))
    if counted.macs != plan.macs:
        _say(arguments, f"plan     {arguments.plan} says {plan.macs:,} MACs, and its rows make {counted.macs:,}")
    return model, counted


def _finetune(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.converted.record import is_retrofitted, was_finetuned
    from ltm_retrofit.reporting.report import measure
    from ltm_retrofit.saving.load import before_tuning, find_model
    from ltm_retrofit.saving.save import CONFIG, rewrite_card, save_pretrained
    from ltm_retrofit.tuning.checkpoints import checkpoints_beside, exists
    from ltm_retrofit.tuning.classes import check_data, check_same_classes, count_classes
    from ltm_retrofit.tuning.processes import is_main
    from ltm_retrofit.tuning.settings import TrainConfig
    from ltm_retrofit.tuning.sources import DataSection, load_split, load_validation
    from ltm_retrofit.tuning.train import finetune

    kept = checkpoints_beside(arguments.out, arguments.resume)
    # a run that was interrupted while it was tested has written its model
    overwrite = arguments.overwrite or exists(kept)
    check_ours(arguments.out, CONFIG, overwrite=overwrite)
    config = _settings(TrainConfig, arguments)
    model = _load(arguments)
    if not is_retrofitted(model):
        raise NotRetrofitted(f"{arguments.model} is not converted: run `ltm-retrofit convert` on it first")
    _say_input(arguments, model)
    section = DataSection(name=arguments.data)
    train, test = (load_split(section, split) for split in (section.train_split, section.test_split))
    check_same_classes(train, test)
    check_data(model, test, "test", count_classes(model))
    if (val := load_validation(section)) is not None:
        check_same_classes(val, test, "validation")
    say = partial(_say, arguments)
    history = finetune(model, train, val, config=config, checkpoints_to=kept, resume=True, say=say)
    if not is_main():
        return
    save_pretrained(model, arguments.out, overwrite=overwrite)  # before what else may fail or be interrupted
    say(f"written   {arguments.out}/, before it is measured on {len(test)} test images, which nothing was chosen by")
    before = None
    if was_finetuned(model):  # else what was best is the converted model, untouched
        given = find_model(arguments.model).model
        before = before_tuning(arguments.model) if was_finetuned(given) else given
    called = f"{section.test_split} of {section.name}"
    report = measure(model, data=test, original=before, split=called, batches=())
    rewrite_card(arguments.out, report)
    shutil.rmtree(kept)
    values = {**report.to_dict(), "history": history.to_dict()}
    _show(arguments, f"{report}\n\n{history}\nwritten to {arguments.out}/", values)


def _report(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.reporting.report import measure

    if min(arguments.batches) < 1:
        raise RecipeError(f"--batches are whole numbers from 1 on, got {' '.join(map(str, arguments.batches))}")
    if arguments.original is not None and arguments.data is None:
        raise RecipeError("--original is for comparing answers: give --data too")
    place, mark = Path(arguments.model), "report.json"
    beside = place if place.is_dir() else Path("runs") / place.name
    out = arguments.out or Path(f"{beside if beside.name not in ('', '..') else beside.resolve()}-report")
    check_ours(out, mark)
    data = None if arguments.data is None else _split_of(arguments)
    model = _load(arguments)
    _say_input(arguments, model)
    original = None if data is None else _original(arguments, model, data)
    report = measure(
        model,
        data=data,
        original=original,
        split=f"{arguments.split} of {arguments.data}",
        batches=tuple(arguments.batches),
        seconds=arguments.seconds,
        say=lambda text: _say(arguments, text),
    )
    with written_whole(out, mark) as folder:
        files = ["report.html", mark, "report.md"]
        replace(report, extra={"written_by": OURS, "files": files}).write(folder)
    _show(arguments, f"\n{report}\n\nwritten to {out}/ (see report.html)", report.to_dict())


def _compare(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.reporting.frontier import Point, frontier

    out = arguments.out or Path("runs") / f"{Path(arguments.model).resolve().name}-compare"
    mark = "compare.json"
    check_ours(out, mark)
    names = ("model", "image_size", "data", "split", "limit", "calibrate", "images", "batch")
    asked = {"written_by": OURS, "asked": {name: getattr(arguments, name) for name in names}}
    known = json.loads((out / mark).read_text()) if (out / mark).is_file() else {**asked, "points": []}
    if known["asked"] != asked["asked"]:
        raise RecipeError(f"--out {out} holds another comparison, {known['asked']}: name another folder, or remove it")
    for name in ("limit", "batch"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise RecipeError(f"--{name} is a whole number from 1 on, got {given}")
    data = _split_of(arguments)
    if arguments.limit is not None and len(data) > arguments.limit:
        data = data.shuffle(seed=0).select(range(arguments.limit))
    model = _load_original(arguments)
    _say_input(arguments, model)
    images = _images_of(arguments, model, arguments.calibrate)
    found = None
    for found in frontier(
        model,
        data,
        budgets=arguments.budgets,
        methods=arguments.methods,
        schedules=[*arguments.schedules, *(["calibrated"] if images is not None else [])],
        images=images,
        split=f"{arguments.split} of {arguments.data}",
        batch=arguments.batch,
        known=map(Point.from_dict, known["points"]),
        say=lambda text: _say(arguments, text),
    ):
        with written_whole(out, mark) as folder:
            found.write(folder, asked)
    if found is None:
        raise RecipeError("none of these conversions was possible, for the reasons above")
    _show(arguments, f"\n{found}\n\nwritten to {out}/ (see compare.png)", found.to_dict())


def _export(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.saving.export import MARK, export
    from ltm_retrofit.saving.formats import FORMATS

    kind, out = next((kind, out) for kind in FORMATS if (out := getattr(arguments, kind)) is not None)
    if arguments.int8 and kind != "onnx":
        raise RecipeError(f"--int8 goes with --onnx: it cannot be had for --{kind}")
    # before a model is loaded, and images
    FORMATS[kind].check_installed()
    check_ours(out, MARK, overwrite=arguments.overwrite)
    model = _load(arguments)
    _say_input(arguments, model)
    images = _images_of(arguments, model, arguments.data)
    exported = export(
        model,
        out,
        format=kind,
        int8=arguments.int8,
        images=images,
        overwrite=arguments.overwrite,
        seconds=arguments.seconds,
        say=lambda text: _say(arguments, text),
    )
    _show(arguments, f"{exported}", exported.to_dict())


def _split_of(arguments: argparse.Namespace) -> Any:
    """Load the split of --data that --split names."""
    from ltm_retrofit.tuning.sources import DataSection, load_split

    other = "validation" if arguments.split == "train" else "train"  # of which nothing is read
    section = DataSection(name=arguments.data, train_split=other, test_split=arguments.split)
    return load_split(section, section.test_split)


def _original(arguments: argparse.Namespace, model: Any, data: Any) -> Any:
    """Return what a tuned model was before: by --original, else by what its folder says; None where nobody knows."""
    from ltm_retrofit.converted.record import get_plan, is_retrofitted, was_finetuned
    from ltm_retrofit.converted.resizing import ask_size, planned_size
    from ltm_retrofit.recipe import Recipe
    from ltm_retrofit.saving.load import before_tuning, find_model
    from ltm_retrofit.tuning.classes import count_classes, names_in, set_classes

    if not was_finetuned(model):
        if arguments.original is not None:
            raise RecipeError(f"--original is what a tuned model was before, and {arguments.model} was not tuned")
        return None
    name, recipe = arguments.original, Path(arguments.model) / "recipe.yaml"
    if name is None and (before := before_tuning(arguments.model)) is not None:
        _say(arguments, "original the converted model that this one was tuned from")
        return before
    if name is None and recipe.is_file():
        name = Recipe.read(recipe).model.name
    if name is None:
        _say(arguments, f"original not known to {arguments.model}: name it by --original to see both side by side")
        return None
    original, origin = find_model(name)
    _say(arguments, f"original {name}: {origin}")
    if not is_retrofitted(original):
        if (size := planned_size(get_plan(model))) is not None:
            ask_size(original, size)
        if count_classes(original) != count_classes(model):  # as a run gives it a new classifier
            set_classes(original, names_in(data) or count_classes(model))
    return original


def _predict(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.converted.record import is_retrofitted, was_finetuned
    from ltm_retrofit.reporting.predict import predict

    out, pixel = arguments.picture, arguments.highlight
    if out is not None:
        _check_picture(out)
    elif pixel is not None:
        raise RecipeError("--highlight is of the picture: name its file by --picture")
    model = _load(arguments)
    if not is_retrofitted(model):
        raise NotRetrofitted(f"{arguments.model} is not converted: run `ltm-retrofit convert` on it first")
    if was_finetuned(model):
        _say(arguments, "before   the tuned weights, and nothing merges")
    predictions = predict(model, arguments.image, top=arguments.top)
    parts = ["", *(f"{prediction}\n" for prediction in predictions)]
    if out is not None:
        from ltm_retrofit.reporting.pictures import show_merges

        show_merges(model, arguments.image, highlight=pixel).savefig(out, dpi=100)
        parts.append(f"picture written to {out}")
    _show(arguments, "\n".join(parts).rstrip(), [prediction.to_dict() for prediction in predictions])


def _check_picture(out: Path) -> None:
    """Check that a picture can be written, before a model is loaded.

    Raises:
        RecipeError: where matplotlib has no such format, or there is no such folder.
    """
    from matplotlib.figure import Figure

    formats = sorted(Figure().canvas.get_supported_filetypes())
    if out.suffix[1:].lower() not in formats:
        raise RecipeError(
            f"--picture {out} has no ending of a picture: name a file, such as merges.png ({', '.join(formats)})"
        )
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"would lie in {out.parent}, which is no folder"
        raise RecipeError(f"--picture {out} {what}: name a file in a folder that is there")


def _out_of_run(arguments: argparse.Namespace) -> Path:
    return Path(arguments.out or Path("runs") / arguments.recipe.stem)


def _run(arguments: argparse.Namespace) -> None:
    from ltm_retrofit.recipe import Recipe, run_recipe

    recipe = Recipe.read(arguments.recipe)
    for section in ("model", "data"):
        if (name := getattr(arguments, section)) is not None:
            recipe = replace(recipe, **{section: replace(getattr(recipe, section), name=name)})
    if (size := _image_size(arguments)) is not None:
        recipe = replace(recipe, model=replace(recipe.model, image_size=size))
    out = _out_of_run(arguments)
    report = run_recipe(recipe, out, say=lambda text: _say(arguments, text), resume=arguments.resume)
    if arguments.json:
        _print(report.to_json())


COMMANDS = {
    "inspect": _inspect,
    "plan": _plan,
    "convert": _convert,
    "finetune": _finetune,
    "report": _report,
    "compare": _compare,
    "export": _export,
    "predict": _predict,
    "run": _run,
}
