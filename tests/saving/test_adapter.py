"""Adapters: small, attached by one call to the base that they were trained on, and to no other."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from pieces import batches, equal, weights
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import fingerprint
from ltm_retrofit.errors import BaseMismatch, CheckpointError
from ltm_retrofit.tuning.classes import set_classes
from ltm_retrofit.tuning.settings import TrainConfig

FAMILIES = ["timm-vit", "hf-vit"]


def tuned(model: nn.Module, train: str = "masks", classes: int = 7) -> nn.Module:
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
    data = [(images, labels % classes) for images, labels in batches(5, 70)]
    ltm.finetune(model, data, config=TrainConfig(lr=1e-2, train=train))
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(batches(1)[0][0])
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("train", ["masks", "masks+norms"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_brings_its_model_back(name, train, build, tmp_path) -> None:
    model = tuned(build(name), train)
    ltm.save_pretrained(model, tmp_path / "adapter", adapter=True)
    base = build(name)
    again = ltm.from_pretrained(tmp_path / "adapter", base=base)
    assert again is base and equal(weights(again), weights(model)) and torch.equal(logits(again), logits(model))
    file = tmp_path / "adapter" / "model.safetensors"
    assert file.stat().st_size < 0.9 * sum(v.numel() * v.element_size() for v in weights(model).values())
    ltm.save_pretrained(again, tmp_path / "again", adapter=True)  # an adapter of an adapter is for the same base
    assert equal(weights(ltm.from_pretrained(tmp_path / "again", base=build(name))), weights(model))


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_a_new_classifier_travels_with_its_adapter(name, build, tmp_path) -> None:
    model, names = build(name), [f"kind {index}" for index in range(5)]
    set_classes(model, names)
    tuned(model, classes=5)
    ltm.save_pretrained(model, tmp_path / "adapter", adapter=True)
    again = ltm.from_pretrained(tmp_path / "adapter", base=build(name))
    assert torch.equal(logits(again), logits(model)) and logits(again).shape[1] == 5
    known = list(again.config.id2label.values()) if name == "hf-vit" else again.pretrained_cfg["label_names"]
    assert known == names


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit"])
def test_a_new_classifier_without_names_travels_too(name, build, tmp_path) -> None:
    model = build(name)
    set_classes(model, 5)
    tuned(model, classes=5)
    ltm.save_pretrained(model, tmp_path / "adapter", adapter=True)
    again = ltm.from_pretrained(tmp_path / "adapter", base=build(name))
    assert torch.equal(logits(again), logits(model))
    assert name == "hf-vit" or "label_names" not in again.pretrained_cfg


@pytest.mark.parametrize("how", ["other-weights", "other-architecture", "converted"])
def test_another_base_is_refused_and_left_alone(how, build, tmp_path) -> None:
    ltm.save_pretrained(tuned(build("timm-vit")), tmp_path / "adapter", adapter=True)
    base = build("hf-vit" if how == "other-architecture" else "timm-vit")
    if how == "other-weights":
        with torch.no_grad():
            base.blocks[2].mlp.fc1.weight[0, 0] += 1e-3
    if how == "converted":
        ltm.retrofit(base)
    before = weights(base)
    with pytest.raises(ltm.AlreadyRetrofitted if how == "converted" else BaseMismatch):
        ltm.from_pretrained(tmp_path / "adapter", base=base)
    assert equal(weights(base), before) and ltm.is_retrofitted(base) == (how == "converted")


def test_an_adapter_that_does_not_fit_leaves_the_base_as_it_was(build, tmp_path) -> None:
    model = build("timm-vit")
    set_classes(model, [str(index) for index in range(5)])
    ltm.save_pretrained(tuned(model, classes=5), tmp_path / "adapter", adapter=True)
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    config["plan"]["rows"][0]["site"] = "blocks.17"
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config))
    base = build("timm-vit").train()
    before, expected = weights(base), logits(build("timm-vit"))
    with pytest.raises(ltm.RetrofitError):
        ltm.from_pretrained(tmp_path / "adapter", base=base)
    assert equal(weights(base), before) and base.training and base.num_classes == 7
    assert not ltm.is_retrofitted(base) and torch.equal(logits(base.eval()), expected)


def test_without_its_base_an_adapter_says_what_it_needs(build, tmp_path) -> None:
    ltm.save_pretrained(tuned(build("timm-vit")), tmp_path / "adapter", adapter=True)
    with pytest.raises(CheckpointError, match=r"is an adapter.*pass from_pretrained\(path, base="):
        ltm.from_pretrained(tmp_path / "adapter")
    assert "base=base" in (tmp_path / "adapter" / "README.md").read_text()


def test_a_base_that_cannot_be_fetched_may_be_brought(tmp_path) -> None:
    model = ltm.retrofit(
        timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7).eval(), ltm.LTMConfig(0.9)
    )
    ltm.save_pretrained(model, tmp_path / "adapter", adapter=True)
    said = json.loads((tmp_path / "adapter" / "config.json").read_text())["base"]
    assert said["id"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(
        CheckpointError, match=rf"{said['id']} .*base of this adapter.*pass from_pretrained\(path, base="
    ):
        ltm.from_pretrained(tmp_path / "adapter", local_files_only=True)


def test_where_everything_was_trained_there_is_no_adapter(build, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"save it whole \(adapter=False\)"):
        ltm.save_pretrained(tuned(build("timm-vit"), "all"), tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("classes, most", [(100, 1e6), (1000, 2e6)])
def test_an_adapter_of_vit_s_is_small(classes, most, tmp_path) -> None:
    model = timm.create_model("vit_small_patch16_224", num_classes=classes).eval()
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
    assert sum(row.action == "merge" for row in ltm.get_plan(model).rows) == 5
    ltm.save_pretrained(model, tmp_path / "adapter", adapter=True)
    assert (tmp_path / "adapter" / "model.safetensors").stat().st_size <= most


def test_a_first_step_that_moves_ones_up_and_down_is_seen() -> None:
    ones = torch.ones(64)
    moved = ones + 1e-3 * torch.tensor([1.0, -1.0]).repeat(32)
    assert fingerprint(moved) != fingerprint(ones) == fingerprint(torch.ones(64))
    assert fingerprint(moved.flip(0)) != fingerprint(moved)


@pytest.mark.parametrize("train", ["masks", "masks+norms"])
def test_a_new_classifier_with_a_norm_of_its_own_travels_whole(train: str, tmp_path) -> None:
    """LeViT's classifier has a batch norm, whose averages are as new as its weights, whether they have moved or not."""

    def host() -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model("levit_128s", num_classes=7).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
        return model

    model = host()
    assert set_classes(model, 5) == "new"
    model = ltm.retrofit(model, ltm.LTMConfig(flops=0.95))
    images = torch.randn(10, 3, 224, 224)
    ltm.finetune(model, [(images, torch.arange(10) % 5)], config=TrainConfig(train=train, bound="none"))
    ltm.save_pretrained(model.eval(), tmp_path / "adapter", adapter=True)
    again = ltm.from_pretrained(tmp_path / "adapter", base=host())
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
