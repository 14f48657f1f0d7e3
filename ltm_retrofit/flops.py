"""How many multiply-adds does a model cost? Two independent counters answer, and they must agree to the last one.

A MAC is one multiply-add of a matrix product, a convolution or an attention product. Norms, activations, softmax,
pooling, interpolation, sorting and copying are not MACs, whatever they cost in time.

fvcore reads the operators off a jit trace, torch's `FlopCounterMode` off the dispatcher. Each is blind where the other
is not (fvcore: fused attention; torch: matrix-vector products), and both count as zero what they do not know. So the
gaps of both are filled here, an operator that nobody has vouched for is an error, and so is a disagreement.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from ltm_retrofit.errors import CountError, ExampleError

Handle = Callable[[Sequence[Any], Sequence[Any]], "Counter[str]"]

# Operators without a multiply-add, or (elementwise products, weighted sums of an interpolation) with none by the
# convention above. Read off traces of the architectures that timm and transformers register, and off merging code.
# In-place twins are meant too. What is not listed here and has no handle below is refused.
_FREE_OPS = """
    abs add addcdiv addcmul clamp clamp_max clamp_min clip cos cosh div elu erf erfc exp exp2 expm1 fmod gelu glu
    hardshrink hardsigmoid hardswish hardtanh leaky_relu lerp log log10 log1p log2 log_sigmoid logit mish mul
    nan_to_num neg pow prelu reciprocal relu relu6 remainder rrelu rsqrt rsub selu sigmoid sign silu sin sinh
    softplus softshrink softsign sqrt square sub tan tanh threshold trunc true_divide divide multiply subtract atan
    atan2 hypot angle asin acos floor ceil round frac floor_divide floordiv deg2rad xlogy logaddexp maximum minimum
    fmax fmin
    eq ne lt le gt ge greater less equal isfinite isinf isnan isin isclose allclose where bitwise_and bitwise_not
    bitwise_or bitwise_xor __and__ __or__ __xor__ __iand__ __ior__ __ixor__ __not__ __lshift__ __rshift__
    bitwise_left_shift bitwise_right_shift logical_and logical_not logical_or logical_xor
    all any amax amin aminmax argmax argmin bincount count_nonzero cummax cummin cumprod cumsum diff frobenius_norm
    histc linalg_norm linalg_vector_norm logcumsumexp logsumexp max mean median min mode nanmean nansum norm
    normalize prod quantile std std_mean sum var var_mean cosine_similarity cross_entropy_loss cross linalg_cross
    argsort kthvalue msort searchsorted bucketize sort topk unique unique_consecutive unique_dim _unique2 _unique
    gather index index_add index_copy index_fill index_put _index_put_impl_ _unsafe_index index_select masked_fill
    masked_scatter masked_select nonzero nonzero_numpy nonzero_static put scatter scatter_add scatter_reduce
    select_scatter slice_scatter diagonal_scatter take take_along_dim embedding one_hot
    _weight_norm softmax log_softmax _softmax _log_softmax layer_norm native_layer_norm batch_norm native_batch_norm
    _batch_norm_impl_index cudnn_batch_norm group_norm native_group_norm instance_norm rms_norm _fused_rms_norm
    local_response_norm
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
    upsample_linear1d upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d grid_sampler grid_sampler_2d grid_sampler_3d
    affine_grid_generator
    channel_shuffle native_channel_shuffle pixel_shuffle pixel_unshuffle im2col col2im unfold unfold_copy
    alias as_strided atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to block_diag cartesian_prod cat
    chunk clone column_stack combinations concat concatenate constant_pad_nd contiguous copy copy_ data detach diag
    diag_embed diagonal diagflat dsplit dstack expand expand_as fill flatten flip fliplr flipud hsplit hstack lift
    lift_fresh mT matrix_H meshgrid moveaxis movedim mH narrow numpy_T pad permute pin_memory positive ravel
    reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d
    replication_pad3d reshape reshape_as resolve_conj resolve_neg roll rot90 row_stack select slice split
    split_with_sizes squeeze stack swapaxes swapdims t T tensor_split tile trace transpose tril triu unbind
    unflatten unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as view_as_complex view_as_real
    real imag vsplit vstack zero _reshape_alias _unsafe_view _conj _pad_circular
    arange empty empty_like empty_strided eye full full_like linspace logspace new_empty new_empty_strided new_full
    new_ones new_zeros ones ones_like scalar_tensor tensor tril_indices triu_indices zeros zeros_like complex polar
    bernoulli dropout feature_dropout alpha_dropout native_dropout exponential multinomial normal rand rand_like
    randint randint_like randn randn_like randperm random uniform
    Bool Float FloatImplicit Int IntImplicit ScalarImplicit device dim dtype is_floating_point is_nonzero item
    _local_scalar_dense len numel size sym_size stride to to_dense type_as _to_copy _cast_Float _cast_Half
    _autocast_to_full_precision _autocast_to_reduced_precision _assert_async _shape_as_tensor _is_zerotensor warn
    format list requires_grad result_type storage_offset retain_grad output_nr is_pinned
"""

# What torch's counter would execute and count as zero. fvcore refuses these by not knowing them.
_HEAVY_OPS = """
    _cdist_forward _euclidean_dist _pdist_forward _trilinear _fft_c2c _fft_c2r _fft_r2c _linalg_svd _linalg_eigh
    _linalg_eigvals _linalg_slogdet _linalg_det _linalg_solve_ex linalg_cholesky_ex linalg_eig linalg_inv_ex
    linalg_householder_product linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor_ex linalg_lu_solve
    linalg_matrix_exp linalg_pinv linalg_qr linalg_solve_triangular cholesky_inverse cholesky_solve triangular_solve
    ormqr geqrf mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell _cudnn_rnn
    _transformer_encoder_layer_fwd _native_multi_head_attention
"""

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@dataclass(frozen=True)
class MacCount:
    """Multiply-adds of one forward pass.

    Args:
        total: of the whole model.
        by_module: module path in the model → MACs of that module and all below it; ``""`` is the whole model. A module
            that is reached under two paths stands under the first; one that is never called has 0, and what it
            computes through ``.forward()`` is its caller's.
    """

    total: int
    by_module: dict[str, int]


def count_macs(model: nn.Module, example: Tensor | Mapping[str, Any]) -> MacCount:
    """Count the multiply-adds of ``model`` on ``example``; the model is left as it was found.

    Runs the model twice in eval mode under no_grad, once for each counter.

    Args:
        model: any timm or Hugging Face model, converted or not.
        example: a tensor, or keyword arguments (tensors and plain values). The count is for this batch size.

    Raises:
        CountError: where the two counters disagree, or where an operator occurs that cannot be counted for certain.
        ExampleError: where the model does not run on the example.
    """
    # torch.compile cannot be traced; what it wraps can, and costs the same.
    model = getattr(model, "_orig_mod", model)
    adapter = _TensorsOnly(model, example)
    with undisturbed(model), torch.no_grad():
        with _random_numbers_kept(model):  # so that both see the same draws
            dispatched = _by_dispatch(adapter)
        traced = _by_trace(adapter)
    if traced[""] != dispatched[""]:
        raise CountError(
            f"two counters must agree and do not: fvcore counts {traced['']:,} MACs, "
            f"torch's FlopCounterMode {dispatched['']:,}{_where_they_differ(traced, dispatched)}; "
            "one of them misreads an operator there, so neither number is reported"
        )
    return MacCount(total=traced[""], by_module=traced)


def count_macs_quick(fn: Callable[[], object]) -> int:
    """Count the multiply-adds that calling ``fn`` costs, by torch's counter alone.

    For pieces of a model that `count_macs` has counted as a whole: an operator that nobody knows counts as zero here,
    unless it is a known heavy one, which is a `CountError`. Eval mode and no_grad are the caller's business.
    """
    with _slow_path(), _dispatch_counter({}) as counter:
        fn()
    return int(counter.get_total_flops()) // 2


# ---------------------------------------------------------------------------------------------------------------------
# Leaving the model alone


class _TensorsOnly(nn.Module):
    """The model as a function from a tuple of tensors to a tuple of tensors, which is all that a trace can take."""

    def __init__(self, model: nn.Module, example: Tensor | Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.keys: list[str] | None = None
        self.plain: dict[str, Any] = {}
        self.keeper: _KeepAlive | None = None
        if isinstance(example, Tensor):
            self.tensors: tuple[Tensor, ...] = (example,)
        elif isinstance(example, Mapping):
            self.keys = [key for key, value in example.items() if isinstance(value, Tensor)]
            self.plain = {key: value for key, value in example.items() if not isinstance(value, Tensor)}
            self.tensors = tuple(example[key] for key in self.keys)
        else:
            raise ExampleError(f"example must be a tensor or a dict of keyword arguments, got {type(example).__name__}")
        if not self.tensors:
            raise ExampleError(f"example must hold at least one tensor, got the keys {list(self.plain)}")

    def inputs(self) -> tuple[Tensor, ...]:
        """Copies, for models that write into their input."""
        return tuple(tensor.detach().clone() for tensor in self.tensors)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the model as its user would."""
        with self.keeper or nullcontext():
            if self.keys is None:
                output = self.model(*tensors)
            else:
                output = self.model(**dict(zip(self.keys, tensors, strict=True)), **self.plain)
        return (*_tensors_in(output), *(self.keeper.marks if self.keeper else ()))

    def describe(self) -> str:
        """Say what goes in, for messages."""
        names = self.keys or ["tensor"]
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip(names, self.tensors, strict=True))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of tuples, lists, dicts and dataclasses; the None entries of a `ModelOutput` fall out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors_in(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors_in(entry)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name, None))


class _KeepAlive(TorchFunctionMode):
    """Make every result matter to the output of a trace, which leaves out whatever the output does not need.

    What is computed in vain takes its time all the same, and torch's counter sees it. A scalar made with
    ``new_zeros`` depends on the result in the graph and costs neither memory nor arithmetic.
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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without short cuts, and put back what that changes: the model and the random state.

    A forward pass in eval mode writes more than one would think: attention-bias caches (LeViT, TinyViT), the hooks by
    which transformers records hidden states, and fvcore leaves its own hooks behind when a trace fails. So all that
    hangs on a module is noted, not a list of known culprits.
    """
    states = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    containers = [(value, copy(value)) for _, saved in states for value in saved.values() if type(value) in _CONTAINERS]
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    for module in model.modules():
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None  # module.compile()
        module.training = False  # not .eval(): some models override .train(), and not all of them for the better
    try:
        with _random_numbers_kept(model), _slow_path():
            yield
    finally:
        for now, saved in states:
            for name in now.keys() - saved.keys():
                del now[name]
            now.update(saved)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Put the random state back, on the CPU and where the model lives."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cuda"
    with torch.random.fork_rng(devices=[device.index or 0 for device in accelerators], device_type=kind):
        yield


@contextmanager
def _slow_path() -> Iterator[None]:
    """Switch off two short cuts while counting.

    The fast path of `nn.MultiheadAttention` is one opaque operator that hides its products from both counters, and a
    weight that autocast has cast and kept from one pass is a constant to the next, which a trace refuses.
    """
    fast, cached = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_autocast_cache_enabled(cached)


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

    That one hooks into autograd, and fails under no_grad where a parameter's view is handed to a module (the class
    token of CaiT, the latent query of SigLIP): "Expected gradient function to be set".
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
        """Called before each forward."""
        if module in self.names:
            self.parents.append(self.names[module])

    def leave(self, module: nn.Module, _: object, __: object) -> None:
        """Called after each forward."""
        if module in self.names:
            self.parents.pop()


def _dispatch_counter(names: Mapping[nn.Module, str]) -> FlopCounterMode:
    counter = FlopCounterMode(display=False, custom_mapping=_dispatch_handles())
    counter.mod_tracker = _Where(names)  # type: ignore[assignment]
    return counter


def _dispatch_handles() -> dict[Any, Callable[..., int]]:
    """What `FlopCounterMode` lacks; it wants 2 for each multiply-add."""

    def times(inner: Callable[..., int]) -> Callable[..., int]:
        return lambda *shapes, out_shape=None, **_: 2 * inner(*shapes)

    def attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object) -> int:
        return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])

    def refuse(name: str) -> Callable[..., int]:
        def handle(*_: object, **__: object) -> int:
            raise CountError(_refusal([f"aten::{name}"]))

        return handle

    aten = torch.ops.aten
    handles: dict[str, Callable[..., int]] = {
        "dot": times(lambda a, b: prod(a)),
        "vdot": times(lambda a, b: prod(a)),
        "mv": times(lambda a, b: prod(a)),
        "addmv": times(lambda out, a, b, *_: prod(a)),
        "addmv_": times(lambda out, a, b, *_: prod(a)),
        "addmm_": times(lambda out, a, b, *_: prod(a) * b[-1]),
        "addbmm": times(lambda out, a, b, *_: prod(a) * b[-1]),
        "addbmm_": times(lambda out, a, b, *_: prod(a) * b[-1]),
        "baddbmm_": times(lambda out, a, b, *_: prod(a) * b[-1]),
        "_scaled_dot_product_fused_attention_overrideable": times(attention),
        "_scaled_dot_product_attention_math_for_mps": times(attention),
    }
    handles |= {name: refuse(name) for name in _HEAVY_OPS.split()}
    # Not every torch has every operator.
    return {getattr(aten, name): handle for name, handle in handles.items() if hasattr(aten, name)}


# ---------------------------------------------------------------------------------------------------------------------
# fvcore's counter


def _by_trace(adapter: _TensorsOnly) -> dict[str, int]:
    """Module path → MACs as fvcore reads them off a jit trace, for every module."""
    with warnings.catch_warnings():
        # fvcore scripts a few losses when imported, and tracing warns of every size that Python reads: the eager run
        # before has said what the model itself has to say.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        adapter.keeper = _KeepAlive()
        analysis = FlopCountAnalysis(adapter, adapter.inputs())
        # Cleared first, because a default handle outranks a request to ignore its operator.
        analysis.clear_op_handles().set_op_handle(**_TRACE_HANDLES)
        analysis.set_op_handle(**{f"aten::{op}{end}": None for op in _FREE_OPS.split() for end in ("", "_")})
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        try:
            counts = analysis.by_module()
        except CountError:
            raise
        except Exception as error:
            raise CountError(
                f"fvcore cannot trace {type(adapter.model).__name__}, so its MACs cannot be checked: "
                f"{type(error).__name__}: {_brief(error)}"
            ) from error
    if unknown := analysis.unsupported_ops():
        within = (name for name in counts if analysis.unsupported_ops(name) and name.startswith("model."))
        deepest = max(within, key=lambda name: name.count("."), default="model").removeprefix("model").lstrip(".")
        raise CountError(_refusal(sorted(unknown), deepest))
    return {name.removeprefix("model").lstrip("."): int(count) for name, count in counts.items() if name != ""}


def _refusal(names: Sequence[str], module: str = "") -> str:
    where = f" (in {module})" if module else ""
    return (
        f"cannot count {', '.join(names)}{where}: not known to be free of multiply-adds, and no formula for it here; "
        "a count that guesses would be wrong without saying so"
    )


def _brief(error: Exception) -> str:
    """First line of a message: the tracer's go on with whole weight tensors."""
    return next(iter(str(error).splitlines()), "")[:400]


def _where_they_differ(traced: Mapping[str, int], dispatched: Mapping[str, int]) -> str:
    """Name the deepest modules whose two counts differ, worst first."""
    differ = {name: count - dispatched[name] for name, count in traced.items() if dispatched.get(name, count) != count}
    leaves = [name for name in differ if name and not any(other.startswith(f"{name}.") for other in differ)]
    worst = sorted(leaves, key=lambda name: -abs(differ[name]))[:3]
    return "".join(f"; in {name} {traced[name]:,} and {dispatched[name]:,}" for name in worst)


def _shape(value: Any) -> list[int]:
    """Shape of a tensor in a jit graph."""
    if not value.isCompleteTensor():
        raise CountError(f"the trace does not hold the shape of {value.debugName()}")
    return list(value.type().sizes())


def _product(left: int) -> Handle:
    """Any matrix product: each output element sums over the last dimension of input number ``left``.

    Taken from the output, since it holds the broadcast batch, which neither input needs to.
    """

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        return Counter(matmul=prod(_shape(outputs[0])) * _shape(inputs[left])[-1])

    return handle


def _addbmm(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    return Counter(matmul=prod(_shape(inputs[1])) * _shape(inputs[2])[-1])


def _tensordot(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    left = _shape(inputs[0])
    return Counter(matmul=prod(_shape(outputs[0])) * prod(left[dim.toIValue()] for dim in inputs[2].node().inputs()))


def _convolution(transposed_at: int | None) -> Handle:
    """Each output element (of a transposed one: each input element) meets one filter, whatever the groups."""

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        transposed = transposed_at is not None and inputs[transposed_at].toIValue()
        return Counter(conv=prod(_shape(inputs[0] if transposed else outputs[0])) * prod(_shape(inputs[1])[1:]))

    return handle


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Scores and weighted values, ``Nq·Nk·(dq + dv)`` for each head.

    The output has the heads of the query also where several of them share a key (``enable_gqa``), and its batch is
    the broadcast one. A mask spares nothing: a fused kernel that skips masked blocks is a matter of time, not of MACs.
    """
    *batch, tokens, width = _shape(outputs[0])
    return Counter(attention=prod(batch) * tokens * _shape(inputs[1])[-2] * (_shape(inputs[0])[-1] + width))


def _einsum(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """A contraction of two operands; fvcore's own goes through a printed float and is off for large ones.

    torch sums a label that only one operand has before it multiplies, and calls a product without a common summed
    label elementwise.
    """
    equation = inputs[0].toIValue().replace(" ", "")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    if len(shapes) == 1:
        return Counter()
    if len(shapes) > 2:
        raise CountError(
            f"cannot count einsum {equation!r}: the cost of {len(shapes)} operands depends on the order in which they "
            "are contracted; write it as products of two"
        )
    terms, arrow, result = equation.partition("->")
    labelled: list[dict[str, int]] = []
    for term, shape in zip(terms.split(","), shapes, strict=True):
        spread = len(shape) - len(term.replace("...", ""))
        # Digits stand for the dimensions of an ellipsis, counted from the right as broadcasting does.
        names = term.replace("...", "".join(map(str, reversed(range(spread)))))
        labelled.append({name: size for name, size in zip(names, shape, strict=True) if size != 1})
    left, right = labelled
    if not arrow:
        plain = terms.replace(",", "")
        result = "..." + "".join(name for name in plain if plain.count(name) == 1)
    if "..." in result:
        result += "".join(name for name in {*left, *right} if name.isdigit())
    summed = {name for name in {*left, *right} if name not in result}
    if not summed & left.keys() & right.keys():
        return Counter()
    alone = summed - (left.keys() & right.keys())
    return Counter(einsum=prod(size for name, size in {**left, **right}.items() if name not in alone))


_TRACE_HANDLES: dict[str, Handle] = {
    "aten::linear": _product(0),
    "aten::matmul": _product(0),
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::mv": _product(0),
    "aten::dot": _product(0),
    "aten::vdot": _product(0),
    "aten::inner": _product(0),
    "aten::addmm": _product(1),
    "aten::addmm_": _product(1),
    "aten::addmv": _product(1),
    "aten::addmv_": _product(1),
    "aten::baddbmm": _product(1),
    "aten::baddbmm_": _product(1),
    "aten::addbmm": _addbmm,
    "aten::addbmm_": _addbmm,
    "aten::tensordot": _tensordot,
    "aten::einsum": _einsum,
    "aten::_convolution": _convolution(6),
    "aten::convolution": _convolution(6),
    "aten::_convolution_mode": _convolution(None),
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_attention_math": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
}
