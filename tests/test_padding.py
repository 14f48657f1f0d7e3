"""Padding tokens: they weigh nothing in a merge, whatever they hold; where nothing tells, it is refused."""

from __future__ import annotations

import pytest
import torch
from zoo import ZOO

import ltm_retrofit as ltm
from ltm_retrofit.macs import count_macs

torch.set_num_threads(1)


def _padded(example: dict, filling: float) -> dict:
    """The same image twice, the second with a quarter of its patches filled up."""
    out = {key: torch.cat([value, value]) for key, value in example.items()}
    count = out["pixel_attention_mask"].shape[1]
    side = round(count**0.5)
    out["pixel_attention_mask"][1, count - count // 4 :] = 0
    out["pixel_values"][1, count - count // 4 :] = filling
    out["spatial_shapes"][1] = torch.tensor([side - side // 4, side])
    return out


@pytest.fixture
def siglip2():
    model, example = ZOO["hf-siglip2-vision"]()
    return ltm.retrofit(model, ltm.LTMConfig(flops=0.8), example), example


def test_what_padding_holds_changes_nothing(siglip2):
    model, example = siglip2
    with torch.no_grad():
        one, other = (model(**_padded(example, filling)).pooler_output for filling in (0.0, 7.0))
    assert torch.isfinite(one).all()
    assert torch.allclose(one, other, atol=1e-5)


def test_images_without_padding_are_as_without_a_mask(siglip2):
    model, example = siglip2
    with torch.no_grad():
        alone, beside = model(**example).pooler_output, model(**_padded(example, 1.0)).pooler_output
    assert torch.allclose(alone[0], beside[0], atol=1e-5)


def test_with_nothing_merged_a_mask_is_the_hosts(siglip2):
    model, example = siglip2
    inputs = _padded(example, 1.0)
    with torch.no_grad(), ltm.disabled(model):
        expected = model(**inputs).pooler_output
    ltm.restore(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).pooler_output, expected)


def _naflex(model: torch.nn.Module, valid: int = 64) -> dict:
    """What timm's NaFlex loader hands to the model: one dict of patches, their places, and which are there."""
    grid = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), dim=-1).reshape(1, 64, 2)
    patches = torch.randn(1, 64, model.embeds.proj.in_features, generator=torch.Generator().manual_seed(0))
    return {"patches": patches, "patch_coord": grid, "patch_valid": torch.arange(64)[None] < valid}


def _beside(inputs: dict, filling: float) -> dict:
    """The same image twice, the second with a quarter of its patches filled up."""
    out = {key: torch.cat([value, value]) for key, value in inputs.items()}
    out["patch_valid"][1, 48:] = False
    out["patches"][1, 48:] = filling
    return out


@pytest.mark.parametrize("name", ["timm-naflex-gap", "timm-naflex-siglip-map", "timm-naflex-rope", "timm-naflex-radio"])
def test_naflex_takes_its_one_dict_and_its_padding(name):
    model, _ = ZOO[name]()
    inputs = _naflex(model)
    with torch.no_grad():
        whole = model(_beside(inputs, 1.0))
        ltm.retrofit(model, ltm.LTMConfig(flops=0.7), inputs)
        assert {row.scope for row in ltm.get_plan(model).rows} == {"FLOW"}
        assert count_macs(model, inputs).total == ltm.get_plan(model).macs
        one, other = model(_beside(inputs, 0.0)), model(_beside(inputs, 7.0))
        assert torch.isfinite(one).all() and torch.allclose(one, other, atol=1e-5)
        assert torch.allclose(one[:1], model(inputs), atol=1e-5)
        assert torch.equal(ltm.restore(model)(_beside(inputs, 1.0)), whole)


def test_naflex_of_a_dict_is_saved_and_loaded(tmp_path):
    model, _ = ZOO["timm-naflex-gap"]()
    inputs = _naflex(model)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7), inputs)
    ltm.save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(ltm.from_pretrained(tmp_path)(inputs), model(inputs))


def test_an_example_in_which_tokens_fill_up_is_refused():
    model, _ = ZOO["timm-naflex-gap"]()
    with pytest.raises(ltm.UnsupportedBlock, match="some tokens of the example are padding"):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8), _naflex(model, valid=50))


@pytest.mark.parametrize("example", ["image", "dict"])
def test_in_local_padding_is_refused_when_it_comes(example):
    model, image = ZOO["timm-naflex-gap"]()
    inputs = _naflex(model)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8, scope="LOCAL"), inputs if example == "dict" else image)
    with torch.no_grad():
        assert torch.isfinite(model(inputs)).all()
        with pytest.raises(ltm.UnsupportedBlock, match="which may hide tokens"):
            model(_beside(inputs, 0.0))
        with ltm.disabled(model):
            model(_beside(inputs, 0.0))


def test_in_local_the_mask_that_siglip2_makes_is_refused():
    model, example = ZOO["hf-siglip2-vision"]()
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8, scope="LOCAL"), example)
    with torch.no_grad():
        model(**example)
        with pytest.raises(ltm.UnsupportedBlock, match=r"attention_mask=.*, which may hide tokens"):
            model(**_padded(example, 0.0))
