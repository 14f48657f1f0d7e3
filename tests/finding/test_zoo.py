"""Every block structure of the zoo: sites are found, the conversion costs what was planned, trains, and goes away."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conversions import batch, call, equal, slow_but
from torch import nn
from zoo import ZOO, Example
from zoo_timm import TIMM, family

import ltm_retrofit as ltm
from ltm_retrofit import convert
from ltm_retrofit.converted.record import masks_of
from ltm_retrofit.finding.example import tensors_of
from ltm_retrofit.macs import count_macs

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]

#: of each scope and library the structures that differ most, and that take a second or few; the others are slow
FAST = (
    "timm-vit timm-vit-siglip-map timm-vit-respost timm-deit-distilled timm-eva-dinov3 timm-eva-rope-mixed timm-xcit "
    "timm-tnt timm-naflex-gap timm-pit timm-swin timm-mobilevit timm-cait timm-efficientvit-mit-b timm-vitamin "
    "hf-vit hf-dinov2-registers hf-dinov3 hf-clip hf-swin hf-imagegpt hf-timm-wrapper torchvision-vit "
    "plain-multihead plain-multihead-sequence-first plain-lucid"
).split()

#: what cannot be converted, and the words that say why; whatever else of the zoo is refused is a fault. What is left of
#: an attention pool is too little to be worth a mask
REFUSED = {"timm-resnet-clip": "no module around it keeps a token stream", "hf-imagegpt": "is causal"}


def _retrofit(model: nn.Module, example: Example) -> None:
    try:
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8), example)
    except ltm.BudgetError as error:
        ltm.retrofit(model, ltm.LTMConfig(flops=error.nearest), example)


def _buffers(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_buffers() if ".ltm." not in f".{name}"]


@pytest.mark.parametrize("name", slow_but(FAST, [name for name in ZOO if name not in REFUSED]))
def test_a_model_converts_trains_is_saved_and_comes_back(name, monkeypatch, tmp_path):
    model, example = ZOO[name]()
    fresh = copy.deepcopy(model)
    keys, buffers = list(model.state_dict()), _buffers(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = call(model, example)
    sites = ltm.find_sites(model, example)
    assert len(sites) > 0 and sites.attentions >= sites.covered > 0
    monkeypatch.setattr(convert, "find_sites", lambda *_: sites)  # sites hold no module: one search is enough
    _retrofit(model, example)

    plan = ltm.get_plan(model)
    assert plan.macs < plan.macs_original == sites.total_macs
    assert count_macs(model, example).total == plan.macs
    with torch.no_grad():
        merged = call(model, example)
    assert [t.shape for t in merged] == [t.shape for t in before] and not equal(merged, before)
    assert all(bool(torch.isfinite(t).all()) for t in merged)

    model.train()
    torch.manual_seed(0)
    outputs = [t for t in tensors_of(call(model, batch(example))) if t.is_floating_point()]
    torch.stack([t.square().mean() for t in outputs]).sum().backward()
    masks = masks_of(model)
    assert set(masks) == {row.site for row in plan.rows if row.action == "merge"}
    for site, mask in masks.items():
        for key, parameter in mask.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), f"{site}: {key}"
    assert _buffers(model) == buffers
    model.eval()
    ltm.save_pretrained(model, tmp_path / "saved", allow_unloadable=True)
    loaded = ltm.from_pretrained(tmp_path / "saved", base=fresh)
    with torch.no_grad():
        assert equal(call(loaded, example), call(model, example))

    ltm.restore(model)
    assert list(model.state_dict()) == keys and _buffers(model) == buffers
    model.load_state_dict(state)  # BatchNorm has learned
    with torch.no_grad():
        assert equal(call(model, example), before)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_says_why(name):
    model, example = ZOO[name]()
    with pytest.raises(ltm.UnsupportedBlock, match=REFUSED[name]):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8), example)
    assert not ltm.is_retrofitted(model)


def test_the_zoo_misses_no_family_of_the_coverage_matrix():
    assert set(FAST) <= set(ZOO)
    rows = json.loads((ROOT / "coverage.json").read_text(encoding="utf-8"))["rows"]
    measured = {row["family"] for row in rows if row["library"] == "timm"}
    assert len(measured) > 50
    assert measured - {family(name) for name in TIMM} == set()
