"""Several conversions of one model side by side: accuracy against MACs and time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import conversions
import pytest
import torch
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit import cli
from ltm_retrofit.finding.example import tensors_of
from ltm_retrofit.reporting import frontier as room
from ltm_retrofit.reporting.frontier import Frontier, Point, frontier
from ltm_retrofit.tuning.classes import count_classes


@pytest.mark.parametrize("name", ["timm-vit-flow", "hf-vit-flow", "timm-swin-local"])
def test_a_point_is_what_the_conversion_by_itself_is(name: str, pictures: Callable) -> None:
    again, model, example = conversions.converted(name)
    budget = ltm.get_plan(again).config.flops
    classes, size = count_classes(model), tensors_of(example)[0].shape[-1]
    data = pictures(2 * classes, classes, size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    *_, found = frontier(model, data, budgets=[budget], methods=["ltm"], rounds=3)
    assert not ltm.is_retrofitted(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    (point,) = found.points
    original = ltm.evaluate(model, data)
    converted = ltm.retrofit(model, ltm.LTMConfig(flops=budget))
    assert found.top1 == pytest.approx(original)
    assert point.change == pytest.approx(ltm.evaluate(converted, data) - original, abs=1e-4)
    plan = ltm.get_plan(converted)
    assert (point.share, point.tokens) == (plan.share, plan.tokens)
    assert 0 < point.time[1] <= point.time[0] <= point.time[2]


def test_divergence_and_its_error_are_those_of_the_images(build: Callable) -> None:
    model, images, labels = build("timm-vit"), torch.randn(9, 3, 32, 32), torch.arange(9) % 7
    *_, found = frontier(model, [(images, labels)], budgets=[0.6], rounds=3)
    with torch.no_grad():
        p = model.eval()(images).log_softmax(1)
        q = ltm.retrofit(model, ltm.LTMConfig(flops=0.6))(images).log_softmax(1)
    by = F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    assert found.points[0].kl == pytest.approx(float(by.mean()), rel=1e-4)
    assert found.points[0].kl_error == pytest.approx(float(by.std(correction=0)) / 3, rel=1e-4)


def test_what_is_known_is_not_measured_again_and_what_cannot_be_is_said(build: Callable, pictures: Callable) -> None:
    model, data, said = build("timm-vit"), pictures(14), list[str]()
    known = Point("ltm", "auto", 0.7, 0.69, (30,), -1.0, 0.5, 0.1, 0.01, (0.8, 0.7, 0.9))
    asked = {"budgets": [0.7, 0.001], "methods": ["ltm", "tome"], "rounds": 3, "known": [known], "say": said.append}
    *_, found = frontier(model, data, **asked)
    assert [point.asked for point in found.points] == [("ltm", "auto", 0.7), ("tome", "auto", 0.7)]
    assert found.points[0] == known
    assert len(found.left_out) == 1 and "ltm, auto, 0.001: " in found.left_out[0]  # the last point came before tome's
    assert sum("0.001" in line for line in said) == 2
    assert not ltm.is_retrofitted(model)


def test_a_converted_model_and_an_empty_question_are_refused(converted: Callable, build: Callable, pictures) -> None:
    with pytest.raises(ltm.AlreadyRetrofitted, match="restore the model first"):
        next(frontier(converted("timm-vit"), pictures(7), budgets=[0.7]))
    with pytest.raises(ltm.RecipeError, match="name a budget"):
        next(frontier(build("timm-vit"), pictures(7), budgets=[]))


def test_a_model_is_restored_where_measuring_fails(build: Callable, monkeypatch: pytest.MonkeyPatch, pictures) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no time")

    model = build("timm-vit")
    monkeypatch.setattr(room, "paired_latency", fail)
    with pytest.raises(RuntimeError, match="no time"):
        next(frontier(model, pictures(7), budgets=[0.7]))
    assert not ltm.is_retrofitted(model)


def test_the_picture_has_a_line_for_each_way() -> None:
    rest = (0.1, 0.01, (0.8, 0.7, 0.9))
    points = [
        Point(method, schedule, budget, budget, (5,), -1.0, 0.5, *rest)
        for method, schedule in (("ltm", "auto"), ("ltm", "calibrated"), ("tome", "auto"))
        for budget in (0.8, 0.5)
    ]
    found = Frontier("a model", "a machine", "some", 100, 8, 80.0, points)
    (axes,) = found.draw().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ltm", "ltm, calibrated", "tome"]
    assert Frontier(**{**found.to_dict(), "points": [*map(Point.from_dict, found.to_dict()["points"])]}) == found
    assert "79.00 %" in str(found) and "-1.00 ± 0.50" in found.to_markdown()


def test_the_command_goes_on_where_it_was(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "compared"
    command = ["compare", "digits_vit", "--data", "digits", "--limit", "40", "--methods", "tome", "--out", str(out)]
    whole = [*command, "--budgets", "0.8", "0.6", "--json"]
    measured, real = list[object](), room.paired_latency

    def interrupted(*args: object, **settings: object) -> object:
        if measured:
            raise KeyboardInterrupt
        measured.append(args)
        return real(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(room, "paired_latency", interrupted)
        assert cli.main(whole) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    first = json.loads((out / "compare.json").read_text())["points"]
    assert [point["budget"] for point in first] == [0.8]
    assert cli.main(whole) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["points"][0] == first[0] and [point["budget"] for point in values["points"]] == [0.8, 0.6]
    assert sorted(file.name for file in out.iterdir()) == ["compare.json", "compare.md", "compare.png"]
    assert cli.main([*command, "--budgets", "0.8", "--split", "train"]) == 2
    assert "holds another comparison" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budgets", "0.001"], "none of these conversions was possible"),
        (["--limit", "0"], "--limit is a whole number from 1 on, got 0"),
        (["--batch", "0"], "--batch is a whole number from 1 on, got 0"),
    ],
    ids=["budget", "limit", "batch"],
)
def test_the_command_says_what_is_wrong(options: list[str], said: str, tmp_path: Path, capsys) -> None:
    short = ["--limit", "40", "--methods", "ltm"]
    command = ["compare", "digits_vit", "--data", "digits", *short, "--out", str(tmp_path / "x"), *options]
    assert cli.main(command) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "x").exists()
