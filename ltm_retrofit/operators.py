"""What does an operator cost? Nothing, what a formula says, or it is refused.

A MAC is what `ltm_retrofit.macs` says it is. Both of its counters read their operators here.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from ltm_retrofit.errors import CountError

Handle = Callable[[Sequence[Any], Sequence[Any]], "Counter[str]"]

# Operators without a multiply–add, or (elementwise products, weighted sums of an interpolation) with none by the
# convention of `ltm_retrofit.macs`. Read off traces of the architectures that timm and transformers register, and off
# merging code. In-place twins are meant too. What is not listed here, is not free by rule (`is_free`) and has no handle
# below is refused: to count an unknown operator as zero is the error that both counters make by themselves.
FREE_OPS = """
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

# What torch's counter would run and count as zero. fvcore does not know these, and so refuses them.
_HEAVY_OPS = """
    _trilinear _fft_c2c _fft_c2r _fft_r2c _linalg_svd _linalg_eigh
    _linalg_eigvals _linalg_slogdet _linalg_det _linalg_solve_ex linalg_cholesky_ex linalg_eig linalg_inv_ex
    linalg_householder_product linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor_ex linalg_lu_solve
    linalg_matrix_exp linalg_pinv linalg_qr linalg_solve_triangular cholesky_inverse cholesky_solve triangular_solve
    ormqr geqrf mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell _cudnn_rnn
    _transformer_encoder_layer_fwd _native_multi_head_attention
"""


#: what torch says of operators that work number by number, or only sum up; older versions say less
_FREE_TAGS = {getattr(torch.Tag, name) for name in ("pointwise", "reduction") if hasattr(torch.Tag, name)}
#: elementwise too, by other names: products of all with all, and losses
_PRODUCTS_OF_ALL = ("outer", "ger", "kron")
_LOSSES = ("kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits")


@functools.cache
def is_free(name: str) -> bool:
    """Say whether an operator of a trace is free by rule: elementwise, a reduction, or a loss, which is both.

    Example:
        >>> is_free("aten::mse_loss"), is_free("aten::lgamma_"), is_free("aten::linalg_inv")
        (True, True, False)
    """
    space, _, plain = name.partition("::")
    plain = plain.rstrip("_")
    if space != "aten" or plain in _HEAVY_OPS.split():
        return False
    if plain in (*_PRODUCTS_OF_ALL, *_LOSSES) or "_loss" in plain:
        return True
    packet = getattr(torch.ops.aten, plain, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return any(_FREE_TAGS & {*overload.tags} for overload in overloads)


def refusal(names: Sequence[str], module: str = "") -> str:
    """Say that operators cannot be counted."""
    where = f" (in {module})" if module else ""
    return (
        f"cannot count {', '.join(names)}{where}: not known to be free of multiply-adds, and no formula for it here; "
        "a count that guesses would be wrong without saying so"
    )


# ---------------------------------------------------------------------------------------------------------------------
# For fvcore


def _shape(value: Any) -> list[int]:
    """Return the shape of a tensor in a jit trace."""
    if not value.isCompleteTensor():
        raise CountError(f"the trace does not hold the shape of {value.debugName()}")
    return list(value.type().sizes())


def _product(left: int) -> Handle:
    """Count any matrix product: each output element sums over the last dimension of input number ``left``.

    The output says how often: it has the broadcast batch, which no single input needs to have.
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
    """Count a convolution: each output element (transposed: each input element) meets one filter of its group."""

    def handle(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
        transposed = transposed_at is not None and inputs[transposed_at].toIValue()
        return Counter(conv=prod(_shape(inputs[0] if transposed else outputs[0])) * prod(_shape(inputs[1])[1:]))

    return handle


def _attention(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Count scores and weighted values, ``Nq·Nk·(dq + dv)`` for each head.

    The output has the heads of the query even where several of them share a key (``enable_gqa``), and its batch is
    the broadcast one. A mask spares nothing: a fused kernel that skips masked blocks is a matter of time, not of MACs.
    """
    *batch, tokens, width = _shape(outputs[0])
    return Counter(attention=prod(batch) * tokens * _shape(inputs[1])[-2] * (_shape(inputs[0])[-1] + width))


def _einsum(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """Count a contraction of two operands; fvcore's own goes through a printed float and is off for large ones.

    torch sums a label that only one operand has before it multiplies. A product without a common summed label is
    elementwise, and so free.
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


_ATTENTIONS = """
    scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable
"""
_FORMULAS: dict[str, Handle] = {
    "linear matmul mm bmm mv dot vdot inner": _product(0),
    "cdist pdist": _product(0),  # of each pair the sum over a power of differences, or what products make of it
    "addmm addmm_ addmv addmv_ baddbmm baddbmm_": _product(1),
    "addbmm addbmm_": _addbmm,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "_convolution convolution": _convolution(6),
    "_convolution_mode": _convolution(None),
    _ATTENTIONS: _attention,
}
#: by the name that an operator has in a trace
TRACE_HANDLES = {f"aten::{name}": handle for names, handle in _FORMULAS.items() for name in names.split()}


# ---------------------------------------------------------------------------------------------------------------------
# For torch's counter


@functools.cache  # each count asks for it, and looking the operators up takes longer than many a count
def dispatch_handles() -> Mapping[Any, Callable[..., int]]:
    """Return the handlers that `FlopCounterMode` lacks. It wants 2 for each multiply–add."""

    def attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object) -> int:
        return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])

    formulas: dict[str, Callable[..., int]] = {  # of the shapes of the operator's arguments
        "dot vdot mv": lambda a, *_: prod(a),
        "addmv addmv_": lambda out, a, *_: prod(a),
        "addmm_ addbmm addbmm_ baddbmm_": lambda out, a, b, *_: prod(a) * b[-1],
        "_scaled_dot_product_flash_attention_for_cpu": attention,  # torch knows it from 2.15 on
        "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps": attention,
    }

    def counted(formula: Callable[..., int]) -> Callable[..., int]:
        return lambda *shapes, out_shape=None, **_: 2 * formula(*shapes)

    def nothing(*_: object, **__: object) -> int:
        return 0

    nothing._get_raw = True  # type: ignore[attr-defined]  # wants no shapes, which take longer than many an operator

    def refuse(name: str) -> Callable[..., int]:
        def handle(*_: object, **__: object) -> int:
            raise CountError(refusal([f"aten::{name}"]))

        handle._get_raw = True  # type: ignore[attr-defined]
        return handle

    def distances(*shapes: Sequence[int], out_shape: Sequence[int] = (), **_: object) -> int:
        return 2 * prod(out_shape) * shapes[0][-1]

    handles: dict[str, Callable[..., int]] = dict.fromkeys(
        ("_cdist_forward", "_euclidean_dist", "_pdist_forward"), distances
    )
    handles |= {name: counted(formula) for names, formula in formulas.items() for name in names.split()}
    # Without these torch's counter takes each of them apart, on the meta device in Python, only to find nothing.
    handles |= {name: nothing for name in FREE_OPS.split() if name not in handles}
    handles |= {name: refuse(name) for name in _HEAVY_OPS.split()}
    aten = torch.ops.aten  # not every torch has every operator
    return MappingProxyType({getattr(aten, name): handle for name, handle in handles.items() if hasattr(aten, name)})
