from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.saving import load
from ltm_retrofit.saving.load import find_model

Build = Callable[..., nn.Module]
ARGUMENTS = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}


def write_timm(model: nn.Module, folder: Path) -> Path:
    """As benchmarks/train_base.py writes the embedded model."""
    model.pretrained_cfg.update(input_size=(3, 32, 32), mean=(0.25,) * 3, crop_pct=1.0, tag="digits")
    timm.models.save_for_hf(
        model, folder, model_config={"label_names": list("abcdefg")}, model_args=ARGUMENTS, safe_serialization=True
    )
    return folder


@pytest.fixture
def timm_folder(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **ARGUMENTS).eval()
    return model, write_timm(model, tmp_path / "vit")


def test_timm_folder(timm_folder: tuple[nn.Module, Path], images: torch.Tensor, tmp_path: Path) -> None:
    model, folder = timm_folder
    state = torch.random.get_rng_state()
    loaded, origin = find_model(str(folder))
    assert torch.equal(state, torch.random.get_rng_state())
    assert "timm" in origin and str(folder) in origin
    assert torch.equal(loaded(images), model(images)) and not loaded.training
    assert loaded.pretrained_cfg["mean"][0] == 0.25 and loaded.pretrained_cfg["label_names"][0] == "a"
    ltm.save_pretrained(ltm.retrofit(loaded), tmp_path / "saved")
    again, origin = find_model(str(tmp_path / "saved"))
    assert "converted by ltm_retrofit" in origin and torch.equal(again(images), loaded(images))
    settings = [timm.data.resolve_model_data_config(one) for one in (again, loaded)]
    assert json.dumps(settings[0]) == json.dumps(settings[1])  # tuples and lists alike
    assert list(again.pretrained_cfg["label_names"]) == list(loaded.pretrained_cfg["label_names"])


def test_embedded_model(
    timm_folder: tuple[nn.Module, Path], images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = timm_folder
    monkeypatch.setattr(load, "_ASSETS", folder.parent)
    with pytest.raises(ltm.CheckpointError, match="lacks the embedded model"):
        ltm.load_model("digits_vit")
    folder.rename(folder.parent / "digits_vit")
    loaded, origin = find_model("digits_vit")
    assert origin.startswith("the embedded model") and torch.equal(loaded(images), model(images))


def test_timm_folder_that_does_not_fit(timm_folder: tuple[nn.Module, Path]) -> None:
    _, folder = timm_folder
    config = json.loads((folder / "config.json").read_text())
    for changes, message in [
        ({"architecture": "no_such"}, "no architecture 'no_such'"),
        ({"architecture": "hf-hub:a/b"}, "no architecture"),
        ({"model_args": {**config["model_args"], "checkpoint_path": "a.pth"}}, "checkpoint_path"),
        ({"model_args": {**config["model_args"], "depth": 3}}, "cannot be loaded"),
        ({"model_args": {**config["model_args"], "depth": 5}}, "cannot be loaded"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ltm.CheckpointError, match=message):
            ltm.load_model(str(folder))


def test_no_pickles(timm_folder: tuple[nn.Module, Path]) -> None:
    model, folder = timm_folder
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ltm.CheckpointError, match="safetensors"):
        ltm.load_model(str(folder))


@pytest.mark.parametrize("family", ["hf-deit-teacher", "hf-dinov2", "hf-clip"])
def test_transformers_folder(family: str, build: Build, images: torch.Tensor, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "saved")
    loaded, origin = find_model(str(tmp_path / "saved"))
    assert type(loaded) is type(model) and "transformers" in origin
    with torch.no_grad():
        assert torch.equal(loaded(images)[0], model(images)[0])


def test_transformers_folder_with_weights_missing(build: Build, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    build("hf-vit").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "classifier" not in key}, file, {"format": "pt"})
    with pytest.raises(ltm.CheckpointError, match=r"missing keys.*classifier"):
        ltm.load_model(str(tmp_path))


def test_transformers_folder_with_another_class(build: Build, tmp_path: Path) -> None:
    build("hf-vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["os.system"]}))
    with pytest.raises(ltm.CheckpointError, match="no model class"):
        ltm.load_model(str(tmp_path))


def test_unknown(tmp_path: Path) -> None:
    with pytest.raises(ltm.CheckpointError, match="did you mean 'vit_tiny_patch16_224'"):
        ltm.load_model("vit_tiny_patch16_225")
    with pytest.raises(ltm.CheckpointError, match="expected an existing folder"):
        ltm.load_model("./no/such/folder")
    with pytest.raises(ltm.CheckpointError, match=r"config\.json"):
        ltm.load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ltm.CheckpointError, match="neither"):
        ltm.load_model(str(tmp_path))
    with pytest.raises(ltm.CheckpointError, match="no pretrained weights"):
        ltm.load_model("vit_tiny_patch16_224.no_such_tag")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k", "nobody/nothing"])
def test_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ltm.CheckpointError, match="HF_HUB_OFFLINE is set"):
        ltm.load_model(name)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "nobody/nothing"])
def test_unreachable_hub_is_one_quick_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    began = time.perf_counter()
    with pytest.raises(ltm.CheckpointError, match=r"cannot be fetched.*Connect"):
        ltm.load_model(name)
    assert time.perf_counter() - began < 10


def test_a_hub_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltm_retrofit.hub.PATIENCE", 0.2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(3))
    began = time.perf_counter()
    with pytest.raises(ltm.CheckpointError, match="no answer"):
        ltm.load_model("nobody/nothing")
    assert time.perf_counter() - began < 2.5


def test_the_public_call_gives_the_model_itself(timm_folder: tuple[nn.Module, Path], images: torch.Tensor) -> None:
    model, folder = timm_folder
    assert torch.equal(ltm.load_model(str(folder))(images), model(images))
