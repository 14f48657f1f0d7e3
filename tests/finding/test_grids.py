"""Grid sites in networks whose later layers read the maps of several stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import ltm_retrofit as ltm
from ltm_retrofit.macs import count_macs

torch.set_num_threads(1)
DIM = 24


class Attend(nn.Module):
    """Attention over a map, and a convolution that forbids FLOW."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(DIM, 3 * DIM, 1), nn.Conv2d(DIM, DIM, 1)
        self.mix = nn.Conv2d(DIM, DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        x = x + self.proj(y.transpose(1, 2).unflatten(2, tuple(x.shape[2:])))
        return x + self.mix(x)


class Pyramid(nn.Module):
    """Two stages; where ``fused``, the maps of both are read at the size of the larger one."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.one = nn.Sequential(nn.Conv2d(3, DIM, 4, 4), Attend(), Attend())
        self.two = nn.Sequential(nn.Conv2d(DIM, DIM, 2, 2), Attend(), Attend())
        self.neck, self.head = nn.Conv2d(2 * DIM if fused else DIM, DIM, 3, padding=1), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        large = self.one(x)
        small = self.two(large)
        if self.fused:
            small = torch.cat([large, F.interpolate(small, size=large.shape[2:])], dim=1)
        return self.head(self.neck(small).mean(dim=(2, 3)))


@pytest.mark.parametrize("fused", [False, True], ids=["chain", "pyramid"])
def test_what_a_grid_costs_does_not_depend_on_where_it_was_merged(fused):
    torch.manual_seed(0)
    model, example = Pyramid(fused).eval(), torch.randn(1, 3, 64, 64)
    sites = ltm.find_sites(model, example)
    names = [site.block for site in sites.of("GRID")]
    assert names and all(name.startswith("one.") for name in names) == fused
    assert sites.covered == sites.attentions == 4
    for name in names:
        with pytest.raises(ltm.BudgetError) as impossible:
            ltm.make_plan(sites, ltm.LTMConfig(flops=0.01, sites=(name,), scope="GRID"))
        ltm.retrofit(model, ltm.LTMConfig(flops=impossible.value.nearest, sites=(name,), scope="GRID"), example)
        assert count_macs(model, example).total == ltm.get_plan(model).macs
        ltm.restore(model)


@pytest.mark.slow
def test_the_pyramid_of_mobilenet_v5_is_counted_as_planned():
    model, example = ZOO["timm-mobilenetv5"]()
    sites = ltm.find_sites(model, example)
    for site in sites.of("GRID"):
        with pytest.raises(ltm.BudgetError) as impossible:
            ltm.make_plan(sites, ltm.LTMConfig(flops=0.01, sites=(site.block,), scope="GRID"))
        ltm.retrofit(model, ltm.LTMConfig(flops=impossible.value.nearest, sites=(site.block,), scope="GRID"), example)
        assert count_macs(model, example).total == ltm.get_plan(model).macs
        ltm.restore(model)
