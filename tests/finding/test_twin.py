"""Models on the meta device: planned on a twin as they would be with values."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as tr
from accelerate import init_empty_weights

import ltm_retrofit as ltm
from ltm_retrofit import find
from ltm_retrofit.finding import walk
from ltm_retrofit.finding.example import prepare_example
from ltm_retrofit.macs import count_macs
from ltm_retrofit.rehearsal import rehearse

torch.set_num_threads(1)
DEEP = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 9, "num_heads": 3, "num_classes": 7}
SWIN = {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 6), "num_heads": (1, 2)}
MODELS = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", **DEEP),
    "eva-rope": lambda: timm.create_model("eva02_tiny_patch14_224", **DEEP),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=7, **SWIN),
}


@pytest.fixture(params=MODELS)
def pair(request, monkeypatch):
    """The same architecture on the CPU and on the meta device; twins are cut short though it is small."""
    monkeypatch.setattr(walk, "SHORTENED", 0)
    monkeypatch.setattr(find, "WHOLE", 0)
    with init_empty_weights(include_buffers=False):
        empty = MODELS[request.param]().eval()
    return MODELS[request.param]().eval(), empty


def test_a_model_on_the_meta_device_gets_the_plan_of_one_with_values(pair):
    model, empty = pair
    ours, theirs = ltm.find_sites(empty), ltm.find_sites(model)
    assert [site.block for site in ours] == [site.block for site in theirs]
    assert ours.total_macs == theirs.total_macs == count_macs(model, prepare_example(model, None)).total
    config = ltm.LTMConfig(flops=0.8)
    assert ltm.make_plan(ours, config).rows == ltm.make_plan(theirs, config).rows
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_rehearsal_proves_the_twin_and_counts_the_full_model(pair):
    _, empty = pair
    example = torch.randn(1, 3, *prepare_example(empty, None).shape[2:])
    sites = ltm.find_sites(empty, example)
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=0.8))
    assert rehearse(empty, example, sites, plan) == plan.macs
    assert not ltm.is_retrofitted(empty)


def test_blocks_that_count_themselves_are_taken_whole(monkeypatch):
    """ConViT joins its class token before a block of a certain number."""
    monkeypatch.setattr(walk, "SHORTENED", 0)
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 9, "num_heads": 3, "num_classes": 7}
    with init_empty_weights(include_buffers=False):
        empty = timm.create_model("convit_tiny", local_up_to_layer=7, **arguments).eval()
    sites = ltm.find_sites(empty)
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=0.85))
    assert {site.layout.tokens for site in sites} == {64, 65}
    assert rehearse(empty, torch.randn(1, 3, 32, 32), sites, plan) == plan.macs


def test_a_block_that_the_head_reads_is_not_cut_away(monkeypatch):
    """VitPose's head may read any block: in a short twin that would be the last one, and the rest is in vain."""
    monkeypatch.setattr(walk, "SHORTENED", 0)
    monkeypatch.setattr(find, "WHOLE", 0)
    monkeypatch.setattr(walk, "kept_of", lambda _: 2)  # with the first two, which differ, and the last: four
    sizes = {"image_size": (64, 64), "patch_size": (8, 8), "hidden_size": 48, "num_attention_heads": 3}
    backbone = tr.VitPoseBackboneConfig(num_hidden_layers=8, out_indices=[4], **sizes)
    config = tr.VitPoseConfig(backbone_config=backbone, num_labels=2)
    with init_empty_weights(include_buffers=False):
        empty = tr.VitPoseForPoseEstimation(config).eval()
    example = {"pixel_values": torch.randn(1, 3, 64, 64)}
    sites, real = ltm.find_sites(empty, example), ltm.find_sites(tr.VitPoseForPoseEstimation(config).eval(), example)
    assert [(s.block, s.scope) for s in sites] == [(s.block, s.scope) for s in real]
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=0.8))
    assert rehearse(empty, example, sites, plan, kept=None) == plan.macs
