"""A model that was given another classifier, or another input size, after its conversion is saved as it is now."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conversions import call, converted, equal, slow_but
from torch import nn
from zoo import picture

import ltm_retrofit as ltm

torch.set_num_threads(1)
OF_EACH_SCOPE = ("timm-vit-flow", "timm-swin-local", "timm-efficientvit-grid", "hf-vit-flow")


def give_classifier(model: nn.Module, classes: int) -> None:
    """Give a classifier as one does: timm's method, or a module in the old one's place."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(classes)
    else:
        width = getattr(model.classifier, "in_features", None) or model.config.hidden_size
        model.classifier = nn.Linear(width, classes) if classes else nn.Identity()


def check(model: nn.Module, images: torch.Tensor, folder: Path, base: nn.Module | None = None) -> nn.Module:
    ltm.save_pretrained(model, folder)
    loaded = ltm.from_pretrained(folder, base=base)
    with torch.no_grad():
        assert equal(call(loaded, images), call(model.eval(), images))
        with ltm.disabled(model), ltm.disabled(loaded):
            assert equal(call(loaded, images), call(model, images))
    assert ltm.get_plan(loaded) == ltm.get_plan(model)
    return loaded


@pytest.mark.parametrize("onto", ["rebuilt", "base"])
@pytest.mark.parametrize("classes", [11, 0])
@pytest.mark.parametrize("name", slow_but(["timm-vit-flow", "hf-vit-flow"], OF_EACH_SCOPE))
def test_another_classifier_is_saved(name, classes, onto, tmp_path):
    model, original, example = converted(name)
    give_classifier(model, classes)
    base = None
    if onto == "base":
        give_classifier(base := original, classes)
    loaded = check(model, example, tmp_path / "saved", base)
    give_classifier(loaded, 5)
    check(loaded, example, tmp_path / "again")


def test_a_classifier_by_hand_where_there_was_none_is_saved(tmp_path):
    model, _, example = converted("hf-vit-flow")
    give_classifier(model, 0)
    check(model, example, tmp_path / "none")
    give_classifier(model, 5)
    assert ltm.get_plan(check(model, example, tmp_path / "five")).classes == 5


@pytest.mark.parametrize("name", ["timm-vit-flow", "hf-vit-flow"])
def test_another_classifier_travels_with_an_adapter(name, tmp_path):
    model, original, example = converted(name)
    give_classifier(model, 11)
    ltm.save_pretrained(model, tmp_path / "adapter", adapter=True)
    loaded = ltm.from_pretrained(tmp_path / "adapter", base=copy.deepcopy(original))
    with torch.no_grad():
        assert equal(call(loaded, example), call(model, example))
    give_classifier(model, 0)
    with pytest.raises(ltm.CheckpointError, match=r"has lost .*adapter=False"):
        ltm.save_pretrained(model, tmp_path / "without", adapter=True)


@pytest.mark.parametrize("name", ["timm-vit-flow", "timm-dinov3-flow", "timm-vit-local", "timm-swin-local"])
def test_another_input_size_is_saved(name, tmp_path):
    model, original, example = converted(name)
    side = 2 * example.shape[-1]
    model.set_input_size(img_size=(side, side))
    model.reset_classifier(11)
    loaded = check(model, picture(side), tmp_path / "saved")
    original.set_input_size(img_size=(side, side))
    original.reset_classifier(11)
    check(loaded, picture(side), tmp_path / "again", base=original)


def test_what_cannot_be_set_back_to_the_plans_size_is_refused_on_saving(tmp_path):
    model, _, example = converted("timm-vit-flow")
    side = 2 * example.shape[-1]
    model.set_input_size(img_size=(side, side))
    with pytest.raises(ltm.CheckpointError, match=r"was set to inputs of 64×64 .*adapter=False"):
        ltm.save_pretrained(model, tmp_path / "saved", adapter=True)
    model.set_input_size(img_size=(side, side), patch_size=8)
    with pytest.raises(ltm.CheckpointError, match=r"another patch size.*restore\(model\)"):
        ltm.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["hf-vit-flow", "timm-vit-flow"])
def test_a_model_that_costs_other_than_its_plan_is_not_saved(name, tmp_path) -> None:
    model, _, _ = converted(name)
    part, place = (model, "norm") if hasattr(model, "norm") else (model.vit, "layernorm")
    width = getattr(part, place).normalized_shape[0]
    setattr(part, place, nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)))
    with pytest.raises(ltm.CheckpointError, match="no longer is what its plan was made for"):
        ltm.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
