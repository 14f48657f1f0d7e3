"""The guide for one's own photographs: its commands exist, and its server's code runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

import ltm_retrofit as ltm
from ltm_retrofit.cli import COMMANDS, parser

PAGE = (Path(__file__).parents[1] / "docs" / "own_photographs.md").read_text(encoding="utf-8")


def test_every_command_is_one_of_the_command_line() -> None:
    given = [line.removeprefix("$ ltm-retrofit ") for line in PAGE.splitlines() if line.startswith("$ ")]
    given += [
        " ".join(each.split()).removeprefix("ltm-retrofit ") for each in re.findall(r"`(ltm-retrofit [^`]+)`", PAGE)
    ]
    assert len(given) >= 6
    for each in given:
        assert parser().parse_args(shlex.split(each)).command in COMMANDS


def test_the_page_is_whole_and_its_picture_is_there() -> None:
    assert "@@" not in PAGE
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / picture).is_file()


def test_the_servers_code_gives_the_models_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
    names = [f"kind {index}" for index in range(7)]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    Dinov2ForImageClassification(Dinov2Config(**shape, **labels)).save_pretrained("checkpoint")
    sizes = {"size": {"shortest_edge": 60}, "crop_size": {"height": 56, "width": 56}}
    BitImageProcessor(**sizes).save_pretrained("checkpoint")
    model = ltm.retrofit(ltm.load_model("checkpoint"), ltm.LTMConfig(tokens=(12,)))
    ltm.export(model, "served", seconds=0)
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    found: dict[str, object] = {}
    exec(block, found)
    (here,) = ltm.predict(model, "photo.jpg", top=7)
    served = torch.as_tensor(found["logits"]).softmax(dim=1)[0]
    for one in here.classes:
        assert one.after == pytest.approx(float(served[names.index(one.label)]), abs=1e-4)
