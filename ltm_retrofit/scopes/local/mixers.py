"""Attention modules that take their tokens as a set: merged before them, brought back behind (scope LOCAL)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, fx, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.call import Signature
from ltm_retrofit.finding.chains import Link, only_tensor
from ltm_retrofit.finding.layouts import some_tokens, spatial_of
from ltm_retrofit.finding.proofs import block_graph, close, count_weights, polynomial, reached
from ltm_retrofit.finding.recording import Attended, Call
from ltm_retrofit.finding.walk import Walk

FIRST = 2  # tokens at which its cost is first counted
#: what mixes tokens or features, so that its result is no longer the tokens themselves
MIXING = ("matmul", "bmm", "linear", "einsum", "softmax", "scaled_dot_product_attention", "baddbmm", "addmm", "conv2d")
SIZES = ("shape", "ndim", "dtype", "device", "size", "dim", "numel", "type")


def find_mixers(walk: Walk) -> dict[int, Link]:
    """Find, of the attentions without a site in the best scope, the innermost modules that can run on merged tokens.

    (b) for an attention: shuffling what goes in shuffles what comes out, ``m(u[idx]) = m(u)[idx]``; it accepts fewer
    tokens; and it averages, so that giving it every token twice changes nothing: a sum would shrink with the number
    of tokens. Where it adds its own input to what it computes, merging would lose the tokens themselves.
    """
    found: dict[int, Link] = {}
    for number in walk.unsettled:
        link = _innermost(walk, walk.recording.attended[number])
        if link is None or link.call.name in walk.axes.folded:
            continue
        if link.call.name not in {other.call.name for other in found.values()}:
            found[number] = link
    return found


def _innermost(walk: Walk, attended: Attended) -> Link | None:
    for name in reversed(attended.around):
        calls = walk.recording.attending.get(name, [])
        if len(calls) != 1 or not name:
            return None
        module = walk.model.get_submodule(name)
        try:
            return _prove(module, calls[0])
        except UnsupportedBlock:
            if count_weights(module):
                return None  # modules around it do more than attend
    return None


def _prove(module: nn.Module, call: Call) -> Link:
    given, output = only_tensor(call.args, call.kwargs), call.output
    if given is None or not isinstance(output, Tensor) or output.shape != given.shape or given._version != call.version:
        raise UnsupportedBlock("puts out other tokens than go in")
    if _adds_its_input(module, Signature.of(module, call.name, call.args, call.kwargs, dims=(3, 4))):
        raise UnsupportedBlock("adds its input to what it computes")
    for order in ["BNC"] if given.ndim == 3 else ["BCHW", "BHWC"] if given.ndim == 4 else []:
        try:
            cost = _cost_of_a_set(module, given, call, order)
        except UnsupportedBlock:
            raise
        except Exception:  # another layout, or a number of tokens that it insists on
            continue
        if cost is not None:
            return Link(call, order, cost, count_weights(module))
    raise UnsupportedBlock("minds the order or the number of its tokens")


def _cost_of_a_set(module: nn.Module, given: Tensor, call: Call, order: str) -> tuple[int, int, int] | None:
    """(b) for tokens that lie in this order: return what they cost; None where a module minds their order."""

    def on(index: Tensor) -> Tensor:
        out: Tensor = module(some_tokens(given, order, index), *call.args[1:], **call.kwargs)
        return out

    count = prod(spatial_of(tuple(given.shape), order))
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(given.device)
    some = shuffled[: max(1, count // 2)]
    if not close(on(shuffled), some_tokens(call.output, order, shuffled)):
        return None
    once = on(some)
    if not close(on(some.repeat(2)), torch.cat([once, once], dim=-1 if order == "BCHW" else -2)):
        raise UnsupportedBlock("its result depends on the number of its tokens")
    return polynomial(lambda count: on(shuffled[:count]), FIRST, count)


def _adds_its_input(module: nn.Module, signature: Signature) -> bool:
    """Say whether its input reaches the output other than through what mixes: a residual addition lies within it.

    The graph is followed back from the output, past everything but what mixes.
    """
    graph: fx.Graph = block_graph(module, signature, training=False, bias=None)[0]
    tokens, *_, output = graph.nodes
    passed = reached(output.all_input_nodes, lambda node: () if _ends(module, node) else node.all_input_nodes)
    return tokens in passed


def _ends(module: nn.Module, node: fx.Node) -> bool:
    """Say whether tokens do not pass a node as they are."""
    if node.op == "call_module":
        return count_weights(module.get_submodule(str(node.target))) > 0
    name = str(getattr(node.target, "__name__", node.target))
    return name in MIXING or (name == "getattr" and node.args[1] in SIZES) or name in SIZES
