"""A block's graph → head (up to and including attention) and tail (the MLP part).

Only the block's own ``forward`` is traced; its children stay opaque calls. The two halves are code, not copies of
modules: they look everything up on the live block, so ``.to()``, ``deepcopy``, LoRA or a replaced child all keep
working.
"""

from __future__ import annotations

import copy
import importlib
import operator
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.bystander import NAME as BYSTANDER
from ltm_retrofit.finding.bystander import bystander
from ltm_retrofit.finding.call import Signature
from ltm_retrofit.finding.settings import Settings, read_settings, settings_of, watched

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
ATTENTIONS = (F.scaled_dot_product_attention, torch.softmax, F.softmax, "softmax")


class NoTail(UnsupportedBlock):
    """Attention and MLP work side by side: no residual addition lies between them."""


class Code:
    """One function written by ``torch.fx``: called with the block in place of ``self``; can be pickled and copied."""

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source, self.names = source, names
        scope = dict(names)
        exec(compile(source, "<ltm_retrofit cut>", "exec"), scope)
        self.function: Callable[..., Any] = scope["forward"]

    def __call__(self, *args: Any) -> Any:
        """Run the piece on ``(block, …)``."""
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Code:
        """Code never changes, so a copied model shares it."""
        return self

    def __eq__(self, other: object) -> bool:
        """Compare by what is run."""
        return isinstance(other, Code) and self.source == other.source

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash(self.source)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle modules among the names as their import path."""
        names = {
            key: value.__name__ if isinstance(value, types.ModuleType) else value for key, value in self.names.items()
        }
        modules = [key for key, value in self.names.items() if isinstance(value, types.ModuleType)]
        return _load_code, (self.source, names, modules)


def _load_code(source: str, names: dict[str, Any], modules: Iterable[str]) -> Code:
    return Code(source, {**names, **{key: importlib.import_module(names[key]) for key in modules}})


@dataclass(frozen=True)
class Halves:
    """``head(block, x, bias, followers) -> (z, h)`` and ``tail(block, z)``: z the stream, h attention's input.

    ``settings`` are the block's attributes that both were traced with, but for those that its forward writes.
    """

    head: Code
    tail: Code
    settings: Settings = field(default=(), compare=False)


class _Bound(nn.Module):
    """The block with every argument but the tokens (and the attention bias) bound as recorded, for tracing."""

    def __init__(self, block: nn.Module, signature: Signature, bias: str | None) -> None:
        super().__init__()
        self.block, self.signature, self.bias = block, signature, bias

    def forward(self, tokens: Tensor, bias: Tensor, followers: Any) -> Any:
        given = {**dict(self.signature.others), self.signature.tokens: tokens}
        given.update({name: followers[place] for place, name in enumerate(self.signature.follow)})
        if self.bias is not None:
            given[self.bias] = bias
        args = [given.pop(name) for name in self.signature.names if name in given]
        return self.block.forward(*args, **given)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_block(
    block: nn.Module, signature: Signature, *, training: bool, bias: str | None
) -> tuple[fx.Graph, Settings]:
    """FX-trace a block's own forward, children opaque, under one training flag; return what it read of the block, too.

    Raises:
        UnsupportedBlock: where FX cannot follow it, with FX's own words.
    """
    before, given = block.training, settings_of(block)
    object.__setattr__(block, "training", training)
    try:
        stand_in, read = watched(block)
        with bystander(block):
            graph = _Tracer().trace(_Bound(stand_in, signature, bias))
    except Exception as error:
        raise UnsupportedBlock(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
    finally:
        object.__setattr__(block, "training", before)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix("block.")
        if node.target == BYSTANDER:
            raise UnsupportedBlock("it calls every child of its own, and a mask would be one of them")
        if node.op == "get_attr" and not _reaches(block, str(node.target)):
            raise UnsupportedBlock(
                "its forward computes with a tensor that is neither a parameter nor a buffer of its own, or makes one "
                "of them, which would be frozen as it is: register it, or leave the computation in a child"
            )
    return graph, read_settings(given, block, read)


def _reaches(block: nn.Module, path: str) -> bool:
    owner: Any = block
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def _argument_nodes(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def cut_block(
    block: nn.Module, attention: str, signature: Signature, *, training: bool, bias: str | None, end: bool = False
) -> Halves:
    """Cut a block at the first residual addition whose branch contains its attention, or at its end.

    Args:
        block: the module.
        attention: path of the attending module below the block, ``""`` where the block attends itself.
        signature: the recorded call.
        training: the value of ``block.training`` that the pieces are for.
        bias: name of the block's argument that is added to the attention's logits, traced as an input; or None.
        end: cut behind all that the block does, for blocks in which attention and MLP work side by side.

    Raises:
        UnsupportedBlock: with the reason.
    """
    graph, settings = trace_block(block, signature, training=training, bias=bias)
    nodes = list(graph.nodes)
    tokens, bias_node, rows = (node for node in nodes if node.op == "placeholder")
    stream, attended = {tokens}, set[fx.Node]()
    first: fx.Node | None = None
    for node in nodes:
        sources = _argument_nodes(node)
        if any(source in stream for source in sources):
            stream.add(node)
        if _attends(node, attention) and node in stream:
            first = first or node
            attended.add(node)
        if any(source in attended for source in sources):
            attended.add(node)
    if first is None:
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
        raise NoTail("nothing follows its attention: there is no tail to save on")
    inner = _inner(block, first, stream, tokens, bias_node) if not attention else None
    if inner is None:
        inner = next((node for node in _argument_nodes(first) if node in stream and node is not bias_node), None)
    if inner is None:
        raise UnsupportedBlock("its attention takes no tokens from the graph")

    back = _ancestors(output, stop={total})
    if back & {tokens, bias_node, rows} or back & attended - {total} & _ancestors(total, stop=set()):
        raise NoTail("its tail reads the block's input or its attention past the residual addition")
    shared = (back & _ancestors(total, stop=set())) - {total}
    if any(node.op != "get_attr" for node in shared):
        raise NoTail("its tail reads what was computed before the residual addition")
    return Halves(
        _write(
            nodes,
            _ancestors(total, stop=set()) | _ancestors(inner, stop=set()),
            [tokens, bias_node, rows],
            (total, inner),
        ),
        _write(nodes, back - {total}, [total], output),
        settings,
    )


def _inner(block: nn.Module, first: fx.Node, stream: set[fx.Node], tokens: fx.Node, bias: fx.Node) -> fx.Node | None:
    """Find the tokens that a block which attends by itself projects: what goes into the first linear map before it."""
    before = _ancestors(first, stop=set())
    for node in first.graph.nodes:
        if node not in before or node not in stream or node is tokens:
            continue
        linear = node.op == "call_function" and node.target is F.linear
        if node.op == "call_module":
            linear = isinstance(block.get_submodule(str(node.target)), nn.Linear)
        if linear:
            given = next((argument for argument in _argument_nodes(node) if argument in stream), None)
            return given if given is not bias else None
    return None


def _attends(node: fx.Node, attention: str) -> bool:
    if attention:
        target = str(node.target)
        return node.op == "call_module" and (target == attention or attention.startswith(target + "."))
    return node.op in ("call_function", "call_method") and node.target in ATTENTIONS


def _is_residual(node: fx.Node, stream: set[fx.Node], attended: set[fx.Node]) -> bool:
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS:
        return False
    sides = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return (
        len(sides) == 2
        and sum(side in attended for side in sides) == 1
        and all(side in attended or side in stream for side in sides)
    )


def _ancestors(node: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
    """Return a node and all that it needs, not looking behind ``stop``."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        if current not in stop:
            waiting.extend(_argument_nodes(current))
    return found


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
