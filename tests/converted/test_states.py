"""Where all tokens are brought back, so are those in the states of inner blocks that somebody reads."""

from __future__ import annotations

import pytest
import torch
import transformers as tr
from pieces import WIDE
from zoo import ZOO, randomise

import ltm_retrofit as ltm
from ltm_retrofit.converted.guards import BringingBack

torch.set_num_threads(1)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def llava() -> tr.LlavaForConditionalGeneration:
    vision = tr.CLIPVisionConfig(**WIDE)
    text = tr.LlamaConfig(
        hidden_size=48, intermediate_size=96, num_attention_heads=3, num_hidden_layers=2, num_key_value_heads=3,
        vocab_size=100,
    )  # fmt: skip
    config = tr.LlavaConfig(vision_config=vision, text_config=text, image_token_index=99, image_seq_length=64)
    return randomise(tr.LlavaForConditionalGeneration(config))


@pytest.mark.parametrize(
    "config",
    [ltm.LTMConfig(flops=0.7), *(pytest.param(c, marks=pytest.mark.slow) for c in [
        ltm.LTMConfig(flops=0.7, output_tokens="full"), ltm.LTMConfig(flops=0.8, scope="LOCAL"),
    ])],
    ids=["auto", "full", "local"],
)  # fmt: skip
def test_llava_reads_the_last_but_one_state_of_its_tower(config) -> None:
    model = llava()
    given = {"input_ids": torch.full((1, 64), 99), "pixel_values": IMAGES[:1]}
    with torch.no_grad():
        expected = model(**given).logits
        ltm.retrofit(model.model.vision_tower, config)
        merged = model(**given).logits
        assert merged.shape == expected.shape and not torch.equal(merged, expected)
        ltm.restore(model.model.vision_tower)
        assert torch.equal(model(**given).logits, expected)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not any(isinstance(hook, BringingBack) for hook in hooks)


@pytest.mark.parametrize("name", ["hf-clip", "hf-dinov2-registers"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_every_state_is_as_long_as_the_hosts(name, as_dict) -> None:
    model, _ = ZOO[name]()
    options = {"output_hidden_states": True, "return_dict": as_dict}
    with torch.no_grad():
        before = model(IMAGES, **options)
        ltm.retrofit(model, ltm.LTMConfig(flops=0.7, output_tokens="full"))
        after = model(IMAGES, **options)
        states = [
            (out.hidden_states if as_dict else next(x for x in out if isinstance(x, tuple))) for out in (before, after)
        ]
        assert type(after) is type(before)
        assert [state.shape for state in states[1]] == [state.shape for state in states[0]]
        # as many different tokens as there are after each block, each as often as it stands for
        kept = [len(torch.unique(state[0], dim=0)) for state in states[1]]
        assert kept[0] == states[0][0].shape[1] > kept[-1] and kept == sorted(kept, reverse=True)
        with ltm.disabled(model):
            again = model(IMAGES, **options)
            assert all(torch.equal(a, b) for a, b in zip(again[0], before[0], strict=True))
