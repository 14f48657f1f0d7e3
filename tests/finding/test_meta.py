"""Models on the meta device are planned for, not converted."""

from __future__ import annotations

import pytest
import torch
from own_nets import EXAMPLE, Block, Net, drawn
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.converted.record import forwards_of
from ltm_retrofit.finding import walk
from ltm_retrofit.macs import count_macs

torch.set_num_threads(1)


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
