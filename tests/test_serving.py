"""The blocks of docs/serving.md run as they stand, and give the model's own answers."""

from __future__ import annotations

import re
import shlex
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conversions import randomise
from PIL import Image

import ltm_retrofit as ltm
from ltm_retrofit.cli import parser

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
#: section → its blocks, in order
CODE = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.S)
    for section in re.split(r"^## ", PAGE, flags=re.M)
}
NEEDS = {
    "ONNX Runtime": ("onnxscript", "onnxruntime"),
    "OpenVINO": ("openvino",),
    "torch.export": (),
    "torch.compile": (),
}


def test_each_block_belongs_to_a_section_that_is_run() -> None:
    assert {section for section, blocks in CODE.items() if blocks} == set(NEEDS)
    assert sum(map(len, CODE.values())) == PAGE.count("```python") == 5


@pytest.mark.parametrize(
    ("section", "compiler"),
    [*((section, "eager") for section in NEEDS), pytest.param("torch.compile", "inductor", marks=pytest.mark.slow)],
)
def test_a_section_runs(section: str, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CI what `torch.compile` traced runs as it is: its compiler takes a minute."""
    for name in NEEDS[section]:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'ltm-retrofit[onnx,openvino]'")
    if compiler == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, name in enumerate(("one", "two", "three")):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/{name}.png")
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    model = ltm.retrofit(randomise(timm.create_model("vit_tiny_patch16_224", **tiny)), ltm.LTMConfig(tokens=(11,)))
    given: dict[str, Any] = {"model": model}
    for code in CODE[section]:
        if "optimum" in code and find_spec("optimum") is None:
            continue  # which wants an older transformers: tried in an environment of its own, as the page says
        exec(compile(code, "docs/serving.md", "exec"), given)
    answer = given["answer"] if section == "torch.compile" else given["logits"]
    with torch.no_grad():
        expected = model(given["images"])
    assert torch.allclose(torch.as_tensor(np.asarray(answer)), expected, rtol=0, atol=1e-4)


def test_commands_parse() -> None:
    lines = [
        line.split("#")[0] for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()
    ]
    assert [parser().parse_args(shlex.split(line)[1:]).command for line in lines] == ["export"] * 3


def test_sentences_are_short() -> None:
    prose = re.sub(r"```.*?```|<!--.*?-->", "", PAGE, flags=re.S)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#")))
    parts = re.split(r"\n\s*\n|\n(?=- )", re.sub(r"\]\([^)]*\)", "]", prose))
    sentences = [one for part in parts for one in re.split(r"(?<=[.:;?])\**\s+", " ".join(part.split()))]
    assert not [one for one in sentences if len([word for word in one.split() if re.search(r"\w", word)]) > 25]
