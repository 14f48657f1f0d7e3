"""After `import ltm_retrofit.auto`, the Auto classes of transformers take a folder and give the host, converted."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tr
from pieces import WIDE
from PIL import Image
from torch import nn
from zoo import randomise

import ltm_retrofit as ltm
import ltm_retrofit.auto
from ltm_retrofit.finding.example import tensors_of

torch.set_num_threads(1)

KINDS = {index: f"kind {index}" for index in range(7)}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def classifier() -> nn.Module:
    labels = {"id2label": KINDS, "label2id": {name: index for index, name in KINDS.items()}}
    return tr.ViTForImageClassification(tr.ViTConfig(**WIDE, **labels))


def tower() -> nn.Module:
    return tr.CLIPVisionModel(tr.CLIPVisionConfig(**WIDE))


def backbone() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4]}
    return tr.SwinBackbone(tr.SwinConfig(window_size=4, out_features=["stage1", "stage2"], **sizes))


@functools.cache
def _converted(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return ltm.retrofit(randomise(build()), ltm.LTMConfig(flops=0.85))


def converted(build: Callable[[], nn.Module]) -> nn.Module:
    return copy.deepcopy(_converted(build))


def saved(build: Callable[[], nn.Module], folder: Path) -> tuple[nn.Module, str]:
    model = converted(build)
    ltm.save_pretrained(model, folder)
    return model, str(folder)


def outputs(model: nn.Module, images: torch.Tensor = IMAGES) -> list[torch.Tensor]:
    with torch.no_grad():
        return tensors_of(model(images))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, outputs(one), outputs(other)))


@pytest.mark.parametrize(
    "build, auto",
    [
        (classifier, "AutoModelForImageClassification"),
        (classifier, "AutoModel"),
        (tower, "AutoModel"),
        (backbone, "AutoBackbone"),
        (backbone, "AutoModel"),
    ],
)
def test_an_auto_class_gives_the_hosts_class_converted(build, auto: str, tmp_path: Path) -> None:
    model, folder = saved(build, tmp_path / "saved")
    again = getattr(tr, auto).from_pretrained(folder)
    assert type(again) is type(model) and ltm.get_plan(again) == ltm.get_plan(model) and not again.training
    assert list(again.state_dict()) == list(model.state_dict()) and same(again, model)
    host = set(ltm.restore(copy.deepcopy(model)).state_dict())
    added = set(again.state_dict()) - host
    assert host < set(again.state_dict()) and added and all("ltm" in key.split(".") for key in added)


@pytest.mark.parametrize(
    "build, auto",
    [(classifier, "AutoModelForObjectDetection"), (classifier, "AutoBackbone"), (tower, "AutoModelForCausalLM")],
)
def test_the_class_of_another_task_is_refused_by_name(build, auto: str, tmp_path: Path) -> None:
    model, folder = saved(build, tmp_path / "saved")
    with pytest.raises(ltm.BaseMismatch, match=f"converted {type(model).__name__}, which {auto} does not load: use"):
        getattr(tr, auto).from_pretrained(folder)


def test_a_model_of_timm_is_none_of_transformers(tmp_path: Path) -> None:
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7).eval()
    ltm.save_pretrained(ltm.retrofit(host), tmp_path / "saved")
    with pytest.raises(ltm.BaseMismatch, match=r"VisionTransformer of timm.*ltm_retrofit\.from_pretrained"):
        tr.AutoModelForImageClassification.from_pretrained(str(tmp_path / "saved"))


def test_a_pipeline_takes_the_folder(tmp_path: Path) -> None:
    model, folder = saved(classifier, tmp_path / "saved")
    processor = tr.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    assert type(tr.AutoImageProcessor.from_pretrained(folder)) is type(processor)
    picture = Image.new("RGB", (40, 50), "red")
    ask = tr.pipeline("image-classification", model=folder, device="cpu")
    assert type(ask.model) is type(model) and ltm.is_retrofitted(ask.model)
    with torch.no_grad():
        scores = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]
    answers = {answer["label"]: answer["score"] for answer in ask(picture, top_k=7)}
    assert answers == pytest.approx({KINDS[index]: float(score) for index, score in enumerate(scores)})
    with pytest.raises(ltm.BaseMismatch, match="AutoModelForObjectDetection does not load"):
        tr.pipeline("object-detection", model=folder, device="cpu")


def test_what_users_of_transformers_pass_is_followed(tmp_path: Path) -> None:
    model, folder = saved(classifier, tmp_path / "saved")
    for load in (ltm.from_pretrained, tr.AutoModelForImageClassification.from_pretrained):
        again = load(
            folder,
            dtype="bfloat16",
            device_map={"": "cpu"},
            attn_implementation="eager",
            token="secret",
            cache_dir=tmp_path / "cache",
            revision="main",
            local_files_only=True,
        )
        assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16} == {again.dtype}
        assert again.config._attn_implementation == "eager" and again.ltm.readout.counts.dtype == torch.float32
        near = outputs(again, IMAGES.bfloat16())[0] - outputs(model)[0]
        assert float(near.abs().max()) < 0.1
        assert same(load(folder, dtype="auto", device_map="cpu"), model)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "int8"}, "floating dtype"),
        ({"dtype": "bfloat15"}, "floating dtype"),
        ({"device_map": {"vit": "cpu", "classifier": "meta"}}, "lies on one"),
        ({"device_map": "nowhere"}, "device_map must be a device"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation must be one of 'eager', 'sdpa'"),
        ({"num_labels": 3}, "cannot be loaded with num_labels"),
        ({"quantization_config": {"bits": 4}}, "cannot be loaded with quantization_config"),
    ],
)
def test_what_cannot_be_followed_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, folder = saved(classifier, tmp_path / "saved")
    with pytest.raises(ltm.RetrofitError, match=message):
        tr.AutoModelForImageClassification.from_pretrained(folder, **options)


def test_attention_is_chosen_only_where_it_can_be(tmp_path: Path) -> None:
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7).eval()
    ltm.save_pretrained(ltm.retrofit(host), tmp_path / "timm")
    with pytest.raises(ltm.RecipeError, match="VisionTransformer of timm: leave it out"):
        ltm.from_pretrained(tmp_path / "timm", attn_implementation="eager")
    _, folder = saved(classifier, tmp_path / "saved")
    with pytest.raises(ltm.RecipeError, match="not both"):
        ltm.from_pretrained(folder, base=classifier(), attn_implementation="eager")


def test_the_configuration_names_the_classes_and_stays_as_it_is(tmp_path: Path) -> None:
    _, folder = saved(classifier, tmp_path / "saved")
    config = tr.AutoConfig.from_pretrained(folder)
    assert config.model_type == "ltm_retrofit" and config.id2label == KINDS
    with pytest.raises(ltm.RecipeError, match="num_labels"):
        tr.AutoConfig.from_pretrained(folder, num_labels=3)
    with pytest.raises(ltm.CheckpointError, match="from_config makes random weights"):
        tr.AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("kind", [tr.ViTForImageClassification, tr.ViTModel])
def test_a_class_of_transformers_does_not_load_the_host_without_its_masks(kind, tmp_path: Path) -> None:
    _, folder = saved(classifier, tmp_path / "saved")
    with pytest.raises(OSError, match=r"load this folder by ltm_retrofit\.from_pretrained"):
        kind.from_pretrained(folder)


def test_without_the_import_transformers_says_that_it_does_not_know_the_folder(tmp_path: Path) -> None:
    _, folder = saved(classifier, tmp_path / "saved")
    code = f"import transformers; transformers.AutoModel.from_pretrained({folder!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode and "has model type `ltm_retrofit`" in run.stderr


def test_the_model_card_shows_lines_that_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved(classifier, tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"```python\n(.*?)```", Path(folder, "README.md").read_text(), re.S)
    assert len(shown) == 2 and "AutoModelForImageClassification" in shown[1]
    for code in shown:
        assert len([line for line in code.splitlines() if line]) <= 3
        names: dict[str, Any] = {}
        exec(code, names)
        assert same(names["model"], model)


def test_folders_of_the_format_before_load_too(tmp_path: Path) -> None:
    model, folder = saved(classifier, tmp_path / "saved")
    file = Path(folder, "config.json")
    config = json.loads(file.read_text())
    config["base"]["model_type"] = config["base"]["config"]["model_type"]
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in ("model_type", "transformers_weights")}))
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 2}))
    assert same(ltm.from_pretrained(folder), model)
