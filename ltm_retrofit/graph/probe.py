"""One recorded forward pass: which modules attend, over what, inside which blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ltm_retrofit.errors import ExampleError
from ltm_retrofit.graph.example import Example, run
from ltm_retrofit.undisturbed import undisturbed

PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
SOFTMAXES = (torch.softmax, F.softmax, Tensor.softmax)


@dataclass
class Attended:
    """One attention: keys ``(B, heads, N, d)`` and the chain of modules that it happened in, outermost first."""

    keys: Tensor
    chain: tuple[str, ...]


class AttentionMode(TorchFunctionMode):
    """Sees fused attention, and softmax-of-a-product times a matrix; calls ``found(keys)`` at each.

    ``linear`` may replace the result of every linear map, to follow where keys come from.
    """

    def __init__(
        self,
        found: Callable[[Tensor], None],
        linear: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.found, self.linear = found, linear
        self.keys_of_logits: Any = WeakIdKeyDictionary()
        self.keys_of_weights: Any = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function; recognise attention by what flows into what."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            self.found(args[1] if len(args) > 1 else kwargs["key"])
        if func in PRODUCTS and len(args) == 2 and args[0] in self.keys_of_weights:
            self.found(self.keys_of_weights[args[0]])
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        if func is F.linear and self.linear is not None:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            return self.linear(given["input"], given["weight"], given.get("bias"), result)
        if func in PRODUCTS and len(args) == 2 and all(isinstance(a, Tensor) and a.ndim >= 3 for a in args):
            self.keys_of_logits[result] = args[1].transpose(-2, -1)
            return result
        for source in args:
            if isinstance(source, Tensor) and source.shape == result.shape:
                if source in self.keys_of_logits:
                    # through scaling and masking; a softmax turns logits into weights
                    table = self.keys_of_weights if func in SOFTMAXES else self.keys_of_logits
                    table[result] = self.keys_of_logits[source]
                elif source in self.keys_of_weights:
                    self.keys_of_weights[result] = self.keys_of_weights[source]
        return result


@dataclass
class Call:
    """One recorded call of a module that attends somewhere inside."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    version: int = 0

    def stream(self) -> Tensor | None:
        """Return the token tensor ``(B, N, D)`` that goes in, where one of the same shape comes out."""
        values = [*self.args, *self.kwargs.values()]
        tokens = next((value for value in values if isinstance(value, Tensor)), None)
        same = isinstance(self.output, Tensor) and tokens is not None and tokens.shape == self.output.shape
        return tokens if same and tokens is not None and tokens.ndim == 3 else None


@dataclass
class Recording:
    """What one forward pass showed."""

    output: Any = None
    attended: list[Attended] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    maps: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # 4-d outputs before the first attention
    flat: list[tuple[str, int, int]] = field(
        default_factory=list
    )  # module, width of its (B, C) output, attentions so far

    def readouts(self, classes: int) -> tuple[str, ...]:
        """Return the linear modules after the last attention that put out ``(B, classes)``: who reads the feature."""
        return tuple(name for name, width, seen in self.flat if width == classes and seen == len(self.attended))


class _Stack:
    """The modules that a forward pass is in, and what to keep of those that it leaves."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.open = recording, list[tuple[str, Call, int]]()

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        call = Call(args, dict(kwargs), version=0 if tokens is None else tokens._version)
        self.open.append((name, call, len(self.recording.attended)))

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        left, call, seen = self.open.pop()
        assert left == name, "hooks of a forward pass nest"
        call.output = output
        if len(self.recording.attended) > seen:
            self.recording.calls.setdefault(name, []).append(call)
        if isinstance(output, Tensor) and output.ndim == 4 and not self.recording.attended:
            self.recording.maps.append((name, tuple(output.shape)))
        if isinstance(output, Tensor) and output.ndim == 2 and self.recording.attended:
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == output.shape[1]:
                self.recording.flat.append((name, output.shape[1], len(self.recording.attended)))

    def attended(self, keys: Tensor) -> None:
        self.recording.attended.append(Attended(keys, tuple(name for name, _, _ in self.open)))


def record(model: nn.Module, example: Example) -> Recording:
    """Run the model once on the example, in eval mode and without gradients, and record where it attends.

    Raises:
        ExampleError: where the model cannot be run on it, with the model's own error.
    """
    recording = Recording()
    stack = _Stack(recording)
    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(_enter, stack, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(_leave, stack, name), with_kwargs=True))
        with undisturbed(model), torch.no_grad(), AttentionMode(stack.attended):
            recording.output = run(model, example)
    except Exception as error:
        shown = example if isinstance(example, Mapping) else {"example": example}
        shapes = ", ".join(f"{k}: {tuple(v.shape)} {v.dtype}" for k, v in shown.items() if isinstance(v, Tensor))
        raise ExampleError(
            f"{type(model).__name__} cannot be run on the example ({shapes}): {type(error).__name__}: {error}. "
            "Pass an example of the shape and dtype that the model expects"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return recording


def _enter(stack: _Stack, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    stack.enter(name, module, args, kwargs)


def _leave(
    stack: _Stack, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    stack.leave(name, module, args, kwargs, output)


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Put other forwards in place on these modules' instances, and take them away again."""
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)
