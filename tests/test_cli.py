"""The command line: light to start, right on stdout, errors on stderr with status 2."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from pieces import equal, interrupt, weights
from PIL import Image

import ltm_retrofit as ltm
from ltm_retrofit import cli
from ltm_retrofit.cli import main
from ltm_retrofit.converted.record import mark_finetuned, was_finetuned
from ltm_retrofit.saving import load
from ltm_retrofit.tuning.loop import Run

COMMANDS = ("inspect", "plan", "convert", "finetune", "report", "compare", "export", "predict", "run")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False
    )


@pytest.fixture
def folder(tmp_path: Path, build: Callable) -> Path:
    """A tiny timm model as timm saves it."""
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments)
    model.load_state_dict({k: v for k, v in build("timm-vit").state_dict().items() if "head" not in k}, strict=False)
    timm.models.save_for_hf(model, tmp_path / "base", model_args=arguments, safe_serialization=True)
    return tmp_path / "base"


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("validation", 2), ("test", 3)):
        for index, name in enumerate(("red", "green", "blue")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                array = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                array[..., index] += 150
                Image.fromarray(array).save(tmp_path / "data" / split / name / f"{number}.png")
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------------------------------- help


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, ltm_retrofit.cli as cli; cli.parser().format_help();"
        "print([name for name in ('torch', 'timm', 'transformers', 'datasets', 'accelerate', 'numpy', 'matplotlib',"
        " 'sklearn', 'yaml') if name in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"


def test_python_m_shows_help_with_examples() -> None:
    shown = python("-m", "ltm_retrofit", "--help")
    assert shown.returncode == 0 and shown.stderr == ""
    assert all(f"ltm-retrofit {command} " in shown.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "--json" in shown and "examples:" in shown and f"ltm-retrofit {command} " in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_are_commands(command: str) -> None:
    for line in cli.EXAMPLES[command].split("\n"):
        program, *arguments = line.split()
        assert program == "ltm-retrofit"
        assert cli.parser().parse_args(arguments).command == command


@pytest.mark.parametrize(
    "arguments", [[], ["converts"], ["convert", "x"], ["convert", "x", "--out", "y", "--flops", ".7", "--tokens", "3"]]
)
def test_misuse_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2 and "usage: ltm-retrofit" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_json_is_all_that_stdout_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert len(values["sites"]) == 6 and values["excluded"] == {}
    assert values["macs"] == ltm.find_sites(timm.create_model(f"local-dir:{folder}", pretrained=False)).total_macs
    assert str(folder) in err


def test_inspect_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert all(f"blocks.{index}" in out for index in range(6))
    assert "GMACs; the classifier reads prefix tokens only" in out and err == ""


def test_inspect_gives_the_reason_of_what_is_left_out(monkeypatch, build, capsys) -> None:
    """A block that branches on its input's values has no graph, and the others suffer with it."""
    model = build("timm-vit")
    block = model.blocks[3]
    plain = type(block).forward
    block.__class__ = type(
        "Odd", (type(block),), {"forward": lambda self, x: plain(self, x) if float(x.sum()) < 1e9 else x}
    )
    sites = ltm.find_sites(model)
    assert any(name.startswith("blocks.3") and "has no FX graph" in why for name, why in sites.narrowed.items())

    monkeypatch.setattr("ltm_retrofit.saving.load.find_model", lambda name: (model, "made here"))
    assert cli.main(["inspect", "odd"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and reason in shown for name, reason in sites.narrowed.items())
    assert cli.main(["inspect", "odd", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["excluded"] == sites.excluded and values["narrowed"] == sites.narrowed


# ---------------------------------------------------------------------------------------- the size of images, and plans


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    """A tiny model made for 70² (26 tokens), with an image processor that crops to 28² (5 tokens)."""
    small = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4, "mlp_ratio": 2, "num_labels": 3}
    config = transformers.Dinov2Config(image_size=70, patch_size=14, **small)
    config.id2label = dict(enumerate(("blue", "green", "red")))
    transformers.Dinov2ForImageClassification(config).save_pretrained(tmp_path / "dinov2")
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessor(**crop).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def test_inspect_says_the_size_its_source_and_the_tokens(dinov2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(dinov2)]) == 0
    assert "input 28×28 by the image processor, 5 tokens; the config says 70" in capsys.readouterr().out
    assert cli.main(["inspect", str(dinov2), "--image-size", "42", "56", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["sizes_said"] == {"request": [42, 56], "image processor": [28, 28], "config": [70, 70]}
    assert values["tokens"] == values["sites"][0]["tokens"] == 13


@pytest.mark.parametrize("size", [["0"], ["1", "2", "3"]], ids=str)
def test_a_size_that_is_none_is_refused(size: list[str], dinov2: Path, capsys) -> None:
    assert cli.main(["inspect", str(dinov2), "--image-size", *size]) == 2
    assert "--image-size is one side, or height and width" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "side"), [([], 28), (["--image-size", "56"], 56)], ids=["processor", "asked"])
def test_every_command_takes_images_of_the_size_that_was_planned_for(
    size: list[str], side: int, dinov2: Path, colours: Path, tmp_path: Path, capsys
) -> None:
    made, tuned = tmp_path / "made", tmp_path / "tuned"
    by = "request" if size else "image processor"
    assert cli.main(["convert", str(dinov2), "--flops", "0.8", "--out", str(made), *size]) == 0
    assert f"input {side}×{side} by the {by}" in capsys.readouterr().out
    assert json.loads((made / "config.json").read_text())["plan"]["input_size"] == {"pixel_values": [1, 3, side, side]}
    assert cli.main(["finetune", str(made), "--data", str(colours), "--batch-size", "4", "--out", str(tuned)]) == 0
    assert f"input    {side}×{side} by the {by}; " in capsys.readouterr().out
    assert cli.main(["report", str(tuned), "--data", str(colours), "--batches", "1"]) == 0
    assert f"input    {side}×{side} by the {by}; " in capsys.readouterr().out
    assert cli.main(["report", str(tuned), "--image-size", "42", "--batches", "1"]) == 2
    assert "convert the original for that size" in capsys.readouterr().err
    assert (tuned / "preprocessor_config.json").is_file()


@pytest.mark.slow
def test_a_run_is_of_the_size_that_was_asked_for(dinov2: Path, colours: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.yaml").write_text(
        "ltm: {flops: 0.8}\ntrain: {epochs: 1, batch_size: 8, bound: none, train: all, lr: 3.0e-4}"
    )
    given = ["--model", str(dinov2), "--data", str(colours), "--image-size", "42", "42", "--out", str(tmp_path / "run")]
    assert cli.main(["run", str(tmp_path / "mine.yaml"), *given]) == 0
    assert "input 42×42 by the request, 10 tokens; the image processor says 28; the config says 70" in (
        capsys.readouterr().out
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["plan"]["input_size"] == {"pixel_values": [1, 3, 42, 42]} and report["reloaded_equal"]
    assert report["recipe"]["model"]["image_size"] == [42, 42] and report["accuracy"]["converted"] is not None


def test_report_of_an_original_is_of_its_image_processors_size(dinov2: Path, colours: Path, capsys) -> None:
    command = ["report", str(dinov2), "--data", str(colours), "--batches", "1", "--json"]
    assert cli.main(command) == 0
    small = json.loads(capsys.readouterr().out)
    assert cli.main([*command, "--image-size", "70"]) == 0
    large = json.loads(capsys.readouterr().out)
    assert small["macs"]["original"] * 4 < large["macs"]["original"]


def test_every_option_of_the_config_is_on_the_command_line(folder: Path) -> None:
    arguments = cli.parser().parse_args(["convert", str(folder), "--out", "x"])
    assert not [name for name in ltm.LTMConfig.__dataclass_fields__ if not hasattr(arguments, name)]


def test_convert_by_scope_and_schedule(folder: Path, tmp_path: Path, capsys) -> None:
    options = ["--scope", "LOCAL", "--schedule", "stages", "--flops", "0.9", "--out", str(tmp_path / "made"), "--json"]
    assert cli.main(["convert", str(folder), *options]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {row["scope"] for row in values["rows"]} == {"LOCAL"} and values["config"]["scope"] == "LOCAL"


@pytest.mark.slow
def test_convert_by_a_plan(dinov2: Path, tmp_path: Path, capsys) -> None:
    made, again = tmp_path / "made", tmp_path / "again"
    assert cli.main(["convert", str(dinov2), "--image-size", "56", "--out", str(made), "--json"]) == 0
    (file := tmp_path / "plan.json").write_text(capsys.readouterr().out)
    for source in (file, made / "config.json"):
        assert cli.main(["convert", str(dinov2), "--plan", str(source), "--out", str(again), "--overwrite"]) == 0
        assert "its rows make" not in capsys.readouterr().out
        plan, stored = (ltm.get_plan(ltm.from_pretrained(path)) for path in (made, again))
        assert plan.rows == stored.rows and plan.macs == stored.macs and plan.input_size == stored.input_size


def test_in_an_edited_plan_rows_decide_and_the_macs_are_counted_anew(folder: Path, tmp_path: Path, capsys) -> None:
    options = ["--tokens", "50", "40", "30", "--json"]
    assert cli.main(["convert", str(folder), *options, "--out", str(tmp_path / "made")]) == 0
    values = json.loads(capsys.readouterr().out)
    values["rows"][2]["tokens_out"] = values["rows"][3]["tokens_in"] = 20
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert cli.main(["convert", str(folder), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"plan.json says {values['macs']:,} MACs, and its rows make [\d,]+", out)
    plan = ltm.get_plan(ltm.from_pretrained(tmp_path / "b"))
    assert plan.tokens[:3] == (50, 40, 20) and plan.macs < values["macs"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{", [], "plan.json holds no plan"),
        ('{"rows": []}', [], "plan.json: MergePlan lacks"),
        ("{}", ["--method", "tome", "--scope", "FLOW"], "--plan says all that --method, --scope would say"),
    ],
    ids=["no-json", "cut-off", "two-masters"],
)
def test_a_plan_that_is_none_is_refused(
    text: str, options: list[str], message: str, folder: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "plan.json").write_text(text)
    command = ["convert", str(folder), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "none"), *options]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the chain


def test_convert_finetune_report(folder: Path, colours: Path, tmp_path: Path, capsys) -> None:
    made, tuned = tmp_path / "made", tmp_path / "tuned"
    assert cli.main(["convert", str(folder), "--flops", "0.75", "--out", str(made)]) == 0
    assert f"written to {made}/" in capsys.readouterr().out
    model = ltm.from_pretrained(made)
    plan = ltm.get_plan(model)
    assert 0.73 <= plan.share <= 0.75 and not was_finetuned(model)

    options = [
        "--data",
        str(colours),
        "--epochs",
        "4",
        "--batch-size",
        "10",
        "--lr",
        "3e-3",
        "--seed",
        "1",
        "--train",
        "all",
        "--distill",
        "0",
    ]
    assert cli.main(["finetune", str(made), *options, "--out", str(tuned), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["history"]["losses"]) == 12 and values["history"]["losses"][-1] < values["history"]["losses"][0]
    assert values["history"]["before"]["val_images"] == 6 and values["history"]["kept"] > 0
    assert None not in [values["accuracy"][name] for name in ("original", "converted", "finetuned")]
    assert was_finetuned(ltm.from_pretrained(tuned))

    assert cli.main(["report", str(tuned), "--data", str(colours), "--batches", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"] == values["accuracy"]
    assert report["macs"]["converted"] == plan.macs and set(report["latency_ms"]["converted"]) == {"1"}


def test_where_tuning_makes_nothing_better_the_converted_model_comes_out(
    folder: Path, colours: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    made, tuned = tmp_path / "made", tmp_path / "tuned"
    assert cli.main(["convert", str(folder), "--flops", "0.75", "--out", str(made)]) == 0
    shutil.rmtree(colours / "validation")
    found = {"val_images": 3, "val_accuracy": 50.0, "val_loss": 1.0}
    monkeypatch.setattr("ltm_retrofit.tuning.validation.Validation.measure", lambda *_: found)
    assert cli.main(["finetune", str(made), "--data", str(colours), "--batch-size", "9", "--out", str(tuned)]) == 0
    shown = capsys.readouterr().out
    assert "3 of the 30 training images are held out" in shown
    assert "the converted model: no epoch was better, so it is what you get back" in shown
    one, other = (ltm.from_pretrained(path) for path in (made, tuned))
    assert not was_finetuned(other) and equal(weights(one), weights(other))


def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(
    folder: Path, colours: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    made, tuned = tmp_path / "made", tmp_path / "a model"
    assert cli.main(["convert", str(folder), "--flops", "0.75", "--out", str(made)]) == 0
    command = ["finetune", str(made), "--data", str(colours), "--batch-size", "10", "--out", str(tuned)]
    step = Run.step
    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", lambda run: (os.kill(os.getpid(), signal.SIGINT), step(run)))
        capsys.readouterr()
        assert cli.main(command) == 130
    *_, line = capsys.readouterr().err.splitlines()
    again = shlex.join(["ltm-retrofit", *command, "--resume"])
    assert line == f"Interrupted. `{again}` goes on where it was."
    with monkeypatch.context() as patch:  # once the model is written, and before it is tested
        patch.setattr("ltm_retrofit.reporting.report.measure", interrupt)
        assert cli.main(shlex.split(again)[1:]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == line and tuned.is_dir()
    assert cli.main(shlex.split(again)[1:]) == 0
    assert not (tmp_path / ".a model.checkpoints").exists()
    capsys.readouterr()
    monkeypatch.setitem(cli.COMMANDS, "inspect", interrupt)
    assert cli.main(["inspect", "anything"]) == 130
    assert capsys.readouterr().err.strip() == "Interrupted. Nothing was written: give the same command again."


def test_convert_by_tokens_method_and_sites(folder: Path, tmp_path: Path, capsys) -> None:
    options = ["--tokens", "50", "30", "--sites", "blocks.2", "blocks.4", "--method", "tome", "--output-tokens", "full"]
    assert cli.main(["convert", str(folder), *options, "--out", str(tmp_path / "made"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [(row["site"], row["tokens_out"]) for row in values["rows"]] == [("blocks.2", 50), ("blocks.4", 30)]
    assert values["config"]["method"] == "tome" and values["unmerge"] is True
    assert ltm.get_plan(ltm.from_pretrained(tmp_path / "made")).to_dict() == values


def test_an_existing_folder_is_kept_unless_told_otherwise(folder: Path, tmp_path: Path, capsys) -> None:
    command = ["convert", str(folder), "--tokens", "50", "40", "30", "--method", "slice", "--out", str(tmp_path / "a")]
    assert cli.main(command) == 0
    before = (tmp_path / "a" / "config.json").stat().st_mtime_ns
    assert cli.main(command) == 2
    assert "CheckpointError" in capsys.readouterr().err
    assert (tmp_path / "a" / "config.json").stat().st_mtime_ns == before
    assert cli.main([*command, "--overwrite"]) == 0


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("as_json", [False, True])
def test_errors_of_the_package_are_status_2(as_json: bool, folder: Path, tmp_path: Path, capsys) -> None:
    command = ["convert", str(folder), "--flops", "0.01", "--out", str(tmp_path / "none")]
    assert cli.main([*command, *["--json"] * as_json]) == 2
    out, err = capsys.readouterr()
    assert "BudgetError: --flops 0.01 cannot be met" in err and "Traceback" not in err
    if as_json:
        values = json.loads(out)
        assert values["error"] == "BudgetError" and values["message"].startswith("--flops 0.01 cannot be met")
    assert not (tmp_path / "none").exists()


def test_a_finetune_is_told_on_what(folder: Path, tmp_path: Path, capsys) -> None:
    """Left out, it was the embedded digits, on which any classifier of ten classes was tuned without a word."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["finetune", str(folder), "--out", str(tmp_path / "none")])
    assert stop.value.code == 2 and "required: --data" in capsys.readouterr().err


def test_only_converted_models_are_finetuned_here(folder: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["finetune", str(folder), "--data", "digits", "--out", str(tmp_path / "none")]) == 2
    assert "NotRetrofitted" in (err := capsys.readouterr().err) and "ltm-retrofit convert" in err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("lacks", "message"),
    [("train", "one label would mean two things"), ("all", "2 of the model's 3 classes|no image of")],
)
def test_the_test_split_is_looked_at_before_the_training(
    lacks: str, message: str, folder: Path, colours: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    assert cli.main(["convert", str(folder), "--flops", "0.75", "--out", str(tmp_path / "made")]) == 0
    for split in ("train", "test") if lacks == "all" else ("test",):
        shutil.rmtree(colours / split / "green")
    monkeypatch.setattr("ltm_retrofit.tuning.train.finetune", lambda *args, **kwargs: pytest.fail("trained"))
    capsys.readouterr()
    assert cli.main(["finetune", str(tmp_path / "made"), "--data", str(colours), "--out", str(tmp_path / "none")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_impossible_settings_are_refused_before_the_model_is_loaded(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cli, "_load", lambda arguments: pytest.fail("loaded"))
    assert cli.main(["finetune", "x", "--data", "digits", "--epochs", "0", "--out", str(tmp_path / "none")]) == 2
    assert "epochs must be a whole number from 1 on, got 0" in capsys.readouterr().err
    assert cli.main(["convert", "x", "--flops", "7", "--out", str(tmp_path / "none")]) == 2
    assert "between 0 and 1, got 7.0" in capsys.readouterr().err


def test_unknown_recipe_key(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("trian: {epochs: 2}")
    assert cli.main(["run", str(path)]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_run_takes_model_data_and_folder_from_the_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    from ltm_retrofit import recipe as recipes

    seen = []

    class Found:
        def to_json(self) -> str:
            return "{}"

    def spy(recipe, out, *, say, resume):
        assert not resume
        seen.append((recipe, out))
        say("a stage")
        return Found()

    monkeypatch.setattr(recipes, "run_recipe", spy)
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochs: 3}")
    assert cli.main(["run", str(path), "--model", "m", "--data", "d", "--out", "o", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {} and "a stage" in err
    assert cli.main(["run", str(path)]) == 0
    assert "a stage" in capsys.readouterr().out
    (overridden, there), (plain, default) = seen
    assert (overridden.model.name, overridden.data.name, there) == ("m", "d", Path("o"))
    assert plain == recipes.Recipe.read(path) and plain.train.epochs == 3 and default == Path("runs/mine")


def test_python_m_ends_with_status_2(tmp_path: Path) -> None:
    failed = python("-m", "ltm_retrofit", "run", str(tmp_path / "none.yaml"), "--json")
    assert failed.returncode == 2
    assert json.loads(failed.stdout)["error"] == "RecipeError"
    assert failed.stderr.startswith("RecipeError: cannot read the recipe")


def test_finetune_looks_at_its_folder_first(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("ltm_retrofit.saving.load.find_model", lambda name: pytest.fail("work was begun"))
    (tmp_path / "mine.txt").write_text("keep me")
    for command in (
        ["finetune", "anything", "--data", "digits", "--out", str(tmp_path)],
        ["convert", "anything", "--out", str(tmp_path)],
    ):
        assert main(command) == 2
        assert "mine.txt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- reports


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of seven classes, as many as the tiny models have."""
    for split in ("train", "test"):
        for index in range(7):
            (tmp_path / "photos" / split / f"kind{index}").mkdir(parents=True)
            Image.new("RGB", (32, 32), (30 * index, 99, 9)).save(tmp_path / "photos" / split / f"kind{index}" / "a.png")
    return tmp_path / "photos"


@pytest.fixture
def tuned(converted: Callable, tmp_path: Path) -> Path:
    """A converted model, and one tuned from it where a recipe's run would put it."""
    ltm.save_pretrained(converted("timm-vit"), tmp_path / "made")
    model = ltm.from_pretrained(tmp_path / "made")
    with torch.no_grad():
        model.head.weight.neg_()
    mark_finetuned(model)
    ltm.save_pretrained(model, tmp_path / "mine" / "model")
    return tmp_path / "mine"


def test_a_report_shows_all_versions_and_writes_a_page(tuned: Path, photos: Path, capsys) -> None:
    command = ["report", str(tuned), "--data", str(photos), "--batches", "2", "1", "--seconds", "9", "--json"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    measured = [name for name, value in values["accuracy"].items() if value is not None]
    assert measured == ["original", "converted", "finetuned"]
    assert values["answers"]["split"] == f"test of {photos}" and values["answers"]["images"] == 7
    assert {Path(one["image"]) for one in values["answers"]["changed"]} <= set(photos.rglob("*.png"))
    said = [line.split(":")[0] for line in err.splitlines()]
    assert said[-5:-3] == ["original the converted model that this one was tuned from", "GMACs of one image"]
    assert said[-3:] == ["latency, batch 1", "latency, batch 2", "top-1"]
    written = tuned.with_name("mine-report")
    assert sorted(file.name for file in written.iterdir()) == ["report.html", "report.json", "report.md"]
    assert json.loads((written / "report.json").read_text())["accuracy"] == values["accuracy"]
    (written / "mine.txt").touch()
    assert cli.main(command) == 2
    assert "mine.txt" in capsys.readouterr().err


def test_what_a_tuned_model_was_is_named_where_its_folder_does_not_know(
    tuned: Path, photos: Path, build, tmp_path: Path, capsys, monkeypatch
) -> None:
    shutil.rmtree(tmp_path / "made")
    command = ["report", str(tuned), "--data", str(photos), "--batches", "1", "--seconds", "1", "--json"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "original not known to" in err and "--original" in err
    assert json.loads(out)["accuracy"]["original"] is None
    assert cli.main(["report", str(tuned), "--original", "x"]) == 2
    assert "--original is for comparing answers: give --data too" in capsys.readouterr().err

    found = load.find_model
    other = lambda name: (build("timm-vit"), "made here") if name == "base" else found(name)  # noqa: E731
    monkeypatch.setattr("ltm_retrofit.saving.load.find_model", other)
    assert cli.main([*command, "--original", "base"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["original"] is not None


def test_finetune_writes_the_model_before_it_measures(tuned: Path, photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ltm_retrofit.tuning.train.finetune", lambda *_, **__: ltm.History())
    monkeypatch.setattr("ltm_retrofit.reporting.report.measure", interrupted)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    out = tmp_path / "tuned"
    assert cli.main(["finetune", str(tuned), "--data", str(photos), "--out", str(out)]) == 130
    assert was_finetuned(ltm.from_pretrained(out))


# ------------------------------------------------------------------------------------------------------------ messages


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "kept", "said"),
    [
        (
            ["finetune", "x", "--data", "digits", "--out", "{}/out"],
            True,
            "`ltm-retrofit finetune x --data digits --out {}/out --resume` goes on",
        ),
        (
            ["run", "x.yaml", "--out", "{}/out"],
            True,
            "`ltm-retrofit run x.yaml --out {}/out --resume` goes on",
        ),
        (["finetune", "x", "--data", "digits", "--out", "{}/out"], False, "There is no checkpoint to go on from yet"),
        (["convert", "x", "--out", "{}/out"], False, "Nothing was written: give the same command again."),
    ],
)
def test_an_interruption_is_one_line(command, kept: bool, said: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setitem(cli.COMMANDS, command[0], interrupted)
    if kept:
        (tmp_path / ".out.checkpoints" / "converted").mkdir(parents=True)
        (tmp_path / ".out.checkpoints" / "converted" / "checkpoint.safetensors").touch()
    assert cli.main([part.format(tmp_path) for part in command]) == 130
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert out == "" and line.startswith(f"Interrupted. {said.format(tmp_path)}")


def test_a_warning_is_one_line_in_the_words_of_the_options(capsys, monkeypatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "convert", lambda _: warnings.warn("keep flops=0.35 or more", stacklevel=1))
    before = warnings.showwarning
    assert cli.main(["convert", "x", "--out", "y"]) == 0
    assert capsys.readouterr().err == "Warning: keep --flops 0.35 or more\n"
    assert warnings.showwarning is before


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("convert", "flops=0.01 cannot be met. Ask for flops=0.2", "--flops 0.01 cannot be met. Ask for --flops 0.2"),
        ("convert", "pass overwrite=True to replace it", "pass --overwrite to replace it"),
        ("convert", "set LTMConfig.flops=0.5", "set --flops 0.5"),
        ("convert", "tokens=(60, 30) merges nothing", "--tokens 60 30 merges nothing"),
        ("convert", "tokens=(60,) merges", "--tokens 60 merges"),
        ("convert", "output_tokens='full' brings", "--output-tokens 'full' brings"),
        ("finetune", "lower TrainConfig.batch_size", "lower --batch-size"),
        ("finetune", "raise TrainConfig.clip", "raise clip in the train section of a recipe"),
        ("report", "flops=0.5 is none of its options, model=3 neither", None),
    ],
)
def test_messages_name_options(command: str, text: str, said: str | None) -> None:
    out = [] if command == "report" else ["--out", "y"]
    data = ["--data", "z"] if command == "finetune" else []
    arguments = cli.parser().parse_args([command, "x", *out, *data])
    assert cli._in_options(text, arguments) == (said or text)


@pytest.mark.parametrize("command", [["inspect", "x"], ["run", "{}/x.yaml"]])
def test_what_is_converted_is_not_converted_again(command, converted, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "x.yaml").write_text("model: {name: x}")
    for room in ("saving.load", "recipe"):
        monkeypatch.setattr(f"ltm_retrofit.{room}.find_model", lambda name: (converted("timm-vit"), "made here"))
    monkeypatch.chdir(tmp_path)
    assert cli.main([part.format(tmp_path) for part in command]) == 2
    err = capsys.readouterr().err
    assert "x is converted already, to ×0." in err and "give the checkpoint that it was made from" in err
    assert "restore" not in err


def test_images_a_model_was_planned_for_are_put_in_words(converted, tmp_path: Path) -> None:
    ltm.save_pretrained(converted("timm-vit"), tmp_path / "made")
    card = (tmp_path / "made" / "README.md").read_text()
    assert "predicted for images of 32×32, masks included" in card and "{''" not in card
