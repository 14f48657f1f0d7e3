"""find_sites: what it finds in each family, what it refuses and why, and that it touches nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import timm
import torch
from pieces import snapshot
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm
from ltm_retrofit.errors import CountError, ExampleError, NoAttentionError, UnsupportedBlock
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.macs import count_macs
from ltm_retrofit.merging.methods import Scope

torch.set_num_threads(1)
DEPTH, GRID, DIM, HEADS = 6, (8, 8), 48, 3
#: prefix tokens, attention-bias argument, whether a prefix-only head, classifier modules
KNOWN = {
    "timm-vit": (1, "attn_mask", True, ("head",)),
    "timm-vit-avg-qknorm": (1, "attn_mask", False, ("head",)),
    "timm-deit": (2, "attn_mask", True, ("head", "head_dist")),
    "timm-dinov2": (5, "attn_mask", True, ("head",)),
    "timm-clip": (1, "attn_mask", True, ("head",)),
    "hf-vit": (1, "attention_mask", True, ("classifier",)),
    "hf-deit": (2, "attention_mask", True, ("classifier",)),
    "hf-deit-teacher": (2, "attention_mask", True, ("cls_classifier", "distillation_classifier")),
    "hf-dinov2": (5, "attention_mask", False, ("classifier",)),
    "hf-clip": (1, "attention_mask", False, ()),
}
_CACHE: dict[str, tuple[nn.Module, Sites]] = {}


@pytest.fixture
def found(family: str, build: Callable[..., nn.Module]):
    """A family's model and its sites, found once."""
    if family not in _CACHE:
        model = build(family)
        _CACHE[family] = model, ltm.find_sites(model)
    return _CACHE[family]


# -------------------------------------------------------------------------------------------------- what is found


def test_every_block_of_every_family_is_found_and_proven(family, found):
    model, sites = found
    prefix, bias, prefix_only, readouts = KNOWN[family]
    assert len(sites) == DEPTH and sites.excluded == {}
    for site in sites:
        assert site.layout.prefix == prefix and site.layout.tokens == prefix + GRID[0] * GRID[1]
        assert site.layout.grid == GRID and site.layout.order == "BNC"
        assert site.scope is Scope.FLOW and site.proofs == ("a", "b", "c", "d")
        assert (site.dim, site.heads, site.key_dim) == (DIM, HEADS, DIM // HEADS)
        assert site.bias == bias
        assert set(site.halves) == {(train, with_bias) for train in (False, True) for with_bias in (False, True)}
        assert type(model.get_submodule(site.block)).__name__ == site.kind
        assert site.attention.startswith(site.block + ".")
    assert sites.ending.prefix_only == prefix_only
    assert sites.ending.readouts == readouts
    assert sites.ending.classes == (7 if readouts else 0)
    assert sites[0].block in str(sites) and len(sites.rows()) == DEPTH


def test_sites_are_in_depth_order_and_names_are_the_models_own(found):
    model, sites = found
    calls: list[str] = []
    handles = [
        model.get_submodule(site.block).register_forward_pre_hook(lambda *_, name=site.block: calls.append(name))
        for site in reversed(sites)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    assert calls == [site.block for site in sites]


def test_counted_macs_are_the_whole_models(family, found):
    model, sites = found
    assert sites.total_macs == count_macs(model, torch.randn(2, 3, 32, 32)).total / 2
    assert sum(site.cost(site.layout.tokens, site.layout.tokens) for site in sites) < sites.total_macs


@pytest.mark.parametrize("tokens", [5, 17, 40])
def test_cost_is_the_textbook_polynomial(found, tokens):
    """A plain block: (4 + 2·mlp) N D² and 2 N² D, of which attention's share is 4 N D² + 2 N² D."""
    model, sites = found
    for site in sites:
        block = model.get_submodule(site.block)
        matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
        front = 4 * tokens * DIM**2 + 2 * tokens**2 * DIM
        assert site.cost(tokens, tokens) == matrices * tokens + 2 * tokens**2 * DIM
        assert site.cost(tokens, tokens - 1) == front + (matrices - 4 * DIM**2) * (tokens - 1)


# -------------------------------------------------------------------------------------------------------- key source


def true_key_map(family: str, block: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The mean over heads of the key projection, read by name: what find_sites must find without names."""
    if family.startswith("timm"):
        weight, bias = block.attn.qkv.weight[DIM : 2 * DIM], block.attn.qkv.bias
        bias = None if bias is None else bias[DIM : 2 * DIM]
    else:
        attention = block.self_attn if hasattr(block, "self_attn") else block.attention
        attention = getattr(attention, "attention", attention)
        weight, bias = attention.k_proj.weight, attention.k_proj.bias
    width = DIM // HEADS
    return (
        weight.reshape(HEADS, width, DIM).mean(dim=0),
        None if bias is None else bias.reshape(HEADS, width).mean(dim=0),
    )


def test_the_key_map_is_the_head_mean_of_the_true_key_projection(family, found):
    model, sites = found
    for site in sites:
        block = model.get_submodule(site.block)
        weight, bias = site.key.mean_map(block)
        true_weight, true_bias = true_key_map(family, block)
        assert torch.equal(weight, true_weight)
        assert (bias is None) == (true_bias is None)
        if true_bias is not None:
            assert torch.equal(bias, true_bias)


def test_the_key_map_follows_the_blocks_present_weights(family, found):
    model, sites = copy.deepcopy(found[0]), found[1]
    block = model.get_submodule(sites[0].block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(2)
    assert torch.equal(sites[0].key.mean_map(block)[0], true_key_map(family, block)[0])


def test_h_is_the_attentions_own_input(found, images):
    """z − x is the attention's branch, and the attention module is called with h."""
    model, sites = found
    site = sites[2]
    seen: list[tuple[Tensor, Tensor]] = []
    block = model.get_submodule(site.block)
    attention = model.get_submodule(site.attention)
    handles = [
        block.register_forward_pre_hook(lambda m, args: seen.append(args[0])),
        attention.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        model(images)
        tokens, given = seen
        _, inner = site.halves[False, False].front(block, tokens, None, ())
    for handle in handles:
        handle.remove()
    assert torch.equal(inner, given)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_bias_argument_is_proportional_attention(found, training):
    """A token that stands twice counts like one with log 2 added to its logit."""
    model, sites = found
    site, block = sites[1], model.get_submodule(sites[1].block)
    tokens = torch.randn(1, 9, DIM, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([1, 1, 3, 1, 2, 1, 1, 1, 4])
    repeated = tokens.repeat_interleave(sizes, dim=1)
    first = sizes.cumsum(0) - sizes
    with torch.no_grad():
        expected, _ = site.halves[training, False].front(block, repeated, None, ())
        got, _ = site.halves[training, True].front(block, tokens, sizes.float().log()[None, None, None], ())
    torch.testing.assert_close(got, expected[:, first], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- touches nothing


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_finding_touches_nothing(family, build, training):
    model = build(family)
    model.train(training)
    next(model.children()).train(not training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    before, random_state = snapshot(model), torch.get_rng_state()
    ltm.find_sites(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert snapshot(model) == before
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], value) for key, value in state.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_finding_leaves_foreign_hooks_and_switches_alone(build):
    model, seen = build("timm-vit"), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    fast = torch.backends.mha.get_fastpath_enabled()
    before = snapshot(model)
    sites = ltm.find_sites(model)
    assert len(sites) == DEPTH and snapshot(model) == before and torch.backends.mha.get_fastpath_enabled() == fast


@pytest.mark.parametrize("batch", [1, 4])
def test_any_batch_size_of_example_gives_the_same_sites(build, batch):
    sites = ltm.find_sites(build("timm-vit"), torch.randn(batch, 3, 32, 32))
    plain = ltm.find_sites(build("timm-vit"))
    assert sites.rows() == plain.rows() and sites.total_macs == plain.total_macs


def test_keyword_examples_are_taken(build):
    sites = ltm.find_sites(build("hf-vit"), {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert len(sites) == DEPTH and sites.input_size == {"pixel_values": (1, 3, 32, 32)}


# ----------------------------------------------------------------------------------------------------------- refusals


def test_a_model_without_attention_is_named():
    class Plainly(nn.Sequential):
        pass

    model = Plainly(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.LazyLinear(7))
    model(torch.randn(1, 3, 32, 32))
    with pytest.raises(NoAttentionError, match="Plainly attends nowhere"):
        ltm.find_sites(model, torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "example, match",
    [
        pytest.param(torch.randn(1, 3, 48, 48), r"cannot be run on the example .*3, 48, 48", id="shape"),
        pytest.param(torch.randn(1, 5, 32, 32), r"1, 5, 32, 32", id="channels"),
        pytest.param(torch.randn(1, 3, 32, 32).double(), "float64", id="dtype"),
        pytest.param(torch.randn(1, 3, 32, 32, device="meta"), "meta", id="device"),
        pytest.param(torch.randn(0, 3, 32, 32), "at least one image", id="empty"),
        pytest.param("a photo", "got str", id="type"),
        pytest.param({"pixels": torch.randn(1, 3, 32, 32)}, "cannot be run", id="keyword"),
        pytest.param({}, "tensors", id="empty-dict"),
    ],
)
def test_a_wrong_example_is_an_example_error_and_touches_nothing(build, example, match):
    model = build("timm-vit")
    before, random_state = snapshot(model), torch.get_rng_state()
    with pytest.raises(ExampleError, match=match):
        ltm.find_sites(model, example)
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), random_state)


# ------------------------------------------------------------------------------------------------ hand-written models


class Mixer(nn.Module):
    """Attention with no name that anyone would know."""

    def __init__(self, fused: bool = True, rotate: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.fused, self.rotate = fused, rotate

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        a, b, c = self.one(x).reshape(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.rotate:
            angle = torch.arange(count).float()[:, None] * torch.linspace(0.1, 1, a.shape[-1] // 2)
            cos, sin = angle.cos(), angle.sin()

            def turned(t: Tensor) -> Tensor:
                u, v = t.chunk(2, dim=-1)
                return torch.cat([u * cos - v * sin, u * sin + v * cos], dim=-1)

            a, b = turned(a), turned(b)
        if self.fused:
            y = F.scaled_dot_product_attention(a, b, c)
        else:
            y = (a * a.shape[-1] ** -0.5 @ b.transpose(-2, -1)).softmax(dim=-1) @ c
        return self.two(y.transpose(1, 2).reshape(batch, count, -1))


class Wolf(nn.Module):
    """A pre-norm block with renamed children; ``kind`` says what is unusual about it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.ear, self.paw = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.eye = Mixer(fused=kind != "manual", rotate=kind == "rope")
        self.tail = nn.Sequential(nn.Linear(DIM, 96), nn.GELU(), nn.Linear(96, DIM))
        if kind == "conv":
            self.mix = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "parallel":
            return x + self.eye(self.ear(x)) + self.tail(self.paw(x))
        z = x + self.eye(self.ear(x))
        if self.kind == "empty":
            return z
        if self.kind == "late-input":
            return z + self.tail(self.paw(z)) + 0.1 * x
        h = self.tail(self.paw(z))
        if self.kind == "conv":
            h = h + self.mix(h.transpose(1, 2)).transpose(1, 2)
        if self.kind == "post-norm":
            return self.paw(z + h)
        if self.kind == "branches" and bool((x.mean() > 100).item()):
            return z
        return z + h


class Forest(nn.Module):
    """Patches, a leading token, blocks, a head."""

    def __init__(self, *kinds: str, pool: bool = False, reverse: bool = False) -> None:
        super().__init__()
        self.seed = nn.Conv2d(3, DIM, 4, 4)
        self.king, self.place = nn.Parameter(torch.zeros(1, 1, DIM)), nn.Parameter(torch.zeros(1, 65, DIM))
        self.pack = nn.Sequential(*(Wolf(kind) for kind in kinds))
        self.moon, self.pool, self.reverse = nn.Linear(DIM, 7), pool, reverse

    def forward(self, x: Tensor) -> Tensor:
        y = self.seed(x).flatten(2).transpose(1, 2)
        parts = [self.king.expand(len(y), -1, -1), y]
        y = self.pack(torch.cat(parts[::-1] if self.reverse else parts, dim=1) + self.place)
        return self.moon(y.mean(dim=1) if self.pool else y[:, -1 if self.reverse else 0])


def forest(*kinds: str, **options: bool) -> Forest:
    torch.manual_seed(3)
    model = Forest(*kinds, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.ndim == 1) * 0.5 + 0.15 * torch.randn_like(parameter))
    return model.eval()


EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", ["plain", "manual", "post-norm"])
def test_names_decide_nothing(kind):
    model = forest(*[kind] * 3)
    sites = ltm.find_sites(model, EXAMPLE)
    assert [site.block for site in sites] == ["pack.0", "pack.1", "pack.2"] and not sites.excluded
    assert sites[0].attention == "pack.0.eye" and sites[0].layout.prefix == 1 and sites[0].bias is None
    assert sites.ending.prefix_only and sites.ending.readouts == ("moon",)
    weight, bias = sites[1].key.mean_map(model.pack[1])
    assert torch.equal(weight, model.pack[1].eye.one.weight[DIM : 2 * DIM].reshape(HEADS, -1, DIM).mean(0))
    assert torch.equal(bias, model.pack[1].eye.one.bias[DIM : 2 * DIM].reshape(HEADS, -1).mean(0))


def test_a_hand_written_model_converts_and_restores():
    model = forest(*["plain"] * 4)
    with torch.no_grad():
        before = model(EXAMPLE)
        ltm.retrofit(model, ltm.LTMConfig(flops=0.7), EXAMPLE)
        assert model(EXAMPLE).shape == before.shape and not torch.equal(model(EXAMPLE), before)
        ltm.restore(model)
        assert torch.equal(model(EXAMPLE), before)


@pytest.mark.parametrize(
    "kind, reason",
    [
        pytest.param("conv", r"proof \(b\)", id="back-mixes-tokens"),
        pytest.param("branches", "has no FX graph", id="untraceable"),
    ],
)
def test_what_cannot_be_cut_is_local_at_most_and_says_why(kind, reason):
    model = forest("plain", kind, "plain", pool=True)
    before = snapshot(model)
    sites = ltm.find_sites(model, EXAMPLE)
    assert snapshot(model) == before
    assert "pack.1" not in [site.block for site in sites.of("FLOW")]
    assert [(site.block, site.scope) for site in sites][:2] == [("pack.0", Scope.LOCAL), ("pack.1", Scope.LOCAL)]
    assert sites.excluded == {} and sites.attentions == 3
    text = "; ".join(value for key, value in sites.narrowed.items() if key.startswith("pack.1"))
    assert re.search(reason, text), text


@pytest.mark.parametrize("kind", ["parallel", "late-input", "empty"])
def test_where_no_addition_lies_between_attention_and_mlp_tokens_are_merged_behind_the_block(kind):
    model = forest("plain", kind, kind, "plain", pool=True)
    sites = ltm.find_sites(model, EXAMPLE)
    assert [site.block for site in sites.of("FLOW")] == [f"pack.{number}" for number in range(4)] and not sites.excluded
    assert [site.cost.back == (0, 0, 0) for site in sites.of("FLOW")] == [False, True, True, False]
    with torch.no_grad():
        before = model(EXAMPLE)
        ltm.retrofit(model, ltm.LTMConfig(tokens=(40, 30), sites=("pack.1", "pack.2")), EXAMPLE)
        assert [(row.site, row.tokens_in, row.tokens_out) for row in ltm.get_plan(model).rows] == [
            ("pack.1", 65, 40),
            ("pack.2", 40, 30),
        ]
        assert count_macs(model, EXAMPLE).total == ltm.get_plan(model).macs < ltm.get_plan(model).macs_original
        assert torch.equal(ltm.restore(model)(EXAMPLE), before)


def test_a_last_block_without_a_back_half_gets_no_mask():
    sites = ltm.find_sites(forest(*["parallel"] * 3, pool=True), EXAMPLE)
    assert len(sites.of("FLOW")) == 3
    with pytest.raises(CountError, match="expected 2"):
        ltm.make_plan(sites, ltm.LTMConfig(tokens=(40, 30, 20)))


@pytest.mark.parametrize("pool", [False, True], ids=["class-token-head", "mean-head"])
def test_tokens_are_never_merged_before_an_attention_that_is_left_out(pool):
    sites = ltm.find_sites(forest("plain", "conv", "plain", "plain", pool=pool), EXAMPLE)
    assert not {"pack.0", "pack.1"} & {site.block for site in sites.of("FLOW")}
    assert any(key.startswith("pack.0") for key in sites.narrowed)


def test_blocks_after_one_that_is_left_out_can_still_merge_with_the_class_token_in_place():
    sites = ltm.find_sites(forest("plain", "conv", "plain", "plain"), EXAMPLE)
    assert [(site.block, site.layout.prefix) for site in sites.of("FLOW")] == [("pack.2", 1), ("pack.3", 1)]


def test_tokens_may_merge_after_the_last_attention_that_minds_positions_but_not_before():
    sites = ltm.find_sites(forest("plain", "rope", "plain", pool=True), EXAMPLE)
    assert [site.block for site in sites.of("FLOW")] == [
        "pack.1",
        "pack.2",
    ]  # rope acts in pack.1's front, before its mask
    assert "proof (c)" in sites.narrowed["pack.0"] and "Wolf" in sites.narrowed["pack.0"]


def test_rotary_positions_in_every_block_leave_at_most_the_last():
    sites = ltm.find_sites(forest(*["rope"] * 3), EXAMPLE)
    assert [site.block for site in sites.of("FLOW")] in ([], ["pack.2"])
    assert all("proof (c)" in sites.narrowed[name] for name in ("pack.0", "pack.1"))


def test_where_no_block_can_be_cut_the_plan_names_the_reasons():
    sites = ltm.find_sites(forest(*["branches"] * 2), EXAMPLE)
    assert {site.scope for site in sites} == {Scope.LOCAL} and len(sites.narrowed) == 2
    with pytest.raises(UnsupportedBlock, match=r"scopes that are: LOCAL.* has no FX graph"):
        ltm.make_plan(sites, ltm.LTMConfig(flops=0.9, scope="FLOW"))
    assert {row.scope for row in ltm.make_plan(sites, ltm.LTMConfig(flops=0.9)).rows} == {"LOCAL"}


def test_where_nothing_can_be_merged_the_plan_names_the_reasons():
    """Attention that minds positions, no MLP behind it: there is nothing to save on in any scope."""
    model = forest("rope", "rope")
    for wolf in model.pack:
        wolf.tail = nn.Identity()
    sites = ltm.find_sites(model, EXAMPLE)
    assert len(sites) == 0 and len(sites.excluded) == 2 and all(sites.excluded.values())
    with pytest.raises(UnsupportedBlock, match=r"no block of this model can be cut: pack\.0\.eye: "):
        ltm.make_plan(sites, ltm.LTMConfig(flops=0.7))


def test_trailing_prefix_tokens_keep_merging_local_and_stay_out_of_it():
    sites = ltm.find_sites(forest("plain", "plain", reverse=True), EXAMPLE)
    assert sites.of("FLOW") == () and len(sites) == len(sites.narrowed) == 2
    assert all("do not lead" in reason for reason in sites.narrowed.values())
    for site in sites:
        assert site.scope is Scope.LOCAL and (site.layout.prefix, site.layout.trail) == (0, 1)


@pytest.mark.parametrize(
    "name, options, scopes",
    [
        pytest.param(
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2)},
            {"LOCAL"},
            id="swin",
        ),
        pytest.param("mobilevitv2_050", {}, {"GRID", "LOCAL"}, id="mobilevitv2", marks=pytest.mark.slow),
        pytest.param(
            "eva02_tiny_patch14_224",
            {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3},
            {"FLOW", "LOCAL"},
            id="eva02-rope",
        ),
    ],
)
def test_other_architectures_convert_in_their_scopes_and_are_refused_by_name_in_others(name, options, scopes):
    model = timm.create_model(name, num_classes=7, **options).eval()
    example = torch.randn(1, 3, options.get("img_size", 64), options.get("img_size", 64))
    with torch.no_grad():
        expected = model(example)
    before = snapshot(model)
    for scope in ("FLOW", "GRID", "LOCAL"):
        config = ltm.LTMConfig(flops=0.9, scope=scope)
        if scope in scopes:
            with torch.no_grad():
                assert ltm.retrofit(model, config, example)(example).shape == expected.shape
            assert {row.scope for row in ltm.get_plan(model).rows} == {scope}
            ltm.restore(model)
        else:
            with pytest.raises(UnsupportedBlock) as error:
                ltm.retrofit(model, config, example)
            named = [kind.__name__ for kind in map(type, model.modules())]
            if scope == "FLOW":  # where no map of tokens is in the model, GRID has nothing to name
                assert len(str(error.value)) > 40 and any(name in str(error.value) for name in named)
        assert snapshot(model) == before
    with torch.no_grad():
        assert torch.equal(model(example), expected)


class Map(nn.Module):
    """Blocks whose tokens a convolution reads as a grid afterwards."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.seed, self.pack = nn.Conv2d(3, DIM, 4, 4), nn.Sequential(*(Wolf(kind) for _ in range(3)))
        self.neck = nn.Conv2d(DIM, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pack(self.seed(x).flatten(2).transpose(1, 2))
        return self.neck(y.transpose(1, 2).unflatten(2, (8, 8)))


def test_where_a_neck_reads_the_grid_tokens_flow_and_come_back_after_the_last_block():
    torch.manual_seed(0)
    model = Map("plain").eval()
    sites = ltm.find_sites(model, EXAMPLE)
    assert {site.scope for site in sites} == {Scope.FLOW} and len(sites) == 3 and not sites.ending.prefix_only
    with torch.no_grad():
        before = model(EXAMPLE)
        ltm.retrofit(model, ltm.LTMConfig(flops=0.7), EXAMPLE)
        after = model(EXAMPLE)
        assert ltm.get_plan(model).unmerge and after.shape == before.shape
        assert torch.equal(ltm.restore(model)(EXAMPLE), before)


def test_a_neck_does_not_excuse_blocks_that_mind_positions():
    torch.manual_seed(0)
    sites = ltm.find_sites(Map("rope").eval(), EXAMPLE)
    assert "pack.0" not in [site.block for site in sites.of("FLOW")]


class MixingTail(nn.Module):
    """A block whose MLP part takes the mean over tokens away."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        x = x + self.block.attn(self.block.norm1(x))
        y = self.block.mlp(self.block.norm2(x))
        return x + (y - y.mean(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mixing_tail_is_seen_in_every_precision(build, dtype) -> None:
    model = build("timm-vit")
    for index, block in enumerate(model.blocks):
        model.blocks[index] = MixingTail(block)
    sites = ltm.find_sites(model.eval().to(dtype))
    assert sites.of("FLOW") == () and len(sites.narrowed) == 6
    assert all("proof (b)" in reason for reason in sites.narrowed.values())


def test_a_block_with_a_forward_of_its_own_is_left_alone(build, images) -> None:
    model = build("timm-vit")
    block = model.blocks[3]
    inner = block.forward
    block.forward = own = lambda x, attn_mask=None: inner(x) + 1
    expected = model(images)
    sites = ltm.find_sites(model)
    assert "blocks.3" not in [site.block for site in sites.of("FLOW")] and "instance" in " ".join(
        sites.narrowed.values()
    )
    ltm.restore(ltm.retrofit(model, ltm.LTMConfig(flops=0.8)))
    assert block.forward is own and torch.equal(model(images), expected)


class Siamese(nn.Module):
    """Two views through one backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x) - self.backbone(x.flip(-1))


def test_a_backbone_that_is_called_twice_is_refused_with_the_way_which_works(build: Callable[..., nn.Module]) -> None:
    model, images = Siamese(build("timm-vit")), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
    with pytest.raises(UnsupportedBlock, match=r"called 2 times in one forward pass: convert the part .* by itself"):
        ltm.retrofit(model, ltm.LTMConfig(flops=0.7), images)
    ltm.retrofit(model.backbone, ltm.LTMConfig(flops=0.7))
    with torch.no_grad():
        assert not torch.equal(model(images), before), "nothing merges"
        ltm.restore(model.backbone)
        assert torch.equal(model(images), before)
