"""Attention as it shows in a stream of function calls: fused, softmax of a product, packed, kernelised or additive.

No names of classes: only what flows into what. Five shapes are told apart:

- *fused*: ``F.scaled_dot_product_attention``, whose second argument is the keys;
- *packed*: the one function of `nn.MultiheadAttention`, which projects inside;
- *softmax*: a product ``q kᵀ`` goes, scaled and masked, through a softmax, and the weights into a second product;
- *linear* (kernelised): ``φ(q) (φ(k)ᵀ v)``, a product of what the image says with another such product;
- *additive*: what the image says times a sum over such products.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ltm_retrofit.finding.call import seen_by
from ltm_retrofit.finding.example import tensors_of

PRODUCTS = ("matmul", "bmm", "__matmul__", "einsum", "baddbmm")
TIMES = ("mul", "__mul__", "multiply", "mul_")
SUMS = ("sum", "mean")
PASSIVE = ("__get__", "size", "dim", "stride", "is_floating_point", "numel", "__len__", "ndimension")
SHAPED = (
    "expand expand_as repeat repeat_interleave unsqueeze squeeze view view_as reshape contiguous transpose permute "
    "flatten unflatten to type_as broadcast_to"
).split()
FOLDS = ("view", "reshape", "flatten", "unflatten")
JOINS = ("cat", "concat", "concatenate", "hstack")
#: what comes out of these has the values of their first argument, whatever the others hold
SHAPED_LIKE = ("type_as", "expand_as", "view_as", "reshape_as", "to")
#: and of these no values of their arguments at all
EMPTY_LIKE = (
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor"
).split()
PACKED = inspect.signature(F.multi_head_attention_forward)
#: of `F.scaled_dot_product_attention`, which is built in and has none
FUSED = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    ]
)
Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


@dataclass
class Attention:
    """One attention. ``keys (B, heads, N, d)`` where it has any; where they are made inside, the call is ``packed``."""

    kind: str  # "fused", "softmax", "packed", "linear" (kernelised) or "additive"
    keys: Tensor | None = None
    padded: bool = False  # its mask depends on an input that is no image: it may say that tokens are padding
    hides: bool = False  # and does so in the example
    packed: Mapping[str, Any] | None = None  # the arguments of `F.multi_head_attention_forward`, by name
    masked: bool = False  # whether what it hides was read off a mask, and not off its weights
    sees: Tensor | None = None  # (heads, N, keys): which keys each token sees, where tokens do not all see the same


class AttentionMode(TorchFunctionMode):
    """Recognises attention by what flows into what; calls ``found`` at each.

    Tensors are followed by identity, in weak tables: what an operation puts out is looked up when a later one takes it.

    Args:
        found: called with each attention, before its last product.
        linear: may replace the result of every linear map, to follow where keys come from.
        data: the tensors that the image is in; what depends on them is data. Without it, kernelised and additive
            attention (products of data with sums over products of data) is not looked for.
        used: called with every tensor that a function is called with.
        flags: inputs that are no images, such as which tokens are valid.
    """

    def __init__(
        self,
        found: Callable[[Attention], None],
        linear: Linear | None = None,
        data: Iterable[Tensor] = (),
        used: Callable[[Tensor], None] | None = None,
        flags: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.found, self.linear, self.used = found, linear, used
        #: token count → (constant tokens joined at the front, at the end)
        self.joined: dict[int, tuple[int, int]] = {}
        # logits q kᵀ → k, and weights softmax(q kᵀ) → k: kept apart, since only weights times something is attention
        self.keys_of_logits, self.keys_of_weights = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.data, self.flags = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        # products of data with data, and sums over such products
        self.multiplied, self.summed = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.data.update((tensor, True) for tensor in data)
        self.flags.update((tensor, True) for tensor in flags)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function; recognise attention by what flows into what."""
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        operands = tensors_of((*args, *kwargs.values()))
        factors = operands[1:] if name == "baddbmm" else operands  # whose first is only added
        product = name in PRODUCTS and len(factors) == 2
        if self.used is not None and name not in PASSIVE:
            for operand in operands:
                self.used(operand)
        if func is F.scaled_dot_product_attention:
            given = FUSED.bind_partial(*args, **kwargs).arguments
            mask, keys = given.get("attn_mask"), given["key"]
            hidden = self._padding(mask) and not bool(seen_by(mask).all())
            sees = None if mask is None else seen_by(mask)
            if given.get("is_causal"):
                sees = keys.new_ones(given["query"].shape[-2], keys.shape[-2]).tril() > 0
            self.found(Attention("fused", keys, self._padding(mask), hidden, masked=True, sees=_unlike(sees)))
        elif func is F.multi_head_attention_forward:
            packed = PACKED.bind(*args, **kwargs).arguments
            masks = [mask for mask in map(packed.get, ("key_padding_mask", "attn_mask")) if self._padding(mask)]
            hides = not all(bool(_packed_seen(mask).all()) for mask in masks)
            mask = packed.get("attn_mask")
            sees = None if mask is None else _unlike(_packed_seen(mask))
            self.found(Attention("packed", None, bool(masks), hides, packed, True, sees))
        elif product and factors[0] in self.keys_of_weights:
            keys = self.keys_of_weights[factors[0]]
            # weights know of a mask that keys know nothing of: it was added to the logits in between
            padded = factors[0] in self.flags and keys not in self.flags
            sees = _unlike(factors[0] != 0, by_head=False)
            self.found(Attention("softmax", keys, padded, padded and bool((factors[0] == 0).any()), sees=sees))
        elif product and self._all_data(factors) and sum(x in self.multiplied for x in factors) == 1:
            # values before weights, (B, d, N): kernelised by its looks, and its weights may hide tokens all the same
            turned = factors[1].transpose(-2, -1) if factors[1] in self.keys_of_weights else None
            self.found(Attention("linear", sees=None if turned is None else _unlike(turned != 0, by_head=False)))
        elif self._scales(name, operands) and sum(x in self.summed for x in operands) == 1:
            self.found(Attention("additive"))
        result = func(*args, **kwargs)
        self._taint(name, operands, result)
        if isinstance(result, Tensor):
            self._follow(name, operands, result, factors if product else None)
        if func is F.linear and self.linear is not None and isinstance(result, Tensor):
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            return self.linear(given["input"], given["weight"], given.get("bias"), result)
        return result

    def _padding(self, mask: Tensor | None) -> TypeGuard[Tensor]:
        """Say whether a mask may be one of padding: made of inputs that are no image, and not of the image."""
        return mask is not None and mask in self.flags and mask not in self.data

    def _all_data(self, operands: list[Tensor]) -> bool:
        """Say whether all of them depend on the image: a product with a weight is a projection."""
        return all(x in self.data for x in operands)

    def _scales(self, name: str, operands: list[Tensor]) -> bool:
        """Say whether data is multiplied with data, entry by entry."""
        return name in TIMES and len(operands) == 2 and self._all_data(operands)

    def _taint(self, name: str, operands: list[Tensor], result: Any) -> None:
        """Pass on what depends on the image, and what on an input that is none, from operands to results."""
        sources = operands[:1] if name in SHAPED_LIKE else [] if name in EMPTY_LIKE else operands
        for table in (self.data, self.flags):
            if any(x in table for x in sources):
                for out in tensors_of(result):
                    table[out] = True
                if name == "__setitem__":  # puts out nothing, and changes what it writes into
                    table[operands[0]] = True

    def _follow(self, name: str, operands: list[Tensor], result: Tensor, factors: list[Tensor] | None) -> None:
        """Note what role a result may play in an attention to come."""
        if factors and all(x.ndim >= 3 for x in factors):
            # any product of two activations may be logits; whether it is one shows when it comes to a softmax
            keys = factors[1] if name == "einsum" else factors[1].transpose(-2, -1)
            self.keys_of_logits[result] = keys
            if factors[1] in self.flags:
                self.flags[keys] = True
            if self._all_data(factors):
                self.multiplied[result] = True
            return
        if self._scales(name, operands):
            self.multiplied[result] = True
        if operands and operands[0] in self.multiplied:
            if name in SUMS and result.numel() < operands[0].numel():
                self.summed[result] = True
            elif result.numel() == operands[0].numel() and name not in ("linear", "conv2d"):
                self.multiplied[result] = True
        if operands and operands[0] in self.summed and name in SHAPED:
            self.summed[result] = True
        if name in JOINS and result.ndim == 3:
            self._join(operands, result)
        for source in operands:
            # talking heads mix logits by a linear map over the heads; shapes change, the number of entries does not
            talking = name in ("linear", "permute", "conv2d", "transpose") and source.ndim == result.ndim == 4
            # and heads that were counted among the images come out of them for a mask, and go back
            folded = name in FOLDS and source.shape[-2:] == result.shape[-2:]
            if source.shape == result.shape or ((talking or folded) and source.numel() == result.numel()):
                if source in self.keys_of_logits:
                    # through scaling and masking; a softmax turns logits into weights
                    table = self.keys_of_weights if name == "softmax" else self.keys_of_logits
                    table[result] = self.keys_of_logits[source]
                elif source in self.keys_of_weights:
                    self.keys_of_weights[result] = self.keys_of_weights[source]

    def _join(self, parts: list[Tensor], result: Tensor) -> None:
        """Note tokens that do not depend on the image where they are joined to those that do."""
        sizes = [part.shape[1] for part in parts if part.ndim == 3]
        constant = [part not in self.data for part in parts]
        if sum(sizes) != result.shape[1] or all(constant) or not any(constant):
            return
        front, end = constant.index(False), constant[::-1].index(False)
        self.joined[result.shape[1]] = sum(sizes[:front]), sum(sizes[len(sizes) - end :])


def _packed_seen(mask: Tensor) -> Tensor:
    """Return which tokens a mask of `nn.MultiheadAttention` lets through: where it is boolean, true is hidden."""
    return ~mask if mask.dtype == torch.bool else seen_by(mask)


def _unlike(sees: Tensor | None, by_head: bool = True) -> Tensor | None:
    """Return ``(heads, N, keys)``, which keys each token sees; None where all see, and are seen by, the same.

    None, too, where the sequences of one image differ in it: those are windows, which the next block lays otherwise.
    Or where heads do, but not ``by_head``: no mask made these zeros, they are weights too small for a number.
    """
    if sees is None or sees.is_meta or sees.ndim < 2 or bool(sees.all()):
        return None
    several = sees[None] if sees.ndim == 2 else sees.flatten(0, -4) if sees.ndim > 4 else sees
    heads = several[0] if several.ndim == 4 else several
    if several.ndim == 4 and not bool((several == heads).all()):
        return None
    if bool((heads == heads[:1]).all()):
        heads = heads[:1]
    elif not by_head:
        return None
    square = heads.shape[1] == heads.shape[2]
    alike = bool((heads == heads[:, :1]).all()) and not (square and bool((heads != heads[:, :, :1]).any()))
    return None if alike else heads
