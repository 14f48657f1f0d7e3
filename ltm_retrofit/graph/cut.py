"""A block's graph → head (up to and including attention) and tail (the MLP part).

Only the block's own ``forward`` is traced; its children stay opaque calls. The two halves are code, not copies of
modules: they look everything up on the live block, so ``.to()``, ``deepcopy``, LoRA or a replaced child all keep
working.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ltm_retrofit.errors import UnsupportedBlock

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
ATTENTIONS = (F.scaled_dot_product_attention, torch.softmax, F.softmax, "softmax")


#: flags that transformers hands down to every layer though its hooks do the recording, outside of the layer
RECORDING_FLAGS = ("output_hidden_states", "output_attentions", "return_dict")


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
    """``head(block, x, bias, followers) -> (z, h)`` and ``tail(block, z)``: z the stream, h attention's input."""

    head: Code
    tail: Code


@dataclass(frozen=True)
class Signature:
    """How a block was called: its token argument's name, and every other argument with its recorded value.

    ``follow`` are arguments with one row for each token (rotary positions): they are gathered along with the tokens.
    """

    tokens: str
    names: tuple[str, ...]
    others: tuple[tuple[str, Any], ...]
    follow: tuple[str, ...] = ()
    by_image: tuple[bool, ...] = ()  # of those: whether the first of three dimensions is the image, not the head

    @classmethod
    def of(cls, block: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        """Read the call ``block(*args, **kwargs)`` off its forward's signature.

        Raises:
            UnsupportedBlock: where other arguments than the tokens are tensors, or hold any.
        """
        parameters = inspect.signature(block.forward).parameters.values()
        names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        if len(args) > len(names):
            raise UnsupportedBlock(f"block {name!r} ({type(block).__name__}) takes variable positional arguments")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = [key for key, value in given.items() if isinstance(value, Tensor)]
        if not tensors or given[tensors[0]].ndim != 3:
            raise UnsupportedBlock(f"block {name!r} ({type(block).__name__}) is not called with (B, N, D) tokens")
        plain = (type(None), bool, int, float, str)
        count = given[tensors[0]].shape[1]
        others = {key: value for key, value in given.items() if key != tensors[0]}
        follow = tuple(key for key, value in others.items() if has_rows(value, count))
        others = {key: value for key, value in others.items() if key not in follow}
        for key, value in others.items():
            if not isinstance(value, plain):
                raise UnsupportedBlock(
                    f"block {name!r} ({type(block).__name__}) also receives {key!r} of type {type(value).__name__}, "
                    "which would have to follow the tokens"
                )
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty and isinstance(p.default, plain)}
        others = {key: value for key, value in {**defaults, **others}.items() if key not in follow}
        by_image = tuple(_first_is_image(given[key]) for key in follow)
        return cls(tensors[0], names, tuple(others.items()), follow, by_image)

    def gather(self, followers: tuple[Any, ...], count: int, positions: Tensor) -> tuple[Any, ...]:
        """Gather the rows of the tokens that are left, ``positions (B, P)`` of ``count``."""
        return tuple(
            gather_rows(value, count, positions, by_image)
            for value, by_image in zip(followers, self.by_image, strict=True)
        )

    def split(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], padding: str | None = None
    ) -> tuple[Tensor, tuple[Any, ...], Tensor | None]:
        """Return the tokens of a call, the arguments that follow them, and what argument ``padding`` masks.

        Raises:
            UnsupportedBlock: where any other argument differs from the recorded call, for which the cut was proven.
        """
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        expected = dict(self.others)
        tokens = given.pop(self.tokens)
        followers = tuple(given.pop(key, None) for key in self.follow)
        mask = given.pop(padding, None) if padding is not None and not torch.compiler.is_exporting() else None
        for key, value in given.items():
            wanted = expected.get(key)
            if key in RECORDING_FLAGS and key not in self.names:
                continue
            boolean = isinstance(value, Tensor) and value.dtype == torch.bool
            if wanted is None and boolean and torch.compiler.is_exporting():
                # transformers writes out the mask of "everything" while exporting: the exported graph checks that it is
                torch._assert_async(value.all(), f"block {name!r} was converted for attention without a mask")
                continue
            if value is not wanted and (isinstance(value, Tensor) or value != wanted):
                shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UnsupportedBlock(
                    f"converted block {name!r} was called with {key}={shown}; the cut was proven for {key}={wanted!r} "
                    "only. Call the model as in the example, or use `with ltm_retrofit.disabled(model):`"
                )
        assert isinstance(tokens, Tensor)
        return tokens, followers, mask


#: the most tokens (class, distillation, registers) that positions have no rows for
MOST_PREFIX = 16


def has_rows(value: Any, count: int) -> bool:
    """Say whether an argument is a tensor, or a tuple of them, with one row for each of ``count`` tokens."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(has_rows(entry, count) for entry in value)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not 2 <= value.ndim <= 4:
        return False
    return 0 <= count - value.shape[-2] <= MOST_PREFIX and value.shape[-2] > 1


def _first_is_image(value: Any) -> bool:
    """Say whether a table, recorded with one image, has a row of its own for each image."""
    if isinstance(value, (tuple, list)):
        return _first_is_image(value[0])
    return bool(value.ndim == 3 and value.shape[0] == 1)


def gather_rows(value: Any, count: int, positions: Tensor, by_image: bool = False) -> Any:
    """Gather the rows ``(…, N, d)`` that belong to the tokens at ``positions (B, P)`` of ``count`` original ones.

    Tables without rows for prefix tokens start behind those. A table shared by images and heads becomes
    ``(B, 1, P, d)``, one of each head ``(B, heads, P, d)``, one of each image ``(B, P, d)``.
    """
    if isinstance(value, (tuple, list)):
        return type(value)(gather_rows(entry, count, positions, by_image) for entry in value)
    missing = count - value.shape[-2]
    rows = positions[:, missing:] - missing
    if value.ndim == 2:
        return value[rows].unsqueeze(1)
    if value.ndim == 3 and by_image:
        return value.expand(len(rows), -1, -1).gather(1, rows.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
    if value.ndim == 3:
        return value[:, rows].transpose(0, 1)
    index = rows[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[-1])
    return value.expand(len(rows), -1, -1, -1).gather(2, index)


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


def trace_block(block: nn.Module, signature: Signature, *, training: bool, bias: str | None) -> fx.Graph:
    """FX-trace a block's own forward, children opaque, under one training flag.

    Raises:
        UnsupportedBlock: where FX cannot follow it, with FX's own words.
    """
    before = block.training
    object.__setattr__(block, "training", training)
    try:
        graph = _Tracer().trace(_Bound(block, signature, bias))
    except Exception as error:
        raise UnsupportedBlock(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
    finally:
        object.__setattr__(block, "training", before)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix("block.")
    return graph


def _argument_nodes(node: fx.Node) -> list[fx.Node]:
    return list(node.all_input_nodes)


def cut_block(block: nn.Module, attention: str, signature: Signature, *, training: bool, bias: str | None) -> Halves:
    """Cut a block at the first residual addition whose branch contains its attention.

    Args:
        block: the module.
        attention: path of the attending module below the block, ``""`` where the block attends itself.
        signature: the recorded call.
        training: the value of ``block.training`` that the pieces are for.
        bias: name of the block's argument that is added to the attention's logits, traced as an input; or None.

    Raises:
        UnsupportedBlock: with the reason.
    """
    graph = trace_block(block, signature, training=training, bias=bias)
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
    if output is total:
        raise UnsupportedBlock("nothing follows its attention: there is no tail to save on")
    inner = _inner(block, first, stream, tokens, bias_node) if not attention else None
    if inner is None:
        inner = next((node for node in _argument_nodes(first) if node in stream and node is not bias_node), None)
    if inner is None:
        raise UnsupportedBlock("its attention takes no tokens from the graph")

    back = _ancestors(output, stop={total})
    if back & {tokens, bias_node, rows} or back & attended - {total} & _ancestors(total, stop=set()):
        raise UnsupportedBlock("its tail reads the block's input or its attention past the residual addition")
    shared = (back & _ancestors(total, stop=set())) - {total}
    if any(node.op != "get_attr" for node in shared):
        raise UnsupportedBlock("its tail reads what was computed before the residual addition")
    return Halves(
        _write(
            nodes,
            _ancestors(total, stop=set()) | _ancestors(inner, stop=set()),
            [tokens, bias_node, rows],
            (total, inner),
        ),
        _write(nodes, back - {total}, [total], output),
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
