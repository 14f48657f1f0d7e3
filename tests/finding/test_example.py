"""Tensors of nested values are listed in one order, with paths; the first of a call is its tokens."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from ltm_retrofit.finding.example import first_tensor, named_tensors, tensors_of

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


@pytest.mark.parametrize(
    "value, paths",
    [
        pytest.param(A, [""], id="tensor"),
        pytest.param((A, [B, None, {"c": C}], 3), ["0", "1.0", "1.2.c"], id="nested"),
        pytest.param({"z": A, "y": (B, C)}, ["z", "y.0", "y.1"], id="insertion-order"),
        pytest.param(UserDict(a=A, b=[B]), ["a", "b.0"], id="a-mapping-of-an-unknown-class"),
        pytest.param(
            ImageClassifierOutput(logits=A, hidden_states=(B, C)),
            ["logits", "hidden_states.0", "hidden_states.1"],
            id="model-output",
        ),
        pytest.param((nn.Linear(1, 1), "text"), [], id="no-tensor"),
    ],
)
def test_tensors_are_listed_depth_first_with_their_paths(value, paths):
    named = list(named_tensors(value))
    assert [path for path, _ in named] == paths
    assert [id(tensor) for _, tensor in named] == [id(tensor) for tensor in (A, B, C)[: len(paths)]]
    assert [id(tensor) for tensor in tensors_of(value)] == [id(tensor) for _, tensor in named]


def test_a_model_output_is_listed_as_torch_flattens_it():
    output = BaseModelOutput(last_hidden_state=A, hidden_states=(B, C))
    leaves = torch.utils._pytree.tree_leaves(output)
    assert [id(tensor) for tensor in tensors_of(output)] == [id(leaf) for leaf in leaves if leaf is not None]


def test_the_first_tensor_of_a_call_comes_positional_arguments_first():
    assert first_tensor((None, A), {"x": B}) is A and first_tensor((), {"flag": True, "x": B}) is B
    assert first_tensor((1, [A]), {}) is None
