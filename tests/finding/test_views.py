"""Tokens that an attention does not let see the same never become one: nobody learns what was hidden."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import transformers as tr
from pieces import WIDE
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, randomise

import ltm_retrofit as ltm
from ltm_retrofit.finding import views
from ltm_retrofit.finding.walk import Walk

torch.set_num_threads(1)
DIM, HEADS, TOKENS = 32, 4, 64
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PLACE = torch.arange(TOKENS)
#: which keys (columns) each token (rows) sees
SEES: dict[str, Tensor] = {
    "causal": PLACE[:, None] >= PLACE,
    "banded": (PLACE[:, None] - PLACE).abs() < 9,
    "padded": (PLACE < 50).expand(TOKENS, -1),
    "windows": PLACE[:, None] // 32 == PLACE // 32,
    "uneven": (PLACE[:, None] < 21) == (PLACE < 21),
}
#: how an attention says so: of q, k, v (B, heads, N, d) and what is seen (N, N)
Say = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def low(sees: Tensor) -> Tensor:
    return torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)


SAID: dict[str, Say] = {
    "boolean": F.scaled_dot_product_attention,
    "float": lambda q, k, v, sees: F.scaled_dot_product_attention(q, k, v, low(sees)),
    "softmax": lambda q, k, v, sees: torch.softmax(q @ k.transpose(-2, -1) * 0.3 + low(sees), -1) @ v,
    "is_causal": lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=True),
}


class Attention(nn.Module):
    def __init__(self, sees: Tensor, say: Say) -> None:
        super().__init__()
        self.qkv, self.proj, self.say = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), say
        self.register_buffer("sees", sees)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.proj(self.say(q, k, v, self.sees).transpose(1, 2).reshape(x.shape))


class Packed(nn.Module):
    """torch's own."""

    def __init__(self, sees: Tensor, say: Say) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.register_buffer("hidden", ~sees)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, attn_mask=self.hidden, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.one, self.attn, self.two = nn.LayerNorm(DIM), attention, nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.one(x))
        return x + self.mlp(self.two(x))


class Net(nn.Module):
    """Puts out something for each token."""

    def __init__(self, sees: Tensor, say: Say = SAID["boolean"], attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.seed = nn.Conv2d(3, DIM, 4, 4)
        self.blocks = nn.Sequential(*(Block(attention(sees, say)) for _ in range(3)))
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.seed(x).flatten(2).transpose(1, 2)))


def told(model: nn.Module) -> list[tuple[int, int]]:
    """Which tokens (first) change with which patches (second)."""
    with torch.no_grad():
        before, pairs = model(IMAGE), []
        for patch in range(0, TOKENS, 5):
            image = IMAGE.clone()
            image[..., patch // 8 * 4 : patch // 8 * 4 + 4, patch % 8 * 4 : patch % 8 * 4 + 4] += 1
            pairs += [(int(token), patch) for token in (model(image) != before).any(-1)[0].nonzero()]
    return pairs


@pytest.mark.parametrize(
    ("kind", "say", "attention", "words"),
    [
        ("causal", "is_causal", Attention, "is causal"),
        ("causal", "softmax", Attention, "is causal"),
        ("causal", "boolean", Packed, "is causal"),
        ("banded", "float", Attention, "different others"),
        ("padded", "boolean", Attention, "different others"),
        ("uneven", "boolean", Attention, "keeps to windows"),
    ],
)
@pytest.mark.parametrize("scope", [None, "LOCAL"])
def test_what_hides_tokens_from_one_another_is_refused_and_says_why(kind, say, attention, words, scope) -> None:
    model = randomise(Net(SEES[kind], SAID[say], attention))
    sites = ltm.find_sites(model, IMAGE)
    assert not len(sites) and len(sites.excluded) == 3 and all(words in why for why in sites.excluded.values())
    with pytest.raises(ltm.UnsupportedBlock, match=words):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.9, scope=scope), IMAGE)
    assert not ltm.is_retrofitted(model)


@pytest.mark.parametrize("attention", [Attention, Packed])
def test_within_windows_tokens_merge_and_tell_the_others_nothing(attention) -> None:
    model = randomise(Net(SEES["windows"], attention=attention))
    before = told(model)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.8), IMAGE)
    assert {row.scope for row in ltm.get_plan(model).rows} == {"LOCAL"}
    assert told(model) and all(token // 32 == patch // 32 for token, patch in told(model))
    assert set(told(model)) <= set(before)
    with pytest.raises(ltm.UnsupportedBlock, match="called with 32: which may be merged is known of the planned size"):
        with torch.no_grad():
            for block in model.blocks:
                block.attn.register_forward_hook(lambda module, given, out: given[0][:, :32])
                block.one.register_forward_pre_hook(lambda module, given: given[0][:, :32])
            model.blocks[0].mlp(torch.randn(1, 32, DIM))


def test_what_hides_nothing_is_as_ever() -> None:
    model = randomise(Net(torch.ones(TOKENS, TOKENS, dtype=torch.bool), SAID["softmax"]))
    sites = ltm.find_sites(model, IMAGE)
    assert len(sites) == 3 and not any(site.bound for site in sites.of("LOCAL"))


def test_weights_that_only_this_image_makes_zero_hide_nothing() -> None:
    """Logits of hundreds leave exact zeros, as attention sinks of large models do."""
    model = randomise(Net(SEES["causal"], lambda q, k, v, _: torch.softmax(q @ k.transpose(-2, -1) * 3e3, -1) @ v))
    walk = Walk.of(model, IMAGE)
    with torch.no_grad():
        assert all(one.seen.sees is None for one in walk.recording.attended) and walk.views == {}


def test_zeros_of_one_head_that_another_image_has_elsewhere_hide_nothing(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HEADS", 1)
    model = randomise(Net(SEES["causal"], lambda q, k, v, _: torch.softmax(q @ k.transpose(-2, -1) * 3e3, -1) @ v))
    walk = Walk.of(model, IMAGE)
    with torch.no_grad():
        assert all(one.seen.sees is not None for one in walk.recording.attended) and walk.views == {}


def test_windows_show_beside_weights_that_are_all_but_zero() -> None:
    """A weight of e^-80 was taken for a sign that zeros come by themselves, and windows were merged across."""
    faint = torch.zeros(TOKENS).index_fill(0, torch.tensor([3, 40]), -80.0)  # a key in each window
    model = randomise(
        Net(
            SEES["uneven"],
            lambda q, k, v, sees: torch.softmax(q @ k.transpose(-2, -1) * 0.01 + low(sees) + faint, -1) @ v,
        )
    )
    sites = ltm.find_sites(model, IMAGE)
    assert not len(sites) and all("keeps to windows" in why for why in sites.excluded.values())


def test_a_model_without_masks_takes_no_pass_more(monkeypatch) -> None:
    monkeypatch.setattr(views, "run", lambda *_: pytest.fail("nothing hides tokens"))
    for name in ("timm-vit", "timm-swin"):
        model, example = ZOO[name]()
        assert len(ltm.find_sites(model, example))


# ---------------------------------------------------------------------------------------------------- two towers


def clip(tokens: int = 32) -> tuple[nn.Module, dict[str, Tensor]]:
    vision = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "num_hidden_layers": 4}
    text = {**vision, "vocab_size": 99, "max_position_embeddings": 80, "eos_token_id": 2}
    text |= {"bos_token_id": 1, "pad_token_id": 0}
    config = tr.CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 4}, text_config=text, projection_dim=32
    )
    model = randomise(tr.CLIPModel(config))
    ids = torch.randint(3, 98, (1, tokens), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": ids, "pixel_values": IMAGE}


@pytest.mark.parametrize(
    ("tokens", "masked"),
    [(32, True), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(32, False), (65, False), (65, True)])],
)
def test_of_clip_the_vision_tower_merges_and_stays_merged(tokens, masked) -> None:
    model, example = clip(tokens)
    if masked:
        example["attention_mask"] = torch.ones_like(example["input_ids"])
    other = example["input_ids"].clone()
    other[:, 20:] = 5
    with torch.no_grad():
        before = model.text_model(input_ids=example["input_ids"]).last_hidden_state
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8), example)
        after, changed = (model.text_model(input_ids=i).last_hidden_state for i in (example["input_ids"], other))
    assert torch.equal(after, before) and torch.equal(after[:, :20], changed[:, :20])
    plan, sites = ltm.get_plan(model), ltm.find_sites(ltm.restore(model), example)
    assert {row.scope for row in plan.rows} == {"FLOW"} and all("vision_model" in row.site for row in plan.rows)
    assert [name for name, why in sites.excluded.items() if "is causal" in why] == [
        f"text_model.encoder.layers.{layer}.self_attn" for layer in range(4)
    ]


def test_a_decoder_behind_an_encoder_of_images_is_left_alone() -> None:
    """What attends to the image in it sees all of it; its words are hidden from one another before."""
    vision = tr.ViTConfig(**WIDE)
    text = tr.TrOCRConfig(
        d_model=48,
        decoder_layers=2,
        decoder_attention_heads=3,
        decoder_ffn_dim=96,
        vocab_size=99,
        cross_attention_hidden_size=48,
    )
    encoder, decoder = tr.ViTModel(vision, add_pooling_layer=False), tr.TrOCRForCausalLM(text)
    model = randomise(tr.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder))
    ids = torch.randint(3, 98, (1, 24), generator=torch.Generator().manual_seed(1))
    sites = ltm.find_sites(model, {"pixel_values": IMAGE, "decoder_input_ids": ids})
    every = (*sites.found, *sites.alternatives)
    assert {site.block for site in sites} and all(site.block.startswith("encoder.") for site in every)
    assert all("is causal" in why for name, why in sites.excluded.items() if name.startswith("decoder."))


def test_a_causal_decoder_of_pixels_is_refused_by_name() -> None:
    model, example = ZOO["hf-imagegpt"]()
    fresh = copy.deepcopy(model)
    for scope in (None, "LOCAL"):
        with pytest.raises(ltm.UnsupportedBlock, match="is causal"):
            ltm.retrofit(model, ltm.LTMConfig(flops=0.8, scope=scope), example)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
