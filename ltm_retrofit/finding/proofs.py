"""What proofs are made of: equality, costs by token count, and the graph of one module's own forward."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from ltm_retrofit.errors import UnsupportedBlock, in_words
from ltm_retrofit.finding.call import Settings, Signature, read_settings, settings_of, watched
from ltm_retrofit.finding.example import tensors_of
from ltm_retrofit.macs import count_macs_quick

#: what makes numbers of a tensor, or parts of what may be no tensor
SIZING = (operator.getitem, getattr, "size", "dim", "numel", "ndimension", "stride")
#: modules that call each of their children: a mask registered on them would be one
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def close(given: Tensor, expected: Tensor) -> bool:
    """Equal to rounding: relative to the largest magnitude, a few hundred units of the dtype's precision.

    Relative to the tensor's largest entry and not entry by entry: what cancels to nearly zero keeps the rounding errors
    of the large terms that it was made of.
    """
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    if not given.is_floating_point():
        return torch.equal(given, expected)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((given - expected).abs().max()) if given.numel() else 0.0
    return error <= 512 * torch.finfo(given.dtype).eps * max(scale, 1e-6)


def all_close(given: Any, expected: Any) -> bool:
    """`close` for every tensor of two model outputs."""
    ours, theirs = tensors_of(given), tensors_of(expected)
    return len(ours) == len(theirs) and all(map(close, ours, theirs))


def all_equal(given: Any, expected: Any) -> bool:
    """Bit-equality of every tensor of two model outputs."""
    ours, theirs = tensors_of(given), tensors_of(expected)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def count_weights(module: nn.Module) -> int:
    """Count a module's weight matrices; tables that only scale or shift are none."""
    return sum(p.ndim >= 2 and p.numel() > p.shape[0] and p.numel() > p.shape[1] for p in module.parameters())


def polynomial(run_on: Callable[[int], Any], first: int, full: int) -> tuple[int, int, int]:
    """Return ``fixed, linear, square`` such that ``run_on(N)`` costs ``fixed + linear·N + square·N²`` MACs.

    A projection costs the same for each token, attention the same for each pair of tokens, and nothing that we know
    costs more. So three counts say it all: the ``first`` and the two after it, few tokens, which run fast. A fourth
    one checks that it is so.

    Raises:
        UnsupportedBlock: where it is not, or ``full`` tokens are too few.
    """
    if full < first + 2:
        raise UnsupportedBlock(f"proof (d): {full} tokens leave nothing to merge")
    other = min(full, first + 9)
    at = {count: count_macs_quick(partial(run_on, count)) for count in (first, first + 1, first + 2, other)}
    square = (at[first + 2] - 2 * at[first + 1] + at[first]) // 2
    linear = at[first + 1] - at[first] - (2 * first + 1) * square
    fixed = at[first] - first * linear - first * first * square
    if fixed + linear * other + square * other * other != at[other]:
        raise UnsupportedBlock("proof (d): its MACs are no polynomial of its token count")
    return fixed, linear, square


# --------------------------------------------------------------------------------------------------------------- graph


class Bystander(nn.Module):
    """A child that hands on what it is given, and notes that it was called."""

    NAME = "ltm_bystander"
    called = False

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Hand on what comes."""
        self.called = True
        return x


@contextmanager
def bystander(module: nn.Module) -> Iterator[Bystander]:
    """Give a module one child more, its last, and take it away again.

    May a mask be registered on the module? Not where that calls each of its children: the mask would be one of them.
    """
    child = Bystander()
    module._modules[Bystander.NAME] = child
    try:
        yield child
    finally:
        del module._modules[Bystander.NAME]


class _Bound(nn.Module):
    """A block with every argument but the tokens (and the attention bias) bound as recorded."""

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


class _Opaque(fx.Tracer):
    """Follows one forward only: the children of its module stay calls."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@contextmanager
def _asked(block: nn.Module) -> Iterator[None]:
    """Answer ``isinstance(x, torch.Tensor)``, asked in a block's own forward of what stands for a tensor, with yes.

    In the modules that its class and those above it were written in, ``isinstance`` is another function meanwhile. A
    stand-in that gave itself out for a tensor would be taken for one by torch's C code, too, which reads its memory.
    """

    def answer(value: Any, kind: Any) -> bool:
        kinds = kind if type(kind) is tuple else (kind,)
        stands = isinstance(value, fx.Proxy) and value.node.target not in SIZING
        return (stands and Tensor in kinds) or isinstance(value, kind)

    written = {cls.__module__ for cls in type(block).__mro__} - {"builtins"}
    names = [vars(sys.modules[name]) for name in written if name in sys.modules and not name.startswith("torch.")]
    changed = [each for each in names if "isinstance" not in each]
    try:
        for each in changed:
            each["isinstance"] = answer
        yield
    finally:
        for each in changed:
            del each["isinstance"]


def block_graph(
    block: nn.Module, signature: Signature, *, training: bool, bias: str | None
) -> tuple[fx.Graph, Settings]:
    """Return the FX graph of a block's own forward under one training flag, and what it read of the block.

    Raises:
        UnsupportedBlock: where FX cannot follow it, with FX's own words.
    """
    before, given = block.training, settings_of(block)
    object.__setattr__(block, "training", training)  # not .train(): the children stay as they are
    try:
        stand_in, read = watched(block)
        with bystander(block), _asked(block):
            graph = _Opaque().trace(_Bound(stand_in, signature, bias))
    except Exception as error:
        raise UnsupportedBlock(f"its forward has no FX graph: {type(error).__name__}: {in_words(error)}") from error
    finally:
        object.__setattr__(block, "training", before)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix("block.")
        if node.target == Bystander.NAME:
            raise UnsupportedBlock("it calls every child of its own, and a mask would be one of them")
        if node.op == "get_attr" and not _reaches(block, str(node.target)):
            raise UnsupportedBlock(
                "its forward computes with a tensor that is neither a parameter nor a buffer of its own, or makes one "
                "of them, which would keep the value of now: register it, or leave the computation in a child"
            )
    return graph, read_settings(given, block, read)


def reached(start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return all nodes that steps from these ones lead to, themselves included."""
    found, waiting = set[fx.Node](), list(start)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += step(node)
    return found


def _reaches(block: nn.Module, path: str) -> bool:
    """Say whether a path leads to something: FX keeps a tensor that it met elsewhere under a name of its own."""
    with suppress(AttributeError):
        attrgetter(path)(block)
        return True
    return False
