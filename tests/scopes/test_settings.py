"""Attributes that a cut has read: where one changes, the block is refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from own_nets import EXAMPLE, Block, Net, drawn
from torch import Tensor, nn
from torch.nn import functional as F

import ltm_retrofit as ltm

torch.set_num_threads(1)


class Tuned(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.kind, self.gate, self.shape = 1.0, "mlp", None, F.gelu
        self.calls, self.count, self.use_checkpoint = 0, 0, False
        self._hidden, self.rates, self.options, self.checkpoint_scale = 1.0, (1.0, 2.0), {"one": [1.0]}, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x * self._hidden * self.rates[0] * self.options["one"][0] * self.checkpoint_scale
        if not self.training:
            self.count = x.shape[1]
        x = x + self.attn(self.one(x))
        branch = self.shape(self.mlp(self.two(x))) if self.kind == "mlp" else x
        return x + self.scale * (branch if self.gate is None else self.gate(branch))


@pytest.mark.parametrize(
    "name, value",
    [
        pytest.param("scale", 0.5, id="float"),
        pytest.param("kind", "none", id="str"),
        pytest.param("gate", nn.Identity(), id="none-becomes-a-module"),
        pytest.param("shape", F.relu, id="function"),
        pytest.param("_hidden", 0.5, id="private"),
        pytest.param("rates", (0.5, 2.0), id="tuple"),
        pytest.param("options", {"one": [0.5]}, id="nested"),
        pytest.param("checkpoint_scale", 0.5, id="named-like-a-flag"),
    ],
)
def test_an_attribute_that_the_cut_has_frozen_is_refused_where_it_changes(name, value) -> None:
    model = ltm.retrofit(drawn(Net(Tuned)), ltm.LTMConfig(flops=0.7), EXAMPLE)
    block = model.blocks[-1]
    before = getattr(block, name)
    with torch.no_grad():
        expected = model(EXAMPLE)
        setattr(block, name, value)
        with pytest.raises(ltm.UnsupportedBlock, match=rf"'{name}' of a Tuned was .* when block 'blocks\.3' .*restore"):
            model(EXAMPLE)
        with ltm.disabled(model):
            model(EXAMPLE)
        delattr(block, name)
        setattr(block, name, before)
        for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(EXAMPLE), expected)


def test_attributes_that_a_forward_writes_and_flags_of_checkpointing_may_change() -> None:
    model = ltm.retrofit(drawn(Net(Tuned)), ltm.LTMConfig(flops=0.7), EXAMPLE)
    expected = model(EXAMPLE)
    with ltm.disabled(model):
        model(EXAMPLE)
        model.train()(torch.cat([EXAMPLE] * 2))
    model.eval()
    for block in model.blocks:
        assert block.calls > 0 and block.count == 64
        block.use_checkpoint = True
    assert torch.equal(model(EXAMPLE), expected)


def test_attributes_that_no_forward_reads_may_change() -> None:
    model, seen = drawn(Net(Tuned)), []
    handle = model.blocks[1].register_forward_hook(
        lambda block, args, out: seen.append(setattr(block, "mean", len(seen)))
    )
    model(EXAMPLE)
    ltm.retrofit(model, ltm.LTMConfig(flops=0.7), EXAMPLE)
    handle.remove()
    expected = model(EXAMPLE)
    for block in model.blocks:
        block.mean, block.step, block.tag, block.lr_scale = 0.5, 3, "late", 0.1
    assert len(seen) > 1 and torch.equal(model(EXAMPLE), expected)


def test_what_is_in_a_list_is_frozen_too() -> None:
    model = ltm.retrofit(drawn(Net(Tuned)), ltm.LTMConfig(flops=0.7), EXAMPLE)
    model.blocks[2].options["one"][0] = 0.5
    with pytest.raises(ltm.UnsupportedBlock, match="'options'"):
        model(EXAMPLE)


def test_a_compiled_block_notices_that_an_attribute_changed() -> None:
    model = ltm.retrofit(drawn(Net(Tuned)), ltm.LTMConfig(flops=0.7), EXAMPLE)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(EXAMPLE), model(EXAMPLE))
        model.blocks[1].scale = 0.5
        with pytest.raises(ltm.UnsupportedBlock, match="'scale'"):
            compiled(EXAMPLE)
    torch._dynamo.reset()
