"""What a block's own forward asks of its input is answered as when it runs; what cannot be followed says why."""

from __future__ import annotations

import pytest
import torch
from own_nets import EXAMPLE, Block, Net, drawn, scopes
from torch import Tensor, nn

import ltm_retrofit as ltm
from ltm_retrofit.errors import in_words

torch.set_num_threads(1)


class Nested(Block):
    """As in DINOv2's own repository, whose blocks take lists of images of several sizes, too."""

    def forward(self, x_or_list: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(x_or_list, torch.Tensor):
            return super().forward(x_or_list)
        if isinstance(x_or_list, list):
            return [super(Nested, self).forward(x) for x in x_or_list]
        raise AssertionError


class Asking(Block):
    """Checks what its children put out, and does not take a tensor for a parameter, a list or a number."""

    def forward(self, x: Tensor) -> Tensor:
        given = self.attn(self.one(x))
        if not isinstance(given, Tensor) or isinstance(x, (nn.Parameter, list, tuple, int)):
            raise TypeError("expected a tensor")
        x = x + (given[0] if isinstance(given, tuple) else given)
        assert isinstance(x, Tensor) and not isinstance(x.shape, Tensor)
        return x + self.mlp(self.two(x))


class Silent(Block):
    def forward(self, x: Tensor) -> Tensor:
        if type(x) is not Tensor:
            raise AssertionError
        return super().forward(x)


@pytest.mark.parametrize("block", [Nested, Asking])
def test_a_block_may_ask_whether_it_is_given_a_tensor(block) -> None:
    model = drawn(Net(block))
    assert scopes(model) == {"FLOW"}
    with torch.no_grad():
        before = model(EXAMPLE)
        ltm.retrofit(model, ltm.LTMConfig(flops=0.8), EXAMPLE)
        assert not torch.equal(model(EXAMPLE), before)
        with ltm.disabled(model):
            assert torch.equal(model(EXAMPLE), before)


def test_a_reason_is_never_empty() -> None:
    sites = ltm.find_sites(drawn(Net(Silent)), EXAMPLE)
    assert {site.scope for site in sites} == {"LOCAL"}
    why = sites.narrowed["blocks.0.attn"]
    assert "AssertionError: raise AssertionError (line" in why


def test_an_error_without_a_message_says_where_it_was_raised() -> None:
    try:
        raise AssertionError
    except AssertionError as error:
        assert in_words(error).startswith("raise AssertionError (line ")
    assert in_words(ValueError("too few")) == "too few" and in_words(KeyError()) == "KeyError"


class Counting(Block):
    """Makes tensors of numbers that a tracer stands for: torch's C code is not told that they are tensors."""

    def forward(self, x: Tensor) -> Tensor:
        torch.linspace(0, 1, x.shape[-1] // 2)
        return super().forward(x) if isinstance(x, Tensor) else x


def test_what_stands_for_a_number_is_not_taken_for_a_tensor() -> None:
    assert scopes(drawn(Net(Counting))) == {"FLOW"}
    assert "isinstance" not in globals() and isinstance(EXAMPLE, Tensor)
