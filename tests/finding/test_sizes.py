"""How large the images are that a model is looked at with, fed and measured: who says so, and who is followed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers as tr
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.resizing import ask_size, image_shape, sizes_now
from ltm_retrofit.errors import ExampleError
from ltm_retrofit.finding.example import prepare_example, sizes_in_words, sizes_said
from ltm_retrofit.tuning.preprocessing import preprocessing_of

SMALL = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4, "intermediate_size": 48}
#: 28² makes 5 tokens, 56² makes 17, 70² makes 26
FIXED = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
LABELS = {"num_labels": 3}


def dinov2(folder: Path, processor: Any = None) -> nn.Module:
    """A small DINOv2, made for 70² and taking any, as it comes from a folder."""
    config = tr.Dinov2Config(image_size=70, patch_size=14, mlp_ratio=2, **SMALL, **LABELS)
    tr.Dinov2ForImageClassification(config).save_pretrained(folder)
    (processor or tr.BitImageProcessor(**FIXED)).save_pretrained(folder)
    return tr.Dinov2ForImageClassification.from_pretrained(folder).eval()


def vit(folder: Path, processor: Any) -> nn.Module:
    """A small ViT, which takes 32² and nothing else."""
    model = tr.ViTForImageClassification(tr.ViTConfig(image_size=32, patch_size=8, **SMALL, **LABELS))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return tr.ViTForImageClassification.from_pretrained(folder).eval()


def timm_vit(**options: Any) -> nn.Module:
    tiny = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 32, **tiny, **options}).eval()


def photographs(count: int = 12) -> Dataset:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (61, 83, 3), dtype=np.uint8)) for _ in range(count)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"image": images, "label": [n % 3 for n in range(count)]}, features=features)


# ---------------------------------------------------------------------------------------------------- who is followed


def test_the_image_processor_comes_before_the_config(tmp_path) -> None:
    sites = ltm.find_sites(dinov2(tmp_path))
    assert sites.sizes_said == {"image processor": (28, 28), "config": (70, 70)}
    assert sites.input_size == {"pixel_values": (1, 3, 28, 28)} and sites.tokens == 5
    assert str(sites).endswith("input 28×28 by the image processor, 5 tokens; the config says 70")


def test_a_size_that_the_model_does_not_take_is_not_followed_but_said(tmp_path) -> None:
    sites = ltm.find_sites(vit(tmp_path, tr.ViTImageProcessor()))
    assert sites.sizes_said == {"config": (32, 32), "image processor": (224, 224)}
    assert "input 32×32 by the config, 17 tokens; the image processor says 224" in str(sites)


@pytest.mark.parametrize(
    "processor",
    [tr.BitImageProcessor(size={"shortest_edge": 28}, do_center_crop=False), tr.DetrImageProcessor()],
    ids=["shortest-edge-only", "longest-edge"],
)
def test_an_image_processor_that_leaves_a_side_open_says_no_size(processor: Any, tmp_path) -> None:
    assert sizes_said(dinov2(tmp_path, processor)) == {"config": (70, 70)}


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (tr.ViTImageProcessor(size={"height": 28, "width": 42}), (28, 42)),
        (tr.ConvNextImageProcessor(size={"shortest_edge": 42}), (42, 42)),  # crops, though no attribute says so
    ],
    ids=["height-and-width", "convnext"],
)
def test_what_an_image_processor_makes_counts_not_what_it_is_called(processor: Any, size: Any, tmp_path) -> None:
    assert sizes_said(dinov2(tmp_path, processor))["image processor"] == size


def test_the_live_patch_embedding_comes_before_the_checkpoint() -> None:
    sites = ltm.find_sites(timm_vit())
    assert sites.sizes_said == {"patch embedding": (32, 32), "pretrained_cfg": (224, 224)}
    assert "input 32×32 by the patch embedding, 17 tokens; the pretrained_cfg says 224" in str(sites)


def test_an_example_comes_before_all(tmp_path) -> None:
    sites = ltm.find_sites(dinov2(tmp_path), torch.randn(2, 3, 42, 56))
    assert sites.sizes_said == {"example": (42, 56), "image processor": (28, 28), "config": (70, 70)}
    assert sites.tokens == 13
    said = "42×56 by the example, 13 tokens; the image processor says 28; the config says 70"
    assert sizes_in_words(sites.sizes_said, 13) == said


def test_a_model_on_the_meta_device_is_planned_for_the_image_processors_size(tmp_path) -> None:
    assert ltm.find_sites(dinov2(tmp_path).to("meta")).tokens == 5


@pytest.mark.slow
def test_a_size_is_looked_for_in_the_hubs_cache_and_not_on_the_network(tmp_path) -> None:
    """As somebody has it who loaded model and image processor from the Hub before."""
    there = tmp_path / "hub" / "models--somebody--model"
    dinov2(there / "snapshots" / "abc")
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("abc")
    code = """
import socket, transformers, ltm_retrofit as ltm
from ltm_retrofit.finding.example import sizes_said
model = transformers.AutoModelForImageClassification.from_pretrained("somebody/model", local_files_only=True)
def refuse(*args, **kwargs): raise SystemExit("the network was asked")
socket.create_connection = socket.socket.connect = socket.getaddrinfo = refuse
print(sizes_said(model))
"""
    settings = {**os.environ, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    settings.pop("HF_HUB_OFFLINE", None)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings, timeout=120)
    assert shown.stdout.strip() == "{'image processor': (28, 28), 'config': (70, 70)}", shown.stderr


# ------------------------------------------------------------------------------------------------- what was asked for


@pytest.mark.parametrize("size", [(42, 42), (28, 56)], ids=str)
def test_what_was_asked_for_comes_before_all_that_the_model_says(size: tuple[int, int], tmp_path) -> None:
    model = dinov2(tmp_path)
    ask_size(model, size)
    assert next(iter(sizes_said(model).items())) == ("request", size)
    assert prepare_example(model, None)["pixel_values"].shape == (1, 3, *size)
    assert preprocessing_of(model)(Image.new("RGB", (90, 70))).shape == (3, *size)


def test_timms_own_method_sets_the_size_that_was_asked_for(tmp_path) -> None:
    model = timm_vit()
    ask_size(model, (48, 48))
    assert model.patch_embed.img_size == (48, 48)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8))
    assert ltm.get_plan(model).sizes_said["request"] == (48, 48)
    ltm.save_pretrained(model, tmp_path)
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(ltm.from_pretrained(tmp_path)(images), model(images))


@pytest.mark.parametrize(
    ("build", "size", "reason"),
    [
        (timm_vit, (1, 1), "does not take images of 1×1"),
        (
            lambda: tr.ViTForImageClassification(tr.ViTConfig(image_size=32, patch_size=8, **SMALL)).eval(),
            (48, 48),
            r"does not take images of 48×48. It is made for 32×32 by the config",
        ),
    ],
    ids=["timm-nothing-left", "hf-vit"],
)
def test_a_size_that_the_model_does_not_take_is_refused_and_nothing_changes(build, size, reason) -> None:
    model = build()
    before, image = dict(vars(model)), torch.randn(1, 3, 32, 32)
    with pytest.raises(ExampleError, match=reason):
        ask_size(model, size)
    assert vars(model).keys() == before.keys()
    model(image)


def test_a_converted_model_keeps_to_its_plan(tmp_path) -> None:
    model = ltm.retrofit(dinov2(tmp_path), ltm.LTMConfig(flops=0.8))
    ask_size(model, (28, 28))
    with pytest.raises(ExampleError, match=r"converted for images of \(28, 28\), not \(42, 42\): convert the original"):
        ask_size(model, (42, 42))


# -------------------------------------------------------------------------------------- kept, and used by all the rest


@pytest.fixture
def converted(tmp_path: Path) -> nn.Module:
    return ltm.retrofit(dinov2(tmp_path / "host"), ltm.LTMConfig(flops=0.8))


def test_the_plan_keeps_the_size_and_its_source(converted: nn.Module, tmp_path) -> None:
    plan = ltm.get_plan(converted)
    assert plan.sizes_said == {"image processor": (28, 28), "config": (70, 70)}
    assert str(plan).endswith("input 28×28 by the image processor, 5 tokens; the config says 70")
    ltm.save_pretrained(converted, tmp_path / "saved")
    again = ltm.from_pretrained(tmp_path / "saved")
    assert ltm.get_plan(again) == plan == ltm.MergePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert sizes_now(again) == plan.sizes_said and image_shape(again) == (3, 28, 28)


def test_a_plan_of_before_has_an_unknown_source(converted: nn.Module) -> None:
    values = ltm.get_plan(converted).to_dict()
    del values["sizes_said"]
    plan = ltm.MergePlan.from_dict(values)
    assert plan.sizes_said == {} and "input" not in str(plan)
    ltm.restore(converted)
    ltm.retrofit(converted, plan=plan)
    assert sizes_now(converted) == {"plan": (28, 28)}


def test_data_report_and_timing_are_of_the_plans_size(converted: nn.Module, tmp_path) -> None:
    ltm.save_pretrained(converted, tmp_path / "saved")
    for model in (converted, ltm.from_pretrained(tmp_path / "saved")):
        assert preprocessing_of(model).shape == (3, 28, 28)
        report = ltm.measure(model, data=photographs(), batches=(1,), rounds=1)
        assert report.macs["converted"] == ltm.get_plan(model).macs


def test_a_model_planned_at_another_size_than_its_configs_is_tuned_and_measured(converted: nn.Module, tmp_path) -> None:
    """It was fed images of the config's size, and failed after the training, with no model written."""
    ltm.save_pretrained(converted, tmp_path / "saved")
    model = ltm.from_pretrained(tmp_path / "saved")
    sizes = set()
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.add(tuple((*args, *kwargs.values())[0].shape[2:])), with_kwargs=True
    )
    ltm.finetune(model, photographs(), config=ltm.TrainConfig(batch_size=4, held_out=0.0))
    handle.remove()
    assert sizes == {(28, 28)}
    assert ltm.measure(model, data=photographs(), batches=()).accuracy["finetuned"] is not None


def test_an_example_is_the_size_of_all_that_follows(tmp_path) -> None:
    model = ltm.retrofit(dinov2(tmp_path), ltm.LTMConfig(flops=0.8), torch.randn(1, 3, 56, 42))
    assert preprocessing_of(model).shape == (3, 56, 42)
    assert ltm.measure(model, batches=()).macs["converted"] == ltm.get_plan(model).macs


def test_a_plan_brings_its_size_along(tmp_path) -> None:
    model = dinov2(tmp_path)
    plan = ltm.make_plan(ltm.find_sites(model, torch.randn(1, 3, 56, 56)), ltm.LTMConfig(flops=0.8))
    ltm.retrofit(model, plan=plan)
    assert ltm.get_plan(model) == dataclasses.replace(plan, fixed_inputs=ltm.get_plan(model).fixed_inputs)
    assert image_shape(model) == (3, 56, 56)


def test_a_converted_timm_model_that_was_set_to_another_size_is_fed_that(tmp_path) -> None:
    model = ltm.retrofit(timm_vit(), ltm.LTMConfig(flops=0.8))
    assert image_shape(model) == (3, 32, 32)
    model.set_input_size(img_size=(48, 48))
    assert image_shape(model) == (3, 48, 48) and next(iter(sizes_now(model))) == "patch embedding"
