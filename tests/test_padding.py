"""Tokens that only fill up: they weigh nothing in a merge, whatever they hold; where nothing tells, it is refused."""

from __future__ import annotations

import pytest
import torch
from zoo import ZOO

import ltm_retrofit as ltm

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


def test_local_sites_are_refused_where_tokens_fill_up():
    model, _ = ZOO["timm-naflex-gap"]()
    size = model.embeds.proj.in_features
    grid = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), dim=-1).reshape(1, 64, 2)
    inputs = {
        "x": torch.randn(1, 64, size),
        "patch_coord": grid,
        "patch_valid": torch.ones(1, 64, dtype=torch.bool),
    }
    model(**inputs)
    with pytest.raises(ltm.UnsupportedBlock, match="only fill up"):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8), inputs)
