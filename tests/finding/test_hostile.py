"""Models that were written to fool the proofs: each once converted wrongly, crashed, or was refused for nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of, in_mode
from ltm_retrofit.finding import walk
from ltm_retrofit.macs import count_macs
from ltm_retrofit.merging.methods import Scope

torch.set_num_threads(1)
DIM, HEADS = 32, 4
EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        if rows is not None:
            q, k = q * rows, k * rows
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.attn, self.two = nn.LayerNorm(DIM), Attention(), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.one(x), rows, mask)
        return x + self.mlp(self.two(x))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module] = Block, depth: int = 4) -> None:
        super().__init__()
        self.seed, self.blocks = nn.Conv2d(3, DIM, 4, 4), nn.ModuleList(block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)

    def tokens(self, x: Tensor) -> Tensor:
        return self.seed(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def scopes(model: nn.Module, example: object = EXAMPLE) -> set[Scope]:
    return {site.scope for site in ltm.find_sites(model, example)}


# ------------------------------------------------------------------------------------------------------------- masks


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


# ------------------------------------------------------------------------------------------------------- rows, batches


class Rotary(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(1, 64, DIM // HEADS, generator=torch.Generator().manual_seed(1)) * 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x, self.table)
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("batch", [HEADS, 3])
def test_a_table_shared_by_heads_is_not_taken_for_one_of_each_image(batch) -> None:
    model = ltm.retrofit(drawn(Rotary()), ltm.LTMConfig(flops=0.7, scope="FLOW"), EXAMPLE)
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


class Scaled(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + self.attn(self.one(x)) * scale
        return x + self.mlp(self.two(x))


class Strong(Net):
    def forward(self, x: Tensor, strong: bool = True) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x, 3.0) if strong else block(x)
        return self.head(self.norm(x).mean(1))


def test_an_argument_that_a_call_leaves_out_has_its_default() -> None:
    model = ltm.retrofit(drawn(Strong(Scaled)), ltm.LTMConfig(flops=0.8), EXAMPLE)
    with pytest.raises(ltm.UnsupportedBlock, match=r"called with scale=1\.0; the cut was proven for scale=3\.0"):
        model(EXAMPLE, strong=False)


# ------------------------------------------------------------------------------------------------- what carries tokens


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(DIM), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Alternating(Net):
    def __init__(self) -> None:
        super().__init__(depth=0)
        mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        for _ in range(3):
            self.blocks.extend([Residual(Attention()), Residual(copy.deepcopy(mlp))])


def test_residual_modules_in_turn_are_local() -> None:
    model = drawn(Alternating())
    assert scopes(model) == {Scope.LOCAL}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8), EXAMPLE)
    assert count_macs(model, EXAMPLE).total == ltm.get_plan(model).macs


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = self.drop(block(x))
        return self.head(self.norm(x).mean(1))


def test_what_is_an_identity_only_while_nothing_is_trained_ends_a_run() -> None:
    model = ltm.retrofit(drawn(Dropping()), ltm.LTMConfig(flops=0.8), EXAMPLE)
    model.train()(EXAMPLE).sum().backward()


class Ending(Block):
    """Its last step is a dropout: still the block's own output."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


def test_a_dropout_within_a_block_ends_no_run() -> None:
    model = drawn(Net(Ending))
    assert scopes(model) == {Scope.FLOW}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7), EXAMPLE)
    model.train()(EXAMPLE).sum().backward()


class Inside(nn.Module):
    """Attention that adds its input, then lays it out or normalises it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attn, self.kind = Attention(), kind

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2) if self.kind == "map" else x
        y = y + self.attn(y)
        if self.kind == "norm":
            return F.layer_norm(y, (DIM,))
        return y.transpose(1, 2).reshape(x.shape) if self.kind == "map" else y * 1.0


class Around(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.seed, self.inside, self.kind = nn.Conv2d(3, DIM, 4, 4), Inside(kind), kind
        self.head = nn.Linear(64 * DIM, 5)  # reads places: neither FLOW nor GRID

    def forward(self, x: Tensor) -> Tensor:
        x = self.seed(x)
        return self.head(self.inside(x if self.kind == "map" else x.flatten(2).transpose(1, 2)).flatten(1))


@pytest.mark.parametrize("kind", ["map", "norm", "scale"])
def test_tokens_are_not_lost_where_an_attention_adds_its_input(kind) -> None:
    sites = ltm.find_sites(drawn(Around(kind)), EXAMPLE)
    assert "inside" not in [site.block for site in sites.local if site.mixes]


# ------------------------------------------------------------------------------------------------- constants, dtypes


class Constant(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.one(x)) * torch.tensor(0.5)
        return x + self.mlp(self.two(x))


class Computed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.one(x)) * self.scale.exp()
        return x + self.mlp(self.two(x))


@pytest.mark.parametrize("block", [Constant, Computed])
def test_a_constant_of_the_forward_leaves_local(block) -> None:
    model = drawn(Net(block))
    assert scopes(model) == {Scope.LOCAL}
    ltm.retrofit(model, ltm.LTMConfig(flops=0.85), EXAMPLE)


class Neighbours(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.one(x))
        h = self.two(x)
        return x + self.mlp(h + h.roll(1, 1))


class Mixed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x).to(self.norm.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_in_half_precision_are_proven_in_full(dtype) -> None:
    model = drawn(Mixed(Neighbours))
    for part in (model.blocks, model.norm, model.head):
        part.to(dtype)
    assert scopes(model) == {Scope.LOCAL}


class Hybrid(nn.Module):
    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.constant, self.seed, self.neck = constant, nn.Conv2d(3, DIM, 4, 4), nn.Conv2d(DIM, DIM, 3, padding=1)
        self.attn, self.head = Attention(), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.constant:
            x = x * torch.tensor([1.0, 2.0, 3.0]).view(1, -1, 1, 1)
        x = self.neck(self.seed(x))
        y = x + self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, tuple(x.shape[2:]))
        return self.head(self.neck(y).mean(dim=(2, 3)))


def test_a_constant_on_a_device_does_not_hide_a_smaller_grid() -> None:
    plain, constant = (ltm.find_sites(drawn(Hybrid(kind)), EXAMPLE) for kind in (False, True))
    assert [site.scope for site in constant] == [site.scope for site in plain]


# --------------------------------------------------------------------------------------------- places, prefix tokens


class Told(Block):
    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        assert rows * columns == x.shape[1]
        return super().forward(x)


class Telling(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.seed(x)
        size, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, *size)
        return self.head(self.norm(x).mean(1))


def test_a_block_that_is_told_how_its_tokens_lie_runs_at_every_size() -> None:
    model = drawn(Telling(Told))
    sites = ltm.find_sites(model, EXAMPLE)
    assert "rows=8, columns=8, by which tokens lie on a grid" in (sites.why("blocks.0") or "")
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8), EXAMPLE)
    assert model(torch.randn(2, 3, 40, 64)).shape == (2, 5)


class Numbered(Block):
    def forward(self, x: Tensor, heads: int, patch: int) -> Tensor:
        return super().forward(x)


class Numbering(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x, 15, 4)  # 15 · 4 is nearly as many as there are tokens
        return self.head(self.norm(x).mean(1))


def test_whole_numbers_that_say_nothing_of_the_grid_leave_flow() -> None:
    assert scopes(drawn(Numbering(Numbered))) == {Scope.FLOW}


class Bottleneck(nn.Module):
    """Narrows and widens again before its MLP of functions, in a block that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.down, self.up, self.fc1, self.fc2 = (
            nn.Linear(*sizes) for sizes in ((DIM, 8), (8, DIM), (DIM, 4 * DIM), (4 * DIM, DIM))
        )

    def forward(self, x: Tensor) -> Tensor:
        assert x.abs().max() < 1e9, "too large"
        x = x + torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), dim=-1) @ self.v(x)
        x = x + self.up(F.gelu(self.down(x)))
        return x + self.fc2(F.gelu(self.fc1(x)))


def test_an_adapter_is_not_taken_for_the_mlp() -> None:
    model = ltm.retrofit(drawn(Net(Bottleneck)), ltm.LTMConfig(flops=0.85), EXAMPLE)
    assert {name for row in ltm.get_plan(model).rows for name in [row.site] if "down" in name or "up" in name} == set()


class Registers(Net):
    """Joins constant tokens in each of the ways that there are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.registers = how, nn.Parameter(torch.randn(1, 4, DIM))

    def tokens(self, x: Tensor) -> Tensor:
        x = super().tokens(x)
        lead = self.registers.expand(len(x), -1, -1)
        match self.how:
            case "cat" | "concat" | "concatenate":
                return getattr(torch, self.how)([lead, x], dim=1)
            case "hstack":
                return torch.hstack([lead, x])
            case "type_as":
                return torch.cat([self.registers.type_as(x).expand(len(x), -1, -1), x], dim=1)
            case "zeros_like":
                return torch.cat([torch.zeros_like(x[:, :4]) + self.registers, x], dim=1)
        out = x.new_empty(len(x), 4 + x.shape[1], DIM)
        out[:, :4], out[:, 4:] = lead, x
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 4:].mean(1))


@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
@pytest.mark.parametrize("how", ["cat", "concat", "concatenate", "hstack", "type_as", "zeros_like", "assigned"])
def test_registers_are_seen_however_they_are_joined(how, scope) -> None:
    sites = ltm.find_sites(drawn(Registers(how)), EXAMPLE)
    found = [site for site in (*sites.found, *sites.alternatives) if site.scope == scope]
    assert found and all((site.layout.prefix, site.layout.grid) == (4, (8, 8)) for site in found)


def test_registers_that_join_late_are_seen() -> None:
    class Late(Registers):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](Net.tokens(self, x))
            x = torch.cat([self.registers.type_as(x).expand_as(x[:, :4]), x], dim=1)
            for block in list(self.blocks)[1:]:
                x = block(x)
            return self.head(self.norm(x).mean(1))

    sites = ltm.find_sites(drawn(Late("cat")), EXAMPLE)
    prefix = {site.block: site.layout.prefix for site in sites.local}
    assert prefix["blocks.0"] == 0 and {prefix[f"blocks.{number}"] for number in (1, 2, 3)} == {4}


# -------------------------------------------------------------------------------------------------- without numbers


class Group(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
def test_lists_within_lists_are_planned_for_on_the_meta_device(monkeypatch) -> None:
    monkeypatch.setattr(walk, "SHORTENED", 0)
    with torch.device("meta"):
        empty = Net(Group, depth=6).eval()
    sites = ltm.find_sites(empty, EXAMPLE.to("meta"))
    assert len(sites) == sites.attentions == sites.covered == 36
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=0.7))
    model = ltm.retrofit(drawn(Net(Group, depth=6)), example=EXAMPLE, plan=plan)
    assert count_macs(model, EXAMPLE).total == plan.macs


def test_a_model_without_numbers_is_not_converted() -> None:
    with torch.device("meta"):
        empty = Net().eval()
    with pytest.raises(ltm.UnsupportedBlock, match="is on the meta device"):
        ltm.retrofit(empty, ltm.LTMConfig(flops=0.7), EXAMPLE.to("meta"))
    assert not ltm.is_retrofitted(empty) and not list(forwards_of(empty))


def test_with_nothing_merged_it_is_the_original() -> None:
    model = ltm.retrofit(drawn(Net()), ltm.LTMConfig(flops=0.7), EXAMPLE)
    with torch.no_grad(), ltm.disabled(model):
        expected = model(EXAMPLE)
    with torch.no_grad(), in_mode(model, "identity"):
        assert torch.equal(model(EXAMPLE), expected)


# ------------------------------------------------------------------------------------------- attributes that are frozen


class Tuned(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.kind, self.gate, self.shape = 1.0, "mlp", None, F.gelu
        self.calls, self.count, self.use_checkpoint = 0, 0, False
        self._hidden, self.rates, self.options, self.checkpoint_scale = 1.0, (1.0, 2.0), {"one": [1.0]}, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x * self._hidden * self.rates[0] * self.options["one"][0] * self.checkpoint_scale
        if not self.training:
            self.count = x.shape[1]
        x = x + self.attn(self.one(x))
        branch = self.shape(self.mlp(self.two(x))) if self.kind == "mlp" else x
        return x + self.scale * (branch if self.gate is None else self.gate(branch))


@pytest.mark.parametrize(
    "name, value",
    [
        pytest.param("scale", 0.5, id="float"),
        pytest.param("kind", "none", id="str"),
        pytest.param("gate", nn.Identity(), id="none-becomes-a-module"),
        pytest.param("shape", F.relu, id="function"),
        pytest.param("_hidden", 0.5, id="private"),
        pytest.param("rates", (0.5, 2.0), id="tuple"),
        pytest.param("options", {"one": [0.5]}, id="nested"),
        pytest.param("checkpoint_scale", 0.5, id="named-like-a-flag"),
    ],
)
def test_an_attribute_that_the_cut_has_frozen_is_refused_where_it_changes(name, value) -> None:
    model = ltm.retrofit(drawn(Net(Tuned)), ltm.LTMConfig(flops=0.7), EXAMPLE)
    block = model.blocks[-1]
    before = getattr(block, name)
    with torch.no_grad():
        expected = model(EXAMPLE)
        setattr(block, name, value)
        with pytest.raises(ltm.UnsupportedBlock, match=rf"'{name}' of a Tuned was .* when block 'blocks\.3' .*restore"):
            model(EXAMPLE)
        with ltm.disabled(model):
            model(EXAMPLE)
        delattr(block, name)
        setattr(block, name, before)
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(EXAMPLE), expected)


def test_attributes_that_a_forward_writes_and_flags_of_checkpointing_may_change() -> None:
    model = ltm.retrofit(drawn(Net(Tuned)), ltm.LTMConfig(flops=0.7), EXAMPLE)
    expected = model(EXAMPLE)
    with ltm.disabled(model):
        model(EXAMPLE)
        model.train()(torch.cat([EXAMPLE] * 2))
    model.eval()
    for block in model.blocks:
        assert block.calls > 0 and block.count == 64
        block.use_checkpoint = True
    assert torch.equal(model(EXAMPLE), expected)


def test_attributes_that_no_forward_reads_may_change() -> None:
    model, seen = drawn(Net(Tuned)), []
    handle = model.blocks[1].register_forward_hook(
        lambda block, args, out: seen.append(setattr(block, "mean", len(seen)))
    )
    model(EXAMPLE)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7), EXAMPLE)
    handle.remove()
    expected = model(EXAMPLE)
    for block in model.blocks:
        block.mean, block.step, block.tag, block.lr_scale = 0.5, 3, "late", 0.1
    assert len(seen) > 1 and torch.equal(model(EXAMPLE), expected)


def test_what_is_in_a_list_is_frozen_too() -> None:
    model = ltm.retrofit(drawn(Net(Tuned)), ltm.LTMConfig(flops=0.7), EXAMPLE)
    model.blocks[2].options["one"][0] = 0.5
    with pytest.raises(ltm.UnsupportedBlock, match="'options'"):
        model(EXAMPLE)


@pytest.mark.parametrize("scope", ["FLOW", "LOCAL"])
def test_a_converted_block_does_not_carry_the_model(scope) -> None:
    model = drawn(Net())
    whole = len(pickle.dumps(model.blocks[-1]))
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8, scope=scope), EXAMPLE)
    assert len(pickle.dumps(model.blocks[-1])) < 2.5 * whole


def test_a_compiled_block_notices_that_an_attribute_changed() -> None:
    model = ltm.retrofit(drawn(Net(Tuned)), ltm.LTMConfig(flops=0.7), EXAMPLE)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(EXAMPLE), model(EXAMPLE))
        model.blocks[1].scale = 0.5
        with pytest.raises(ltm.UnsupportedBlock, match="'scale'"):
            compiled(EXAMPLE)
    torch._dynamo.reset()
