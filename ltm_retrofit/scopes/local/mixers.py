"""Attention modules that take their tokens as a set: merged before them, brought back behind (scope LOCAL)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor, fx, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.call import Signature
from ltm_retrofit.finding.chains import Link, only_tensor
from ltm_retrofit.finding.layouts import some_tokens, spatial_of
from ltm_retrofit.finding.proofs import block_graph, close, count_weights, polynomial
from ltm_retrofit.finding.recording import Attended, Call, Event
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
        if link is None or link.event.name in walk.axes.folded:
            continue
        if link.event.name not in {other.event.name for other in found.values()}:
            found[number] = link
    return found


def _innermost(walk: Walk, attended: Attended) -> Link | None:
    for name in reversed(attended.chain):
        calls = walk.recording.calls.get(name, [])
        if len(calls) != 1 or not name:
            return None
        module = walk.model.get_submodule(name)
        try:
            return _prove(module, name, calls[0], walk.recording.by_name[name][0])
        except UnsupportedBlock:
            if count_weights(module):
                return None  # modules around it do more than attend
    return None


def _prove(module: nn.Module, name: str, call: Call, event: Event) -> Link:
    given, output = only_tensor(call.args, call.kwargs), call.output
    if given is None or not isinstance(output, Tensor) or output.shape != given.shape or given._version != call.version:
        raise UnsupportedBlock("puts out other tokens than go in")
    if _adds_its_input(module, Signature.of(module, name, call.args, call.kwargs, dims=(3, 4))):
        raise UnsupportedBlock("adds its input to what it computes")
    for order in ["BNC"] if given.ndim == 3 else ["BCHW", "BHWC"] if given.ndim == 4 else []:
        count = prod(spatial_of(tuple(given.shape), order))
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(given.device)
        some = shuffled[: max(1, count // 2)]

        def on(index: Tensor, order: str = order) -> Tensor:
            out: Tensor = module(some_tokens(given, order, index), *call.args[1:], **call.kwargs)
            return out

        try:
            if not close(on(shuffled), some_tokens(output, order, shuffled)):
                continue
            once, axis = on(some), -1 if order == "BCHW" else -2
            if not close(on(some.repeat(2)), torch.cat([once, once], dim=axis)):
                raise UnsupportedBlock("its result depends on the number of its tokens")
            cost = polynomial(partial(_first, on, shuffled), FIRST, count)
        except UnsupportedBlock:
            raise
        except Exception:  # another layout, or a number of tokens that it insists on
            continue
        return Link(event, order, cost, count_weights(module))
    raise UnsupportedBlock("minds the order or the number of its tokens")


def _first(on: Callable[[Tensor], Tensor], index: Tensor, count: int) -> Tensor:
    return on(index[:count])


def _adds_its_input(module: nn.Module, signature: Signature) -> bool:
    """Say whether its input reaches the output other than through what mixes: a residual addition lies within it.

    The graph is followed back from the output, past everything but what mixes.
    """
    graph: fx.Graph = block_graph(module, signature, training=False, bias=None)[0]
    nodes = list(graph.nodes)
    tokens = next(node for node in nodes if node.op == "placeholder")
    waiting, seen = list(nodes[-1].all_input_nodes), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node is tokens:
            return True
        if node not in seen and not _ends(module, node):
            waiting += node.all_input_nodes
        seen.add(node)
    return False


def _ends(module: nn.Module, node: fx.Node) -> bool:
    """Say whether tokens do not pass a node as they are."""
    if node.op == "call_module":
        return count_weights(module.get_submodule(str(node.target))) > 0
    name = str(getattr(node.target, "__name__", node.target))
    return name in MIXING or (name == "getattr" and node.args[1] in SIZES) or name in SIZES
