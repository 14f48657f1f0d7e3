"""Counting multiply-adds: two counters, integer equality, refusal where either would guess."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from ltm_retrofit import flops
from ltm_retrofit.errors import CountError, ExampleError
from ltm_retrofit.flops import MacCount, count_macs, count_macs_quick, undisturbed

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"image_size": 32, "patch_size": 8}

HF_MODELS: dict[str, Callable[[str], PreTrainedModel]] = {
    "vit": lambda kind: ViTForImageClassification(ViTConfig(**SMALL, attn_implementation=kind)),
    "deit": lambda kind: DeiTForImageClassification(DeiTConfig(**SMALL, attn_implementation=kind)),
    "dinov2_registers": lambda kind: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4, attn_implementation=kind)
    ),
    "clip": lambda kind: CLIPVisionModel(CLIPVisionConfig(**SMALL, attn_implementation=kind)),
}

# name, arguments, input size
TIMM_MODELS = {
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 3}, 64),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 3}, 56),
    "clip": ("vit_base_patch32_clip_224", {"img_size": 64, "depth": 2}, 64),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 32, "num_heads": (2, 4)}, 224),
    "eva_rope": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, 56),
    "levit": ("levit_128s", {"img_size": 64, "depth": (1, 1, 1)}, 64),
    "cait": ("cait_xxs24_224", {"img_size": 32, "depth": 2}, 32),
    "siglip_pooling": ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 1}, 32),
}


def timm_model(name: str, **extra: object) -> tuple[nn.Module, Tensor]:
    architecture, arguments, size = TIMM_MODELS[name]
    return timm.create_model(architecture, **arguments, **extra), torch.randn(1, 3, size, size)


def by_torch(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> int:
    """What `FlopCounterMode` says by itself, without any of our handlers."""
    model.eval().requires_grad_(False)  # its module tracker fails on views of parameters that require grad
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits, and on a busy machine it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def timm_attention() -> Iterator[Callable[[bool], None]]:
    yield set_fused_attn
    set_fused_attn(True)


class Calls(nn.Module):
    """A module that is one function, with a linear layer so that the count is never 0."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> object:
        return self.function(self.inner(x))


LINEAR = 2 * 5 * 8 * 8  # what `Calls.inner` costs on TOKENS
TOKENS = torch.randn(2, 5, 8)


def macs_of(function: Callable[[Tensor], object]) -> int:
    return count_macs(Calls(function), TOKENS).total - LINEAR


class TestModels:
    def test_vit_small(self) -> None:
        """Known number, closed form, batch scaling and sums over modules, on one model: it is the costly one."""
        model = timm.create_model("vit_small_patch16_224")
        count = count_macs(model, torch.randn(1, 3, 224, 224))
        n, d, patches, depth = 197, 384, 196, 12
        block = (4 + 2 * 4) * n * d**2 + 2 * n**2 * d
        assert count.total == depth * block + patches * d * 3 * 16**2 + d * 1000
        assert round(count.total / 1e9, 2) == 4.60
        assert count.by_module[""] == count.total
        assert count.by_module["blocks"] == depth * count.by_module["blocks.3"] == depth * block
        assert count.by_module["blocks.3.mlp"] == 2 * 4 * n * d**2
        assert count.by_module["blocks.3.norm1"] == 0
        assert count.by_module["patch_embed"] + count.by_module["blocks"] + count.by_module["head"] == count.total
        assert count.by_module.keys() == {name for name, _ in model.named_modules()}
        assert type(count.total) is int and all(type(macs) is int for macs in count.by_module.values())

    @pytest.mark.parametrize("name", TIMM_MODELS)
    def test_timm(self, name: str, timm_attention: Callable[[bool], None]) -> None:
        counts = {}
        for fused in (True, False):
            timm_attention(fused)
            model, image = timm_model(name)
            counts[fused] = count_macs(model, image)
        assert counts[True] == counts[False]
        assert counts[True].total == by_torch(model, image) > 0
        assert count_macs(model, image.repeat(4, 1, 1, 1)).total == 4 * counts[True].total

    @pytest.mark.parametrize("name", HF_MODELS)
    def test_hugging_face(self, name: str) -> None:
        image = torch.randn(1, 3, 32, 32)
        counts = {kind: count_macs(HF_MODELS[name](kind), {"pixel_values": image}) for kind in ("sdpa", "eager")}
        assert counts["sdpa"] == counts["eager"]
        model = HF_MODELS[name]("sdpa")
        assert counts["sdpa"].total == by_torch(model, pixel_values=image) > 0
        batch = {"pixel_values": image.repeat(4, 1, 1, 1), "output_hidden_states": True, "return_dict": None}
        assert count_macs(model, batch).total == 4 * counts["sdpa"].total
        assert not any(name.startswith("model.model") for name in counts["sdpa"].by_module)

    def test_multi_head_attention_behind_its_fast_path(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        count = count_macs(layer, TOKENS)
        assert count.total == 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16)
        with torch.no_grad():
            assert count_macs_quick(lambda: layer.eval()(TOKENS)) == count.total

    def test_unused_branches_count(self) -> None:
        """They cost time all the same."""
        assert macs_of(lambda x: (x @ x.mT, x)[1]) == 2 * 5 * 5 * 8

    def test_shared_and_uncalled_modules(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(8, 8)
                self.second = self.first
                self.unused = nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(self.first(x))

        assert count_macs(Shared(), TOKENS) == MacCount(2 * LINEAR, {"": 2 * LINEAR, "first": 2 * LINEAR, "unused": 0})


def sdpa(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], **extra: object) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), **extra)


OPERATORS: dict[str, tuple[Callable[[Tensor], object], int]] = {
    "matmul_batched": (lambda x: x @ x.mT, 2 * 5 * 5 * 8),
    "matmul_unbatched_by_batched": (lambda x: torch.zeros(3, 5) @ x, 2 * 3 * 5 * 8),
    "matmul_broadcast": (lambda x: x[:, None] @ x.mT[None], 2 * 2 * 5 * 5 * 8),
    "matmul_by_vector": (lambda x: x @ x[0, 0], 2 * 5 * 8),
    "vector_by_matmul": (lambda x: x[0, :, 0] @ x, 2 * 5 * 8),
    "vector_by_vector": (lambda x: x[0, 0] @ x[0, 1], 8),
    "mv": (lambda x: torch.mv(x[0], x[0, 0]), 5 * 8),
    "dot": (lambda x: torch.dot(x[0, 0], x[0, 1]), 8),
    "addmv": (lambda x: torch.addmv(x[0, :, 0], x[0], x[0, 0]), 5 * 8),
    "addmm": (lambda x: torch.addmm(torch.zeros(5, 5), x[0], x[0].T), 5 * 5 * 8),
    "baddbmm": (lambda x: torch.baddbmm(torch.zeros(2, 5, 5), x, x.mT), 2 * 5 * 5 * 8),
    "baddbmm_in_place": (lambda x: torch.zeros(2, 5, 5).baddbmm_(x, x.mT), 2 * 5 * 5 * 8),
    "addbmm": (lambda x: torch.addbmm(torch.zeros(5, 5), x, x.mT), 2 * 5 * 5 * 8),
    "inner": (lambda x: torch.inner(x, x), 2 * 5 * 2 * 5 * 8),
    "tensordot": (lambda x: torch.tensordot(x, x, dims=([0, 2], [0, 2])), 5 * 5 * 2 * 8),
    "linear_of_vector": (lambda x: F.linear(x[0, 0], torch.zeros(3, 8), torch.zeros(3)), 3 * 8),
    "einsum": (lambda x: torch.einsum("bnc,bmc->bnm", x, x), 2 * 5 * 5 * 8),
    "einsum_implicit": (lambda x: torch.einsum("bnc,bmc", x, x), 5 * 5 * 2 * 8),
    "einsum_broadcast": (lambda x: torch.einsum("bnc,mc->bnm", x, x[0]), 2 * 5 * 5 * 8),
    "einsum_ellipsis": (lambda x: torch.einsum("...nc,mc->...nm", x[None], x[0]), 2 * 5 * 5 * 8),
    "einsum_dot": (lambda x: torch.einsum("bnc,bnc->bn", x, x), 2 * 5 * 8),
    "einsum_sums_first": (lambda x: torch.einsum("bnc,mc->bm", x, x[0]), 2 * 5 * 8),
    "einsum_elementwise": (lambda x: torch.einsum("bnc,bc->bnc", x, x[:, 0]), 0),
    "einsum_of_size_one": (lambda x: torch.einsum("bnc,bmc->bnm", x[..., :1], x[..., :1]), 0),
    "einsum_transpose": (lambda x: torch.einsum("bnc->bcn", x), 0),
    "conv": (lambda x: F.conv1d(x, torch.zeros(3, 5, 3), padding=1), 2 * 3 * 8 * 5 * 3),
    "conv_unbatched": (lambda x: F.conv1d(x[0], torch.zeros(3, 5, 3)), 3 * 6 * 5 * 3),
    "conv_same": (lambda x: F.conv1d(x, torch.zeros(3, 5, 3), padding="same"), 2 * 3 * 8 * 5 * 3),
    "conv_depthwise": (lambda x: F.conv1d(x, torch.zeros(5, 1, 3), groups=5), 2 * 5 * 6 * 3),
    "conv_transposed": (lambda x: F.conv_transpose1d(x, torch.zeros(5, 3, 2), stride=2), 2 * 5 * 8 * 3 * 2),
    "sdpa": (sdpa((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), 2 * 3 * 5 * 7 * 16),
    "sdpa_wider_values": (sdpa((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 12)), 2 * 3 * 5 * 7 * 20),
    "sdpa_grouped_queries": (sdpa((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), enable_gqa=True), 2 * 4 * 5 * 7 * 16),
    "sdpa_broadcast": (sdpa((1, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), 2 * 3 * 5 * 7 * 16),
    "sdpa_masked": (sdpa((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), attn_mask=torch.zeros(5, 7)), 2 * 3 * 5 * 7 * 16),
    "sdpa_causal": (sdpa((2, 3, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8), is_causal=True), 2 * 3 * 5 * 5 * 16),
    "sdpa_one_head": (sdpa((2, 5, 8), (2, 7, 8), (2, 7, 8)), 2 * 5 * 7 * 16),
    "sdpa_windows": (sdpa((2, 4, 3, 5, 8), (2, 4, 3, 7, 8), (2, 4, 3, 7, 8)), 2 * 4 * 3 * 5 * 7 * 16),
}


def merge_by_matching(x: Tensor) -> Tensor:
    """Bipartite soft matching as ToMe does it: everything in it but the scores is free of MACs."""
    unit = x / x.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    width = x.shape[-1]
    source = x[:, ::2].gather(1, order[:, :1].expand(-1, -1, width))
    into = partner[..., None].gather(1, order[:, :1]).expand(-1, -1, width)
    merged = x[:, 1::2].scatter_reduce(1, into, source, reduce="mean")
    top = x.norm(dim=-1).topk(2).indices.sort().values
    return torch.cat([merged, x.gather(1, top[..., None].expand(-1, -1, width)).softmax(-1)], dim=1)


FREE: dict[str, Callable[[Tensor], object]] = {
    "elementwise": lambda x: F.gelu(x * x + x.sigmoid() - x.exp().clamp(max=3) / 2),
    "in_place": lambda x: x.clone().add_(1).mul_(x).relu_(),
    "comparison": lambda x: torch.where((x > 0) & ~(x == 1), x, x.new_zeros(()).expand_as(x)),
    "reductions": lambda x: (x.sum(1), x.mean(-1), x.std(-1), x.var(1), x.amax(-1), x.cumsum(-1), x.logsumexp(-1)),
    "norms": lambda x: F.layer_norm(x, (8,)) + F.group_norm(x, 5) + F.rms_norm(x, (8,)) + F.normalize(x, dim=-1),
    "weight_norm": lambda x: torch._weight_norm(x, x[:, :1, :1]),
    "linalg_norm": lambda x: torch.linalg.norm(x, dim=-1),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)),
    "pooling": lambda x: (F.adaptive_avg_pool2d(x[None], 1), F.avg_pool2d(x[None], 2), F.max_pool2d(x[None], 2)),
    "interpolation": lambda x: F.interpolate(x[None], size=(7, 7), mode="bicubic", antialias=True),
    "unfold": lambda x: F.pad(F.pixel_shuffle(F.unfold(x[None], 2)[..., None], 2), (1, 1)),
    "random": lambda x: x + torch.rand_like(x) + torch.randn(8) + F.dropout(x, 0.5),
    "views": lambda x: x.reshape(2, 5, 2, 4).permute(2, 0, 1, 3).flatten(1).unbind(0)[0].roll(1).flip(0),
    "indexing": lambda x: (x[:, [0, 2]], F.one_hot(x.argmax(-1), 8), F.embedding(x.argmax(-1), torch.zeros(8, 2))),
}

HEAVY: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "cdist": (lambda x: torch.cdist(x, x), "cdist"),
    "cdist_by_product": (lambda x: torch.cdist(torch.zeros(30, 8), torch.zeros(30, 8)), "_euclidean_dist|cdist"),
    "solve": (lambda x: torch.linalg.solve(torch.eye(5), x), "solve"),
    "svd": (lambda x: torch.linalg.svd(x), "svd"),
    "spectral_norm": (lambda x: torch.linalg.norm(x[0], ord=2), "svd"),
    "fft": (lambda x: torch.fft.rfft2(x).real, "fft"),
    "bilinear": (lambda x: F.bilinear(x, x, torch.zeros(3, 8, 8)), "_trilinear|bilinear"),
}


class TestOperators:
    @pytest.mark.parametrize("name", OPERATORS)
    def test_counted(self, name: str) -> None:
        function, expected = OPERATORS[name]
        assert macs_of(function) == expected

    @pytest.mark.parametrize("name", OPERATORS)
    def test_counted_by_the_quick_counter(self, name: str) -> None:
        function, expected = OPERATORS[name]
        with torch.no_grad():
            assert count_macs_quick(lambda: function(TOKENS)) == expected

    @pytest.mark.parametrize("name", FREE)
    def test_free(self, name: str) -> None:
        assert macs_of(FREE[name]) == 0

    def test_merging_costs_its_scores(self) -> None:
        assert macs_of(merge_by_matching) == 2 * 3 * 2 * 8

    @pytest.mark.parametrize("name", HEAVY)
    def test_refused(self, name: str) -> None:
        function, operator = HEAVY[name]
        with pytest.raises(CountError, match=f"cannot count .*({operator})"):
            macs_of(function)
        with pytest.raises(CountError, match=f"cannot count .*({operator})"), torch.no_grad():
            count_macs_quick(lambda: function(TOKENS))

    def test_refused_operator_is_located(self) -> None:
        model = nn.Sequential(nn.Identity(), Calls(lambda x: torch.kron(x, x)))
        with pytest.raises(CountError, match=r"cannot count aten::kron \(in 1\)"):
            count_macs(model, TOKENS)

    def test_custom_function_is_refused(self) -> None:
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, x: Tensor) -> Tensor:
                return x * 2

        with pytest.raises(CountError, match="Double"):
            macs_of(Double.apply)

    def test_einsum_of_three_is_refused(self) -> None:
        with pytest.raises(CountError, match="3 operands"):
            macs_of(lambda x: torch.einsum("bnc,bmc,bmd->bnd", x, x, x))

    def test_disagreement(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(flops._TRACE_HANDLES, "aten::linear", lambda inputs, outputs: Counter(linear=1))
        with pytest.raises(CountError, match=r"fvcore counts 2 MACs.*FlopCounterMode 1,280; in 0 1 and 640; in 1 1"):
            count_macs(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), TOKENS)

    def test_disagreement_over_a_handle_gone_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(flops._TRACE_HANDLES, "aten::scaled_dot_product_attention")
        with pytest.raises(CountError, match="cannot count aten::scaled_dot_product_attention"):
            macs_of(OPERATORS["sdpa"][0])


class Restless(nn.Module):
    """Leaves traces wherever a forward pass can leave one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.cache: dict[str, Tensor] = {}
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = torch.rand(3)
        self.cache["x"] = x
        self.log.append(1)
        self.fresh = x
        return self.norm(self.inner(x.mul_(2)))


def snapshot(model: nn.Module) -> dict[str, object]:
    hooks = {
        name: {key: list(value) for key, value in m.__dict__.items() if "hooks" in key and value is not None}
        for name, m in model.named_modules()
    }
    return {
        "flags": {name: module.training for name, module in model.named_modules()},
        "hooks": hooks,
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": {key: id(value) for key, value in (*model.named_parameters(), *model.named_buffers())},
        "grad": {key: (value.requires_grad, value.grad) for key, value in model.named_parameters()},
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert after == before


class TestNothingChanges:
    @pytest.mark.parametrize("fails", [False, True], ids=["counted", "refused"])
    @pytest.mark.parametrize("name", ["restless", "timm_levit", "hf_vit"])
    def test_model(self, name: str, fails: bool) -> None:
        example: Tensor | dict[str, object]
        if name == "restless":
            model, example = Restless(), TOKENS.clone()
        elif name == "timm_levit":
            model, example = timm_model("levit")
        else:
            model = HF_MODELS["vit"]("sdpa")
            example = {"pixel_values": torch.randn(1, 3, 32, 32), "output_hidden_states": True}
        model = nn.ModuleDict({"it": model})["it"].train()
        next(model.children()).eval()  # flags are each module's own
        seen: list[str] = []
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.register_forward_hook(lambda module, args, output: seen.append("called"))
        if fails:
            last.register_forward_hook(lambda module, args, output: torch.kron(output, output))
        before, kept = snapshot(model), TOKENS.clone() if name == "restless" else None
        torch.manual_seed(3)
        random = torch.get_rng_state()
        if fails:
            with pytest.raises((CountError, ExampleError)):
                count_macs(model, example)
        else:
            count_macs(model, example)
        assert seen, "the user's hooks run"
        assert torch.equal(torch.get_rng_state(), random)
        assert_same(before, snapshot(model))
        if name == "restless":
            assert not model.cache and not model.log and torch.equal(example, kept)

    def test_undisturbed_by_itself(self) -> None:
        """The probe uses it: eval mode inside, a user's own hooks keep working."""
        model, called = Restless(), []
        handle = model.inner.register_forward_hook(lambda *_: called.append(1))
        before, random = snapshot(model), torch.get_rng_state()
        with pytest.raises(ZeroDivisionError), undisturbed(model):
            assert not any(module.training for module in model.modules())
            assert not torch.backends.mha.get_fastpath_enabled()
            model(TOKENS.clone())
            _ = 1 / 0
        assert called and torch.equal(torch.get_rng_state(), random)
        assert_same(before, snapshot(model))
        handle.remove()
        assert not model.inner._forward_hooks

    def test_after_a_failed_trace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """fvcore leaves its hooks on every module when the traced call raises."""

        def raise_in_trace(x: Tensor) -> Tensor:
            if torch.jit.is_tracing():
                raise ValueError("not while tracing")
            return x

        model = Calls(raise_in_trace)
        before = snapshot(model)
        with pytest.raises(CountError, match=r"cannot trace Calls.*not while tracing"):
            count_macs(model, TOKENS)
        assert_same(before, snapshot(model))

    def test_attention_fast_path_switch(self) -> None:
        for enabled in (True, False):
            torch.backends.mha.set_fastpath_enabled(enabled)
            try:
                count_macs(Calls(lambda x: x), TOKENS)
                with pytest.raises(CountError):
                    macs_of(HEAVY["fft"][0])
                assert torch.backends.mha.get_fastpath_enabled() is enabled
            finally:
                torch.backends.mha.set_fastpath_enabled(True)

    def test_grad_mode_and_grads(self) -> None:
        model = Calls(lambda x: x)
        count_macs(model, TOKENS.clone().requires_grad_())
        assert torch.is_grad_enabled() and model.inner.weight.grad is None
        model(TOKENS).sum().backward()

    def test_quiet(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            macs_of(lambda x: x.reshape(int(x.shape[0]) * 5, -1) if bool((x == x).all()) else x)
        assert not caplog.records
        assert capfd.readouterr() == ("", "")

    def test_threads(self) -> None:
        threads = torch.get_num_threads()
        try:
            counts = []
            for number in (1, 2):
                torch.set_num_threads(number)
                counts.append(macs_of(OPERATORS["sdpa_masked"][0]))
        finally:
            torch.set_num_threads(threads)
        assert counts[0] == counts[1]


class TestExamples:
    @pytest.mark.parametrize(
        ("example", "message"),
        [([TOKENS], "got list"), ({"x": 3}, r"at least one tensor.*\['x'\]"), (torch.randn(2, 9), r"Calls.*\(2, 9\)")],
        ids=["list", "no_tensor", "wrong_shape"],
    )
    def test_bad_example(self, example: object, message: str) -> None:
        with pytest.raises(ExampleError, match=message):
            count_macs(Calls(lambda x: x), example)  # type: ignore[arg-type]

    def test_keyword_arguments(self) -> None:
        assert count_macs(Calls(lambda x: {"a": [x, None], "b": 3}), {"x": TOKENS}).total == LINEAR

    @pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in_place"])
    def test_compiled(self, in_place: bool) -> None:
        model = Calls(lambda x: x @ x.mT)
        if in_place:
            model.compile()
        compiled = model._compiled_call_impl
        assert count_macs(model if in_place else torch.compile(model), TOKENS).total == LINEAR + 2 * 5 * 5 * 8
        assert model._compiled_call_impl is compiled

    def test_under_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert count_macs(Calls(lambda x: x @ x.mT), TOKENS).total == LINEAR + 2 * 5 * 5 * 8
            assert torch.is_autocast_cache_enabled()

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            assert count_macs(Calls(lambda x: x @ x.mT), TOKENS).total == LINEAR + 2 * 5 * 5 * 8
