"""Defects that a fresh reader found; each of these failed first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.cli import main
from ltm_retrofit.errors import (
    AlreadyRetrofitted,
    DataError,
    ExampleError,
    RecipeError,
    RetrofitError,
    TrainingError,
    UnsupportedBlock,
)
from ltm_retrofit.tuning.preprocessing import Preprocessing, make_transform, preprocessing_of

CONFIG = ltm.LTMConfig(flops=0.7)


class MixingTail(nn.Module):
    """A block whose MLP part takes the mean over tokens away."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        x = x + self.block.attn(self.block.norm1(x))
        y = self.block.mlp(self.block.norm2(x))
        return x + (y - y.mean(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mixing_tail_is_seen_in_every_precision(build, dtype) -> None:
    model = build("timm-vit")
    for index, block in enumerate(model.blocks):
        model.blocks[index] = MixingTail(block)
    sites = ltm.find_sites(model.eval().to(dtype))
    assert sites.flow == () and len(sites.narrowed) == 6
    assert all("proof (b)" in reason for reason in sites.narrowed.values())


def test_a_block_with_a_forward_of_its_own_is_left_alone(build, images) -> None:
    model = build("timm-vit")
    block = model.blocks[3]
    inner = block.forward
    block.forward = own = lambda x, attn_mask=None: inner(x) + 1
    expected = model(images)
    sites = ltm.find_sites(model)
    assert "blocks.3" not in [site.block for site in sites.flow] and "instance" in " ".join(sites.narrowed.values())
    ltm.restore(ltm.retrofit(model, ltm.LTMConfig(flops=0.8)))
    assert block.forward is own and torch.equal(model(images), expected)


def test_labels_in_the_example_are_no_input(build, tmp_path: Path) -> None:
    model = build("hf-vit")
    example = {"pixel_values": torch.randn(1, 3, 32, 32), "labels": torch.tensor([1])}
    ltm.retrofit(model, CONFIG, example)
    assert set(ltm.get_plan(model).input_size) == {"pixel_values"}
    assert model.config.problem_type is None
    ltm.save_pretrained(model, tmp_path / "saved")
    assert ltm.is_retrofitted(ltm.from_pretrained(tmp_path / "saved"))


def test_an_image_processors_normalisation_survives_saving(build, tmp_path: Path) -> None:
    build("hf-vit").save_pretrained(tmp_path / "host")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "resample": 2,
        "size": {"height": 32, "width": 32},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.2, 0.3],
    }
    (tmp_path / "host" / "preprocessor_config.json").write_text(json.dumps(processor))
    model = ltm.load_model(str(tmp_path / "host"))
    wanted = preprocessing_of(model)
    assert wanted == Preprocessing((32, 32), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3), "bilinear", 1.0, crop_mode="squash")
    ltm.save_pretrained(ltm.retrofit(model, CONFIG), tmp_path / "saved")
    assert preprocessing_of(ltm.from_pretrained(tmp_path / "saved")) == wanted


def test_images_keep_their_proportions_unless_squashed() -> None:
    wide = Image.new("RGB", (64, 32))
    wide.paste((255, 255, 255), (0, 0, 16, 32))  # the left quarter: outside of the middle square
    cropped = make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3))(wide)
    squashed = make_transform(Preprocessing((32, 32), (0.0,) * 3, (1.0,) * 3, crop_mode="squash"))(wide)
    assert float(cropped.max()) < 0.1 and float(squashed.max()) > 0.9


def test_a_headless_model_has_no_classes(build) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=6, num_heads=3, num_classes=0
    )
    ltm.retrofit(model, CONFIG)
    assert ltm.get_plan(model).classes == 0
    with pytest.raises(TrainingError, match="no class logits"):
        ltm.finetune(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])
    with pytest.raises(TrainingError, match="no class logits"):
        ltm.measure(build("hf-clip"), data=[(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))], batches=())


def test_an_altered_plan_is_refused(build, tmp_path: Path) -> None:
    model = ltm.retrofit(build("timm-vit"), ltm.LTMConfig(flops=0.7, method="tome"))
    ltm.save_pretrained(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    rows = config["plan"]["rows"]
    rows[0]["tokens_out"] -= 3
    rows[1]["tokens_in"] -= 3
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RetrofitError, match="altered"):
        ltm.from_pretrained(tmp_path / "saved")


def test_finetune_looks_at_its_folder_first(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("ltm_retrofit.saving.load.find_model", lambda name: pytest.fail("work was begun"))
    (tmp_path / "mine.txt").write_text("keep me")
    for command in (["finetune", "anything", "--out", str(tmp_path)], ["convert", "anything", "--out", str(tmp_path)]):
        assert main(command) == 2
        assert "mine.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: ltm.retrofit("vit_tiny_patch16_224", CONFIG), UnsupportedBlock, "is a str"),
        (lambda m: ltm.retrofit(m, 0.7), RecipeError, r"LTMConfig\(flops=0.7\)"),
        (lambda m: ltm.retrofit(m, CONFIG, plan=ltm.make_plan(ltm.find_sites(m), CONFIG)), RecipeError, "not both"),
        (
            lambda m: ltm.retrofit(nn.Sequential(ltm.retrofit(m, CONFIG)), CONFIG, torch.randn(1, 3, 32, 32)),
            AlreadyRetrofitted,
            "part of this model",
        ),
        (lambda m: ltm.retrofit(m, CONFIG, torch.full((1, 3, 32, 32), float("nan"))), ExampleError, "not finite"),
        (lambda m: ltm.TrainConfig(lr="1e-4"), RecipeError, "1.0e-4"),
    ],
    ids=["model-name", "share-alone", "config-and-plan", "wrapped", "nan-example", "yaml-number"],
)
def test_wrong_arguments_are_named(build, call, error, said) -> None:
    with pytest.raises(error, match=said):
        call(build("timm-vit"))


def test_splits_must_agree_on_their_classes(tmp_path: Path) -> None:
    from ltm_retrofit.recipe import DataSection, ModelSection, Recipe, run_recipe

    for split, names in (("train", "abc"), ("test", "bcd")):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / name / "0.png")
    recipe = Recipe(model=ModelSection("digits_vit"), data=DataSection(name=str(tmp_path / "data")))
    with pytest.raises(DataError, match="two"):
        run_recipe(recipe, tmp_path / "out", say=lambda text: None)
