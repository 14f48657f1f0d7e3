"""A block's graph → front (up to and including attention) and back (the MLP part); and the map behind its keys.

Only the block's own ``forward`` is followed; its children stay opaque calls. The two halves are code, not copies of
modules: they look everything up on the live block, so ``.to()``, ``deepcopy``, LoRA or a replaced child all keep
working.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.attention import Attention, AttentionMode
from ltm_retrofit.finding.call import Signature
from ltm_retrofit.finding.proofs import block_graph, reached
from ltm_retrofit.finding.recording import Call, Reached
from ltm_retrofit.scopes.flow.site import Code, Halves, KeySource

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
ATTENTIONS = (F.scaled_dot_product_attention, torch.softmax, F.softmax, "softmax")


class NoBack(UnsupportedBlock):
    """Attention and MLP work side by side: no residual addition lies between them."""


def cut_block(
    block: nn.Module, attention: str, signature: Signature, *, training: bool, bias: str | None, end: bool = False
) -> Halves:
    """Cut a block at the first residual addition whose branch contains its attention, or at its end.

    That addition is where the stream is whole again: one tensor that holds all that came before. So a mask there needs
    to merge nothing else, and the back needs nothing but what it is given, which is checked.

    Args:
        block: the module.
        attention: path of the attending module below the block, ``""`` where the block attends itself.
        signature: the recorded call.
        training: the value of ``block.training`` that the pieces are for.
        bias: name of the block's argument that is added to the attention's logits, an input of the front; or None.
        end: cut behind all that the block does, for blocks in which attention and MLP work side by side.

    Raises:
        UnsupportedBlock: with the reason.
    """
    graph, settings = block_graph(block, signature, training=training, bias=bias)
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    tokens, bias_node, _ = inputs
    # what depends on the tokens, and of that what depends on the attention: the stream before it and the branch with it
    stream = reached([tokens], lambda node: node.users)
    attending = [node for node in nodes if node in stream and _attends(node, attention)]
    attended = reached(attending, lambda node: node.users)
    if not attending:
        raise UnsupportedBlock("its own graph does not show the attention")
    total = next((node for node in nodes if _is_residual(node, stream, attended)), None)
    if total is None:
        raise UnsupportedBlock("no residual addition after its attention")
    output = nodes[-1].args[0]
    if not isinstance(output, fx.Node):
        raise UnsupportedBlock(f"it returns a {type(output).__name__}, not one tensor")
    if end:
        total = output
    elif output is total:
        raise NoBack("nothing follows its attention: there is no back half to save on")
    inner = _inner(block, attending[0], stream, tokens, bias_node) if not attention else None
    if inner is None:
        inner = next((node for node in attending[0].all_input_nodes if node in stream and node is not bias_node), None)
    if inner is None:
        raise UnsupportedBlock("its attention takes no tokens from the graph")

    before, back = _ancestors(total), _ancestors(output, stop=total)
    if back & set(inputs) or back & attended - {total} & before:
        raise NoBack("its back half reads the block's input or its attention past the residual addition")
    if any(node.op != "get_attr" for node in back & before - {total}):  # parameters may be read by both halves
        raise NoBack("its back half reads what was computed before the residual addition")
    return Halves(
        _write(nodes, before | _ancestors(inner), inputs, (total, inner)),
        _write(nodes, back - {total}, [total], output),
        settings,
    )


def _inner(block: nn.Module, first: fx.Node, stream: set[fx.Node], tokens: fx.Node, bias: fx.Node) -> fx.Node | None:
    """Find the tokens that a block which attends by itself projects: what goes into the first linear map before it."""
    before = _ancestors(first)
    for node in first.graph.nodes:
        if node not in before or node not in stream or node is tokens:
            continue
        linear = node.op == "call_function" and node.target is F.linear
        if node.op == "call_module":
            linear = isinstance(block.get_submodule(str(node.target)), nn.Linear)
        if linear:
            given = next((argument for argument in node.all_input_nodes if argument in stream), None)
            return given if given is not bias else None
    return None


def _attends(node: fx.Node, attention: str) -> bool:
    if attention:
        target = str(node.target)
        return node.op == "call_module" and (target == attention or attention.startswith(target + "."))
    return node.op in ("call_function", "call_method") and node.target in ATTENTIONS


def _is_residual(node: fx.Node, stream: set[fx.Node], attended: set[fx.Node]) -> bool:
    """Say whether a node adds what depends on the attention to what depends on the tokens only."""
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS:
        return False
    sides = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return (
        len(sides) == 2
        and sum(side in attended for side in sides) == 1
        and all(side in attended or side in stream for side in sides)
    )


def _ancestors(node: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
    """Return a node and all that it needs, not looking behind ``stop``."""
    return reached([node], lambda current: () if current is stop else current.all_input_nodes)


def _write(nodes: list[fx.Node], needed: set[fx.Node], inputs: list[fx.Node], result: Any) -> Code:
    """Write the needed nodes, in their order, as one function of the block and ``inputs``."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for index, node in enumerate(inputs):
        new[node] = graph.placeholder(f"input_{index}")
    for node in nodes:
        if node in needed and node not in new:
            new[node] = graph.node_copy(node, lambda source: new[source])
    graph.output(fx.map_arg(result, lambda source: new[source]))
    written = graph.python_code("self")
    # FX adds names that its own generated signatures need; keep those that the text uses
    names = {key: value for key, value in written.globals.items() if key in written.src}
    return Code(written.src, copy.copy(names))


# ---------------------------------------------------------------------------------------------------------------- keys


def find_keys(block: nn.Module, call: Call, inner: Tensor) -> tuple[KeySource, int, int]:
    """Find the affine map behind the block's keys by the gradient of the keys, whatever it is called.

    The result of every linear map becomes a leaf of the gradient. So the keys depend on the last maps before them only,
    and a feature whose gradient is not zero is part of the head's key: that tells keys from queries and values in one
    packed map, and one head from the next. Returns the source, the number of key heads and the width of a key.

    Raises:
        UnsupportedBlock: where keys come from no, or from more than one, affine map of the attention's input.
    """
    leaves: list[tuple[Tensor, Tensor, Tensor | None, Tensor]] = []
    seen: list[Attention] = []

    def linear(source: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor) -> Tensor:
        leaf = result.detach().requires_grad_()
        leaves.append((source.detach(), weight, bias, leaf))
        return leaf

    def found(attended: Attention) -> None:
        seen.append(attended)
        raise Reached

    with torch.enable_grad(), AttentionMode(found, linear):
        try:
            block.forward(*call.args, **call.kwargs)
        except Reached:
            pass
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    if not seen:
        raise UnsupportedBlock("its attention is not seen when it is called by itself")
    if seen[0].packed is not None:
        return _packed_keys(seen[0].packed, names, inner)
    keys = seen[0].keys
    if keys is None:
        raise UnsupportedBlock(f"its attention is {seen[0].kind}: it has no keys that tokens could be compared by")
    if keys.ndim == 3:  # one head, or heads beside images
        with torch.enable_grad():
            keys = keys.reshape(len(inner), -1, *keys.shape[1:])
    if keys.ndim != 4 or keys.shape[2] != inner.shape[1]:
        raise UnsupportedBlock(f"its keys have shape {tuple(keys.shape)}, expected (B, heads, {inner.shape[1]}, d)")
    heads = keys.shape[1]
    # random weights: a plain sum has no gradient where keys are normalised
    weights = torch.randn(keys.shape[0], *keys.shape[2:], generator=torch.Generator().manual_seed(0)).to(keys)
    if not leaves:
        raise UnsupportedBlock("its keys come from no linear map that torch's own function computes")
    features: dict[int, list[Tensor]] = {}
    for head in range(heads):
        with torch.enable_grad():
            probe = (keys[:, head] * weights).sum()
        gradients = torch.autograd.grad(probe, [leaf for *_, leaf in leaves], retain_graph=True, allow_unused=True)
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                used = gradient.reshape(-1, gradient.shape[-1]).abs().amax(dim=0) > 0
                features.setdefault(index, []).append(used.nonzero().flatten())
    if len(features) != 1:
        raise UnsupportedBlock(f"its keys come from {len(features)} linear maps, expected one")
    ((index, own),) = features.items()
    source, weight, bias, _ = leaves[index]
    if source.shape != inner.shape or not torch.equal(source, inner):
        raise UnsupportedBlock("its keys are no affine map of the attention's input")
    if len({len(used) for used in own}) != 1:
        raise UnsupportedBlock("its heads have keys of different widths")
    path = names.get(id(weight)) or _made(block, weight)
    if path is None:
        raise UnsupportedBlock("its key projection is computed, and no weight of a module")
    bias_source = None if bias is None else names.get(id(bias), bias.detach().clone())
    return KeySource(path, bias_source, torch.stack(own).cpu()), heads, len(own[0])


def _made(block: nn.Module, weight: Tensor) -> str | None:
    """Return the path of a weight that a module makes of parameters whenever it is called: pruned, or normalised."""
    for name, module in block.named_modules():
        made = getattr(module, "weight", None)
        if isinstance(made, Tensor) and made.shape == weight.shape and torch.equal(made, weight):
            return f"{name}.weight".lstrip(".")
    return None


def _packed_keys(packed: Mapping[str, Any], names: dict[int, str], inner: Tensor) -> tuple[KeySource, int, int]:
    """Read the keys of `nn.MultiheadAttention` off its one packed weight: its second third."""
    weight, bias, heads = (packed[name] for name in ("in_proj_weight", "in_proj_bias", "num_heads"))
    if weight is None or id(weight) not in names:
        raise UnsupportedBlock("its keys are projected by another weight than its queries")
    key = packed["key"] if packed["key"].shape == inner.shape else packed["key"].transpose(0, 1)  # batch_first=True
    if key.shape != inner.shape or not torch.equal(key, inner):
        raise UnsupportedBlock("its keys are no affine map of the attention's input")
    dim, width = inner.shape[-1], inner.shape[-1] // heads
    features = dim + torch.arange(dim).view(heads, width)
    return KeySource(names[id(weight)], None if bias is None else names.get(id(bias)), features), heads, width
