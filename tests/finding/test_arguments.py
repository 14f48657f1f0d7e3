"""What a block is called with besides its tokens: tables that follow them, defaults, sizes."""

from __future__ import annotations

import pytest
import torch
from own_nets import DIM, EXAMPLE, HEADS, Block, Net, drawn, scopes
from torch import Tensor

import ltm_retrofit as ltm
from ltm_retrofit.merging.methods import Scope

torch.set_num_threads(1)


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
