"""Attentions that take their tokens as a set run on merged ones; others are never given any."""

from __future__ import annotations

import pytest
import torch
from conversions import call, equal, near
from torch import Tensor, nn
from zoo import ZOO

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of, masks_of
from ltm_retrofit.finding.sites import Sites
from ltm_retrofit.macs import count_macs
from ltm_retrofit.scopes.local.forward import LocalForward

torch.set_num_threads(1)
DIM = 32


def mixing(sites: Sites) -> list[str]:
    return [site.block for site in sites.of("LOCAL") if site.mixes]


@pytest.mark.parametrize(
    "name, first",
    [
        ("timm-xcit", "blocks.0.attn"),
        pytest.param("timm-hiera", "blocks.3.attn", marks=pytest.mark.slow),
        pytest.param("timm-crossvit", "blocks.0.blocks.0.0.attn", marks=pytest.mark.slow),
        pytest.param("timm-visformer", "stage2.0.attn", marks=pytest.mark.slow),
    ],
)
def test_where_mlps_would_keep_few_tokens_attentions_see_merged_ones_too(name, first, tmp_path):
    model, example = ZOO[name]()
    before = call(model, example)
    sites = ltm.find_sites(model, example)
    names = mixing(sites)
    assert names[0] == first and not {site.block for site in sites} & set(names)
    mild = ltm.make_plan(sites, ltm.LTMConfig(flops=0.9, scope="LOCAL"))
    assert not {row.site for row in mild.rows} & set(names)
    with pytest.raises(ltm.BudgetError) as impossible:
        ltm.make_plan(sites, ltm.LTMConfig(flops=0.01, scope="LOCAL"))
    plan = ltm.make_plan(sites, ltm.LTMConfig(flops=impossible.value.nearest, scope="LOCAL"))
    assert set(names) <= {row.site for row in plan.rows}
    ltm.retrofit(model, example=example, plan=plan)
    assert count_macs(model, example).total == plan.macs < mild.macs
    after = call(model, example)
    assert [t.shape for t in after] == [t.shape for t in before] and bool(torch.isfinite(after[0]).all())
    assert equal(call(ltm.restore(model), example), before)


@pytest.mark.parametrize("name", ["timm-xcit", "timm-hiera", "timm-visformer"])
def test_before_mlps_lose_half_of_their_tokens_attentions_join_them(name):
    model, example = ZOO[name]()
    sites = ltm.find_sites(model, example)
    names, joined = set(mixing(sites)), []
    for flops in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        try:
            rows = ltm.make_plan(sites, ltm.LTMConfig(flops=flops, scope="LOCAL")).rows
        except ltm.BudgetError:
            continue
        joined.append(bool(names & {row.site for row in rows}))
        if not joined[-1]:
            assert all(2 * row.tokens_out >= row.tokens_in for row in rows)
    assert joined == sorted(joined) and not joined[0] and joined[-1], "at first MLPs alone, then attentions too"


@pytest.mark.parametrize(
    "name, why",
    [
        ("timm-swin", "a bias for each pair of positions"),
        ("timm-beit", "a bias for each pair of positions"),
        ("timm-levit", "a bias for each pair of positions"),
        ("timm-pvt-v2", "keys from a smaller map"),
        ("timm-cait", "a bias after the softmax: a sum, not a mean"),
    ],
)
def test_an_attention_that_minds_positions_or_counts_is_given_all_its_tokens(name, why):
    model, example = ZOO[name]()
    sites = ltm.find_sites(model, example)
    assert sites.of("LOCAL") and not mixing(sites)


@pytest.mark.parametrize("method", ["ltm", "tome", "pool"])
@pytest.mark.parametrize("name", ["timm-xcit", "timm-visformer"])
def test_equal_tokens_of_a_cell_survive_an_attention(name, method):
    """Where all tokens are the same, an attention gives each the same whatever their number."""
    model, example = ZOO[name]()
    sites = ltm.find_sites(model, example)
    chosen = mixing(sites)[:1]
    nearest = ltm.make_plan(sites, ltm.LTMConfig(flops=reachable(sites, chosen, method), sites=chosen, method=method))
    shapes: list[torch.Size] = []
    attention = model.get_submodule(chosen[0])
    handle = attention.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    call(model, example)
    handle.remove()
    ltm.retrofit(model, example=example, plan=nearest)
    (forward,) = (f for f in forwards_of(model) if isinstance(f, LocalForward))
    axis = 1 if forward.order == "BCHW" else len(shapes[0]) - 1
    one = torch.randn(shapes[0][axis], generator=torch.Generator().manual_seed(1))
    tokens = one.view([-1 if d == axis else 1 for d in range(len(shapes[0]))]).expand(shapes[0]).contiguous()
    with torch.no_grad():
        merged = attention(tokens)
        forward.mode = "original"
        near([merged], [attention(tokens)])


def reachable(sites: Sites, chosen: list[str], method: str) -> float:
    with pytest.raises(ltm.BudgetError) as impossible:
        ltm.make_plan(sites, ltm.LTMConfig(flops=0.01, sites=chosen, method=method))
    return impossible.value.nearest


class Own(nn.Module):
    """An attention whose module may add its input to what it computes."""

    def __init__(self, adds: str) -> None:
        super().__init__()
        self.one, self.two, self.norm, self.adds = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM), adds

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.one(x).chunk(3, dim=-1)
        y = self.two((q @ k.transpose(-2, -1) * DIM**-0.5).softmax(dim=-1) @ v)
        if self.adds == "before-norm":
            return self.norm(x + y)
        return x + y if self.adds == "input" else y


class Block(nn.Module):
    """Attention, a convolution over the sequence that forbids FLOW, and an MLP."""

    def __init__(self, adds: str) -> None:
        super().__init__()
        self.own, self.adds = Own(adds), adds
        self.mix = nn.Conv1d(DIM, DIM, 3, padding=1, groups=DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x) if self.adds else x + self.own(x)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(x)


def network(adds: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (16, DIM)), Block(adds), Block(adds), nn.Flatten(1), nn.Linear(16 * DIM, 5)
    ).eval()


@pytest.mark.parametrize(
    "adds, expected", [("", ["1.own", "2.own"]), ("input", []), ("before-norm", [])], ids=["no", "yes", "yes-and-norm"]
)
def test_an_attention_that_adds_its_input_itself_keeps_all_its_tokens(adds, expected):
    assert mixing(ltm.find_sites(network(adds), torch.randn(1, 16 * DIM))) == expected


def test_named_attentions_take_counts_and_train():
    model, example = network(""), torch.randn(1, 16 * DIM)
    ltm.retrofit(model, ltm.LTMConfig(tokens=(12, 10), sites=("1.own", "2.own")), example)
    plan = ltm.get_plan(model)
    assert [(row.site, row.tokens_in, row.tokens_out) for row in plan.rows] == [("1.own", 16, 12), ("2.own", 16, 10)]
    assert count_macs(model, example).total == plan.macs
    model.train()(torch.randn(4, 16 * DIM)).square().mean().backward()
    assert list(masks_of(model)) == ["1.own", "2.own"]
    assert all(parameter.grad is not None for mask in masks_of(model).values() for parameter in mask.parameters())
