"""How many multiply-adds does a model cost? Two independent counters answer, and they must agree to the last one.

A MAC is one multiply–add of a matrix product, a convolution or an attention product. Norms, activations, softmax,
pooling, interpolation, sorting and copying are not MACs, whatever they cost in time.

fvcore reads the operators off a jit trace, torch's `FlopCounterMode` off the dispatcher. Each is blind where the other
is not (fvcore: fused attention; torch: matrix-vector products), and both count as zero what they do not know. So
`ltm_retrofit.operators` fills the gaps of both. An operator that nobody has vouched for is an error, and so is a
disagreement.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ltm_retrofit.errors import CountError, ExampleError
from ltm_retrofit.operators import FREE_OPS, TRACE_HANDLES, dispatch_handles, is_free, refusal
from ltm_retrofit.undisturbed import random_numbers_kept, run, slow_path, undisturbed


@dataclass(frozen=True)
class MacCount:
    """Multiply–adds of one forward pass.

    Args:
        total: of the whole model.
        by_module: path of a module → MACs of that module and all below it; ``""`` is the whole model. A module with
            two paths is listed under the first. One that is never called has 0: what it computes where someone calls
            its ``.forward()`` counts for that someone.
    """

    total: int
    by_module: dict[str, int]


def count_macs(model: nn.Module, example: Tensor | Mapping[str, Any]) -> MacCount:
    """Count the multiply–adds of ``model`` on ``example``; the model is left as it was found.

    Runs the model twice in eval mode under no_grad, once for each counter.

    Args:
        model: any timm or Hugging Face model, converted or not.
        example: a tensor, or keyword arguments (tensors and plain values). The count is for this batch size.

    Raises:
        CountError: where the two counters disagree, or where an operator occurs that cannot be counted for certain.
        ExampleError: where the model does not run on the example.
    """
    adapter = _TensorsOnly(model, example)
    with undisturbed(adapter.model), torch.no_grad():
        with random_numbers_kept(adapter.model):  # a model that draws (random masking) shows both the same draws
            dispatched = _by_dispatch(adapter)
        traced = _by_trace(adapter)
    if traced[""] != dispatched[""]:
        raise CountError(
            f"two counters must agree and do not: fvcore counts {traced['']:,} MACs, "
            f"torch's FlopCounterMode {dispatched['']:,}{_where_they_differ(traced, dispatched)}; "
            "one of them misreads an operator there, so neither number is reported"
        )
    return MacCount(total=traced[""], by_module=traced)


def count_macs_again(model: nn.Module, example: Tensor | Mapping[str, Any], dispatched: int) -> int:
    """Count a model once more that torch's counter has seen already (`counting`): one pass instead of two.

    Raises:
        CountError, ExampleError: as `count_macs`.
    """
    adapter = _TensorsOnly(model, example)
    with undisturbed(adapter.model), torch.no_grad():
        traced = _by_trace(adapter)
    return dispatched if traced[""] == dispatched else count_macs(model, example).total  # which says where they differ


def count_macs_quick(fn: Callable[[], object]) -> int:
    """Count the multiply–adds that calling ``fn`` costs, by torch's counter alone.

    For pieces of a model that `count_macs` has counted as a whole: an operator that nobody knows counts as zero here.
    The caller sees to eval mode and no_grad.

    Raises:
        CountError: where an operator occurs that is known to multiply, and for which there is no formula.
    """
    with slow_path(), _dispatch_counter({}) as counter:
        fn()
    return int(counter.get_total_flops()) // 2


def counting() -> FlopCounterMode:
    """Return torch's counter with the handlers it lacks, to be entered by a caller that reads it meanwhile."""
    return _dispatch_counter({})


# ---------------------------------------------------------------------------------------------------------------------
# The model as a counter takes it


class _TensorsOnly(nn.Module):
    """The model as a function of tensors that returns a tuple of tensors: a jit trace can take nothing else."""

    def __init__(self, model: nn.Module, example: Tensor | Mapping[str, Any]) -> None:
        super().__init__()
        # What torch.compile returns cannot be traced; what it wraps can, and costs the same.
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.whole, self.keeper = isinstance(example, Tensor), _KeepAlive()
        self.traced = False
        if not isinstance(example, (Tensor, Mapping)):
            raise ExampleError(f"example must be a tensor or a dict of keyword arguments, got {type(example).__name__}")
        named = example if isinstance(example, Mapping) else {"tensor": example}
        self.tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        self.plain = {key: value for key, value in named.items() if not isinstance(value, Tensor)}
        if not self.tensors:
            raise ExampleError(f"example must hold at least one tensor, got the keys {list(self.plain)}")

    def inputs(self) -> tuple[Tensor, ...]:
        """Copies, for models that write into their input."""
        return tuple(tensor.detach().clone() for tensor in self.tensors.values())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model as its user would."""
        with self.keeper if self.traced else nullcontext():
            named = dict(zip(self.tensors, tensors, strict=True))
            output = self.model(*tensors) if self.whole else run(self.model, named | self.plain)
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return (*leaves, *self.keeper.marks)

    def describe(self) -> str:
        """Say what goes in, for messages."""
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())


class _KeepAlive(TorchFunctionMode):
    """Make every result matter to the output of a trace, which leaves out whatever the output does not need.

    What is computed in vain takes its time all the same, and torch's counter sees it. A scalar made with
    ``new_zeros`` depends on the result in the trace and costs neither memory nor arithmetic.
    """

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and mark what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
                self.marks.append(tensor.new_zeros(()))
        return result


# ---------------------------------------------------------------------------------------------------------------------
# torch's counter


def _by_dispatch(adapter: _TensorsOnly) -> dict[str, int]:
    """Module path → MACs as the dispatcher sees them; only modules in which something was counted."""
    names: dict[nn.Module, str] = {}
    for name, module in adapter.model.named_modules():
        names.setdefault(module, name)
    counter = _dispatch_counter(names)
    try:
        with counter:
            adapter(*adapter.inputs())
    except CountError:
        raise
    except Exception as error:
        raise ExampleError(
            f"{type(adapter.model).__name__} does not run on the example ({adapter.describe()}): {_brief(error)}"
        ) from error
    counts = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    return counts | {"": counter.get_total_flops() // 2}


class _Where:
    """Which modules are running; in place of torch's own tracker.

    Torch's hooks into autograd, and fails under no_grad where a module is given a view of a parameter (the class token
    of CaiT, the latent query of SigLIP): "Expected gradient function to be set".
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.names = names
        self.parents = ["Global"]
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> None:
        if self.names:
            self.hooks = [
                register_module_forward_pre_hook(self.enter),
                register_module_forward_hook(self.leave, always_call=True),
            ]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def enter(self, module: nn.Module, _: object) -> None:
        """Note that a module begins."""
        if module in self.names:
            self.parents.append(self.names[module])

    def leave(self, module: nn.Module, _: object, __: object) -> None:
        """Note that it has ended."""
        if module in self.names:
            self.parents.pop()


def _dispatch_counter(names: Mapping[nn.Module, str]) -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=dict(dispatch_handles()))
    counter.mod_tracker = _Where(names)  # type: ignore[assignment]
    return counter


# ---------------------------------------------------------------------------------------------------------------------
# fvcore's counter


def _by_trace(adapter: _TensorsOnly) -> dict[str, int]:
    """Module path → MACs as fvcore reads them off a jit trace, for every module."""
    with warnings.catch_warnings():
        # fvcore scripts a few losses when imported, and tracing warns of every size that Python reads. What the model
        # itself warns of was said in the eager run before.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        adapter.traced = True
        analysis = FlopCountAnalysis(adapter, adapter.inputs())
        # Cleared first, because a default handle outranks a request to ignore its operator.
        analysis.clear_op_handles().set_op_handle(**TRACE_HANDLES)
        analysis.set_op_handle(**{f"aten::{op}{end}": None for op in FREE_OPS.split() for end in ("", "_")})
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        try:
            # What `script_if_tracing` would compile (HF ViTDet) is traced: a compiled call hides its operators.
            with patch.object(torch.jit._trace, "script", lambda function, *_: function):
                counts = analysis.by_module()
        except CountError:
            raise
        except Exception as error:
            raise CountError(
                f"fvcore cannot trace {type(adapter.model).__name__}, so its MACs cannot be checked: "
                f"{type(error).__name__}: {_brief(error)}"
            ) from error
    if unknown := [name for name in analysis.unsupported_ops() if not is_free(name)]:
        within = (
            name for name in counts if name.startswith("model.") and {*unknown} & {*analysis.unsupported_ops(name)}
        )
        deepest = max(within, key=lambda name: name.count("."), default="model").removeprefix("model").lstrip(".")
        raise CountError(refusal(sorted(unknown), deepest))
    return {name.removeprefix("model").lstrip("."): int(count) for name, count in counts.items() if name != ""}


def _brief(error: Exception) -> str:
    """Return the first line of a message: the tracer's go on with whole weight tensors."""
    return next(iter(str(error).splitlines()), "")[:400]


def _where_they_differ(traced: Mapping[str, int], dispatched: Mapping[str, int]) -> str:
    """Name the deepest modules whose two counts differ, worst first."""
    differ = {name: count - dispatched[name] for name, count in traced.items() if dispatched.get(name, count) != count}
    leaves = [name for name in differ if name and not any(other.startswith(f"{name}.") for other in differ)]
    worst = sorted(leaves, key=lambda name: -abs(differ[name]))[:3]
    return "".join(f"; in {name} {traced[name]:,} and {dispatched[name]:,}" for name in worst)
