"""Register tokens are prefix tokens, however and wherever they join."""

from __future__ import annotations

import pytest
import torch
from own_nets import DIM, EXAMPLE, Net, drawn
from torch import Tensor, nn

import ltm_retrofit as ltm

torch.set_num_threads(1)


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
    prefix = {site.block: site.layout.prefix for site in sites.of("LOCAL")}
    assert prefix["blocks.0"] == 0 and {prefix[f"blocks.{number}"] for number in (1, 2, 3)} == {4}
