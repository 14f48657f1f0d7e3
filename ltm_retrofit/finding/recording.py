"""One recorded forward pass: which modules attend, over what, inside which blocks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ltm_retrofit.errors import CountError, ExampleError, in_words
from ltm_retrofit.finding.attention import Attention, AttentionMode
from ltm_retrofit.finding.example import Example, first_tensor, flags_of, floats_of, logits_of, run
from ltm_retrofit.macs import counting
from ltm_retrofit.undisturbed import undisturbed


class Reached(Exception):
    """What a pass was for was seen; the rest of the model need not run."""


@dataclass
class Call:
    """One call of a module: when it began and ended, which tensor went in and which came out (serial numbers).

    Arguments and output are kept only where it attends somewhere inside.
    """

    name: str
    start: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    version: int = 0  # of its first tensor, which a later one shows to be overwritten in place
    source: int | None = None
    shape_in: tuple[int, ...] = ()
    end: int = 0
    output: Any = None
    result: int | None = None
    shape_out: tuple[int, ...] = ()
    swapped: bool = False  # whether a hook of the module itself put another tensor in its first one's or output's place

    def stream(self) -> Tensor | None:
        """Return the token tensor ``(B, N, D)`` that goes in, where one of the same shape comes out."""
        tokens = first_tensor(self.args, self.kwargs)
        same = isinstance(self.output, Tensor) and tokens is not None and tokens.shape == self.output.shape
        return tokens if same and tokens is not None and tokens.ndim == 3 else None

    def without(self, module: nn.Module, names: Collection[str]) -> Call:
        """Return the call that leaves these arguments out: masks that mask nothing change no more than bits."""
        if not names:
            return self
        places = list(inspect.signature(module.forward).parameters)
        args = tuple(None if places[place] in names else value for place, value in enumerate(self.args))
        kwargs = {key: None if key in names else value for key, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs, output=module(*args, **kwargs))


@dataclass
class Attended:
    """One attention, with the modules around it, outermost first, and when it happened."""

    seen: Attention
    around: tuple[str, ...]
    time: int

    @property
    def owner(self) -> str:
        """The innermost module that it happened in."""
        return self.around[-1]


@dataclass
class Recording:
    """What one forward pass showed."""

    output: Any = None
    macs: int = 0
    attended: list[Attended] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)  # of all modules, in the order in which they began
    used: dict[int, set[str]] = field(default_factory=dict)  # tensor → the innermost modules that compute with it
    joined: dict[int, tuple[int, int]] = field(default_factory=dict)  # token count → constant tokens at front and end
    flagged: Callable[[Tensor], bool] = bool  # whether a tensor of the pass depends on an input that is no image
    attending: dict[str, list[Call]] = field(default_factory=dict)  # of modules that attend somewhere inside
    maps: list[tuple[int, ...]] = field(default_factory=list)  # shapes of 4-d outputs before the first attention
    #: module, width of its (B, C) output, attentions so far
    flat: list[tuple[str, int, int]] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, list[Call]]:
        """The calls of each module; to be asked for when the pass is over."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.name, []).append(call)
        return found

    def readouts(self, classes: int) -> tuple[str, ...]:
        """Return the linear modules after the last attention that put out ``(B, classes)``: who reads the feature."""
        return tuple(name for name, width, seen in self.flat if width == classes and seen == len(self.attended))

    def classifier(self) -> tuple[int, tuple[str, ...]]:
        """Return C and who reads the feature; 0 and nobody where the output is no classifier's: features are none."""
        logits = logits_of(self.output)
        readouts = () if logits is None else self.readouts(logits.shape[1])
        return (logits.shape[1] if logits is not None and readouts else 0), readouts


class _Stack:
    """The modules that a forward pass is in, and what to keep of those that it leaves."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.open = recording, list[tuple[Call, int]]()
        # a tensor's id is given to another one once it is gone; a serial number is not
        self.serials: Any = WeakIdKeyDictionary()
        self.time, self.issued = count(1), count(1)
        self.hooked, self.unhooked = set[str](), list[Any]()

    def serial(self, tensor: Tensor) -> int:
        if tensor not in self.serials:
            self.serials[tensor] = next(self.issued)
        return int(self.serials[tensor])

    def before_hooks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See what a module with hooks of its own is given, before they do."""
        self.unhooked.append(first_tensor(args, kwargs))

    def before_more_hooks(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """See what it puts out."""
        self.open[-1][0].swapped |= self.unhooked.pop() is not first_tensor(args, kwargs)
        self.unhooked.append(output)

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = first_tensor(args, kwargs)
        call = Call(name, next(self.time), args, dict(kwargs), 0 if tokens is None else tokens._version)
        if tokens is not None and tokens.is_floating_point():
            call.source, call.shape_in = self.serial(tokens), tuple(tokens.shape)
        self.recording.calls.append(call)
        self.open.append((call, len(self.recording.attended)))

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, seen = self.open.pop()
        assert call.name == name, "hooks of a forward pass nest"
        call.end, attended = next(self.time), len(self.recording.attended)
        if name in self.hooked:
            call.swapped |= self.unhooked.pop() is not output
        if attended > seen:
            call.output = output
            self.recording.attending.setdefault(name, []).append(call)
        else:  # the activations of a whole pass are many
            call.args, call.kwargs = (), {}
        if not isinstance(output, Tensor):
            return
        call.result, call.shape_out = self.serial(output), tuple(output.shape)
        if output.ndim == 4 and not attended:
            self.recording.maps.append(tuple(output.shape))
        weight = getattr(module, "weight", None)
        if output.ndim == 2 and attended and isinstance(weight, Tensor) and weight.ndim == 2:
            if weight.shape[0] == output.shape[1]:
                self.recording.flat.append((name, output.shape[1], attended))

    def used(self, tensor: Tensor) -> None:
        if tensor in self.serials and self.open:
            self.recording.used.setdefault(self.serials[tensor], set()).add(self.open[-1][0].name)

    def attended(self, seen: Attention) -> None:
        around = tuple(call.name for call, _ in self.open)
        self.recording.attended.append(Attended(seen, around, next(self.time)))


def record(model: nn.Module, example: Example) -> Recording:
    """Run the model once on the example, in eval mode and without gradients, and record where it attends.

    Raises:
        ExampleError: where the model cannot be run on it, with the model's own error.
    """
    recording = Recording()
    stack = _Stack(recording)
    mode = AttentionMode(stack.attended, data=floats_of(example), used=stack.used, flags=flags_of(example))
    try:
        with ExitStack() as hooks, undisturbed(model), torch.no_grad(), counting() as counter, mode:
            for name, module in model.named_modules():
                if module._forward_pre_hooks or module._forward_hooks:
                    stack.hooked.add(name)
                    first = partial(module.register_forward_pre_hook, with_kwargs=True, prepend=True)
                    hooks.enter_context(first(stack.before_hooks))
                    last = partial(module.register_forward_hook, with_kwargs=True, prepend=True)
                    hooks.enter_context(last(stack.before_more_hooks))
                hooks.enter_context(module.register_forward_pre_hook(partial(stack.enter, name), with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(partial(stack.leave, name), with_kwargs=True))
            recording.output = run(model, example)
        recording.macs = int(counter.get_total_flops()) // 2
        recording.joined, recording.flagged = mode.joined, mode.flags.__contains__
    except CountError:
        raise
    except Exception as error:
        shown = example if isinstance(example, Mapping) else {"example": example}
        shapes = ", ".join(f"{k}: {tuple(v.shape)} {v.dtype}" for k, v in shown.items() if isinstance(v, Tensor))
        raise ExampleError(
            f"{type(model).__name__} cannot be run on the example ({shapes}): "
            f"{type(error).__name__}: {in_words(error)}. Pass an example of the shape and dtype that the model expects"
        ) from error
    return recording


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
