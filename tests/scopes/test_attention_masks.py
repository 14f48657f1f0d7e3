"""Attention masks of models of one's own: padding weighs nothing, and what is no padding is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from own_nets import DIM, EXAMPLE, HEADS, Net, drawn
from torch import Tensor, nn

import ltm_retrofit as ltm

torch.set_num_threads(1)


class Padded(Net):
    low = -1e9

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x, mask = self.tokens(x), (1 - valid.float())[:, None, None, :] * self.low
        for block in self.blocks:
            x = block(x, None, mask)
        weight = valid.float()[..., None]
        return self.head((self.norm(x) * weight).sum(1) / weight.sum(1))


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_padding_weighs_nothing_however_it_is_masked(low, monkeypatch) -> None:
    monkeypatch.setattr(Padded, "low", low)
    model = drawn(Padded())
    inputs = {"x": EXAMPLE, "valid": torch.ones(1, 64, dtype=torch.long)}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8), inputs)
    assert {row.scope for row in ltm.get_plan(model).rows} == {"FLOW"}
    valid, one = torch.ones(1, 64, dtype=torch.long), EXAMPLE.clone()
    valid[:, 40:], other = 0, EXAMPLE.clone()
    other[..., 20:, :] = 7.0
    with torch.no_grad():
        torch.testing.assert_close(model(one, valid), model(other, valid))


def test_a_bias_that_is_no_mask_is_refused_by_name() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=4, num_heads=3).eval()
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
    bias = torch.zeros(1, 1, 1, 17)
    bias[..., 5:] = -6
    with pytest.raises(ltm.UnsupportedBlock, match="no mask of zeros and large negative numbers"):
        model(torch.randn(1, 3, 64, 64), attn_mask=bias)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = nn.MultiheadAttention(DIM, HEADS, batch_first=True), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attn(h, h, h, key_padding_mask=pad, need_weights=False)[0]
        return x + self.mlp(x)


class PackedNet(Net):
    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x, pad)
        return self.head(x.mean(1))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_padding_of_packed_attention_is_seen(kind) -> None:
    filled = torch.zeros(1, 64, dtype=kind)
    filled[:, 50:] = True if kind == torch.bool else -1e9
    model = drawn(PackedNet(Packed))
    with pytest.raises(ltm.UnsupportedBlock, match="some tokens of the example are padding"):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8), {"x": EXAMPLE, "pad": filled})
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8), {"x": EXAMPLE, "pad": torch.zeros(1, 64, dtype=kind)})
    assert {row.scope for row in ltm.get_plan(model).rows} == {"LOCAL"}
    with pytest.raises(ltm.UnsupportedBlock, match=r"key_padding_mask=\(1, 64\), which may hide tokens"):
        model(EXAMPLE, filled)
    with ltm.disabled(model):
        original = model(EXAMPLE, filled)
    assert torch.equal(ltm.restore(model)(EXAMPLE, filled), original)


class Encoded(Net):
    """torch's own encoder; with an even number of heads it has an inference path of one fused operator."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__(depth=0)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=nested)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x), src_key_padding_mask=pad)).mean(1))


@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
def test_the_fused_inference_path_merges_too(scope) -> None:
    model = ltm.retrofit(drawn(Encoded()), ltm.LTMConfig(flops=0.8, scope=scope), EXAMPLE)
    with torch.no_grad():
        fused = model(EXAMPLE)
        with ltm.disabled(model):
            assert not torch.allclose(model(EXAMPLE), fused, atol=1e-3)
    assert torch.allclose(model(EXAMPLE), fused, atol=1e-5)


@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_mask_of_torchs_encoder_is_refused_by_name(scope, nested) -> None:
    model, pad = drawn(Encoded(nested)), torch.arange(64)[None] >= 50
    with torch.no_grad():
        before = model(EXAMPLE, pad)
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8, scope=scope), EXAMPLE)
        with pytest.raises(ltm.UnsupportedBlock, match="nested tensor" if nested else "mask"):
            model(EXAMPLE, pad)
        assert torch.equal(ltm.restore(model)(EXAMPLE, pad), before)


@pytest.mark.parametrize("copied", ["itself", "deepcopy", "pickle"])
def test_a_watched_attention_is_left_as_it_was(copied) -> None:
    model = drawn(Net())
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8, scope="LOCAL"), EXAMPLE)
    made = {"itself": lambda m: m, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
    model = made[copied](model)
    mask = torch.zeros(1, 1, 64, 64)
    with torch.no_grad():
        expected = model(EXAMPLE)
        assert torch.equal(called_with(model, mask), expected)
        mask[..., 50:] = -torch.inf
        with pytest.raises(ltm.UnsupportedBlock, match="which may hide tokens"):
            called_with(model, mask)
        called_with(ltm.restore(model), mask)
    assert not any(module._forward_pre_hooks for module in model.modules())


def called_with(model: nn.Module, mask: Tensor) -> Tensor:
    x = model.tokens(EXAMPLE)
    for block in model.blocks:
        x = block(x, mask=mask)
    return model.head(model.norm(x).mean(1))
