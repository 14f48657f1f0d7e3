"""predict: what a converted model answers, before merging and after; in Python and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.cli import main
from ltm_retrofit.converted.record import mark_finetuned
from ltm_retrofit.errors import DataError, ExampleError, NotRetrofitted, RecipeError, TrainingError
from ltm_retrofit.reporting import pictures
from ltm_retrofit.reporting import predict as room
from ltm_retrofit.tuning.classes import labels_of

Build = Callable[..., nn.Module]
NAMES = ("cat", "dog", "newt", "owl", "ox", "elk", "bee")


@pytest.fixture
def model(build: Build) -> nn.Module:
    made = ltm.retrofit(build("hf-vit"), ltm.LTMConfig(flops=0.75))
    made.config.id2label = dict(enumerate(NAMES))
    return made


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    rng, files = np.random.default_rng(0), []
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "deeper/c.webp"):
        files.append(tmp_path / "photos" / name)
        Image.fromarray(rng.integers(0, 256, (41, 50, 3), dtype=np.uint8)).save(files[-1])
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return files


def test_probabilities_are_the_models_with_merging_and_without(model: nn.Module, images: Tensor) -> None:
    predictions = ltm.predict(model.train(), images, top=3)
    with ltm.disabled(model):
        assert ltm.predict(model, images, top=3) == predictions
    assert all(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    model.eval()
    with torch.no_grad():
        after = model(images).logits.softmax(dim=-1)
        with ltm.disabled(model):
            before = model(images).logits.softmax(dim=-1)
    assert not torch.allclose(before, after, atol=1e-4)
    for index, one in enumerate(predictions):
        assert one.image == f"image {index}" and len(one.classes) == 3
        assert one.before.label == NAMES[before[index].argmax()] and one.after.label == NAMES[after[index].argmax()]
        for chance in (*one.classes, one.before, one.after):
            place = NAMES.index(chance.label)
            assert chance.before == pytest.approx(before[index, place].item(), abs=1e-6)
            assert chance.after == pytest.approx(after[index, place].item(), abs=1e-6)
        larger = torch.maximum(before[index], after[index])
        assert [one.label for one in one.classes] == [NAMES[place] for place in larger.argsort(descending=True)[:3]]


def test_paths_images_folders_and_tensors_get_the_same_answers(
    model: nn.Module, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ltm.predict(model, photos)
    assert [one.image for one in expected] == ["a.png", "b.jpg", "c.webp"]
    assert ltm.predict(model, photos[0].parent) == expected
    (alone,) = ltm.predict(model, str(photos[1]))
    assert alone.image == "b.jpg" and alone.after.after == pytest.approx(expected[1].after.after, abs=1e-6)
    opened = ltm.predict(model, [Image.open(file) for file in photos])
    tensors = ltm.predict(model, ltm.load_images(model, photos))
    for others in (opened, tensors):
        assert [one.image for one in others] == ["image 0", "image 1", "image 2"]
        assert [one.classes for one in others] == [one.classes for one in expected]
    monkeypatch.setattr(room, "AT_ONCE", 2)
    again = ltm.predict(model, ltm.load_images(model, photos))
    assert [one.image for one in again] == ["image 0", "image 1", "image 2"]
    for one, other in zip(again, expected, strict=True):
        assert one.after.after == pytest.approx(other.after.after, abs=1e-6)


def test_classes_that_do_not_exclude_one_another_have_probabilities_of_their_own(
    model: nn.Module, images: Tensor
) -> None:
    model.config.problem_type = "multi_label_classification"
    (one,) = ltm.predict(model, images[0], top=7)
    with torch.no_grad():
        after = model(images[:1]).logits.sigmoid()[0]
    assert {c.label: round(c.after, 5) for c in one.classes} == {
        name: round(value, 5) for name, value in zip(NAMES, after.tolist(), strict=True)
    }


def test_a_table_says_where_the_answer_is_another_one() -> None:
    cat, dog = room.Chance("cat", 0.6, 0.25), room.Chance("dog", 0.4, 0.75)
    assert str(ltm.Prediction("a.png", cat, dog, (dog, cat))) == (
        "a.png                            before    after\n"
        "  dog                            40.0 %   75.0 %\n"
        "  cat                            60.0 %   25.0 %\n"
        "  another answer: dog instead of cat"
    )
    assert "another" not in str(ltm.Prediction("a.png", cat, cat, (cat, dog)))


def test_classes_are_called_as_the_model_calls_them() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    names = labels_of(model, 1000)
    assert (names[0], names[134], names[517]) == ("tench", "crane (class 134)", "crane (class 517)")
    assert len(set(names)) == 1000
    assert labels_of(model, 2) == ["class 0", "class 1"]  # names of a classifier that is gone
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["on", "off"]}
    assert labels_of(model, 2) == ["on", "off"]


def test_what_cannot_be_answered_is_said(model: nn.Module, build: Build, tmp_path: Path) -> None:
    with pytest.raises(NotRetrofitted, match="not converted"):
        ltm.predict(build("timm-vit"), torch.zeros(3, 32, 32))
    with pytest.raises(TrainingError, match="puts out no class logits"):
        ltm.predict(ltm.retrofit(build("hf-clip")), torch.zeros(3, 32, 32))
    with pytest.raises(RecipeError, match="top=0 would show no class"):
        ltm.predict(model, torch.zeros(3, 32, 32), top=0)
    with pytest.raises(ExampleError, match="converted for"):
        ltm.predict(model, torch.zeros(3, 40, 40))
    with pytest.raises(DataError, match="no image in"):
        ltm.predict(model, tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.txt cannot be read as an image"):
        ltm.predict(model, tmp_path / "notes.txt")


# --------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    ltm.save_pretrained(model, tmp_path / "saved")
    return tmp_path / "saved"


def test_the_command_prints_what_the_call_returns_and_writes_a_picture(
    model: nn.Module, saved: Path, photos: list[Path], tmp_path: Path, capsys
) -> None:
    expected = ltm.predict(model, photos, top=2)
    out = tmp_path / "merges.png"
    assert main(["predict", str(saved), *map(str, photos), "--top", "2", "--picture", str(out)]) == 0
    said = capsys.readouterr().out
    assert "\n\n".join(map(str, expected)) in said and said.endswith(f"picture written to {out}\n")
    assert Image.open(out).size[1] > 3 * 100 * pictures.PANEL  # a row for each image
    assert main(["predict", str(saved), str(photos[0].parent), "--top", "2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == [json.loads(json.dumps(one.to_dict())) for one in expected]
    assert set(values[0]) == {"image", "before", "after", "classes"} and values[0]["before"] in NAMES


def test_of_a_tuned_model_it_is_said_what_before_is(
    model: nn.Module, photos: list[Path], tmp_path: Path, capsys
) -> None:
    mark_finetuned(model)
    ltm.save_pretrained(model, tmp_path / "tuned")
    assert main(["predict", str(tmp_path / "tuned"), str(photos[0])]) == 0
    assert "before   the tuned weights, and nothing merges" in capsys.readouterr().out


#: what is given to the command, and what it says
WRONG = [
    (["--top", "0"], "--top 0 would show no class"),
    (["--picture", "merges.docx"], "has no ending of a picture"),
    (["--picture", "nowhere/merges.png"], "would lie in nowhere, which is no folder"),
    (["--highlight", "3", "4"], "--highlight is of the picture"),
    (["--picture", "merges.png", "--highlight", "3", "400"], "--highlight 3 400 is not in the image"),
]


def test_the_command_says_what_is_wrong(saved: Path, photos: list[Path], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for options, message in WRONG:
        assert main(["predict", str(saved), str(photos[0]), *options]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("merges*"))


def test_the_command_takes_converted_models_and_images(saved: Path, tmp_path: Path, capsys) -> None:
    assert main(["predict", "digits_vit", "cat.jpg"]) == 2
    assert "digits_vit is not converted: run `ltm-retrofit convert` on it first" in capsys.readouterr().err
    assert main(["predict", str(saved), str(tmp_path / "cat.jpg")]) == 2
    assert "cat.jpg cannot be read as an image: No such file" in capsys.readouterr().err
