"""Counting multiply-adds: two counters, integer equality, over models and their examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import timm
import torch
from pieces import LINEAR, TOKENS, Calls
from timm.layers import set_fused_attn
from torch import Tensor, nn
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

from ltm_retrofit.errors import ExampleError
from ltm_retrofit.macs import MacCount, count_macs, count_macs_quick

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


@pytest.fixture
def timm_attention() -> Iterator[Callable[[bool], None]]:
    yield set_fused_attn
    set_fused_attn(True)


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
        model = HF_MODELS[name]("eager")  # until 2.15 torch's own counter passes over the fused attention of CPUs
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
        assert count_macs(Calls(lambda x: (x @ x.mT, x)[1]), TOKENS).total == LINEAR + 2 * 5 * 5 * 8

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

    def test_an_output_that_hides_its_tensors(self) -> None:
        @dataclass
        class Output:
            logits: Tensor

        assert count_macs(Calls(lambda x: Output(x @ x.mT)), TOKENS).total == LINEAR + 2 * 5 * 5 * 8

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
