"""How is a model run and left as it was found?"""

from __future__ import annotations

import inspect
import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def run(model: nn.Module, example: Tensor | Mapping[str, Any]) -> Any:
    """Call the model on an example: a tensor, keyword arguments, or the one dict that it takes (NaFlexViT)."""
    if not isinstance(example, Mapping):
        return model(example)
    return model(**example) if takes_keywords(model, example) else model(dict(example))


def takes_keywords(model: nn.Module, names: Iterable[str]) -> bool:
    """Say whether these are names of arguments; otherwise a dict with them can only be the first argument."""
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.POSITIONAL_ONLY]
    named = [p.name for p in parameters]
    return (
        any(p.kind is p.VAR_KEYWORD for p in parameters)
        or named[:1] == []
        or named[0] in names
        or set(names) <= set(named)
    )


def remembered(model: nn.Module) -> Callable[[], None]:
    """Note all that hangs on a model: attributes, children, parameters, hooks, not values.

    Returns:
        a function that puts all of it back.
    """
    # Two levels: the dict of each module, and the dicts and lists in it (children, hooks, caches), which a module
    # changes in place.
    states = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]
    containers = [(value, copy(value)) for _, saved in states for value in saved.values() if type(value) in _CONTAINERS]

    def put_back() -> None:
        for now, saved in states:
            for name in now.keys() - saved.keys():
                del now[name]
            now.update(saved)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)

    return put_back


def copied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """Return a deep copy, also of a model whose modules hold tensors that were computed under gradients.

    `torch.nn.utils.prune` and the older ``weight_norm`` make a weight of other ones before each call, and keep it as a
    plain attribute. torch copies no such tensor; the copy holds its values, until its own first call.

    Args:
        model: the model.
        memo: as that of `copy.deepcopy`: id of an object → what stands for it in the copy.
    """
    held = [value for module in model.modules() for value in module.__dict__.values() if isinstance(value, Tensor)]
    made = {id(value): value.detach().clone() for value in held if not value.is_leaf}
    return deepcopy(model, {**made, **(memo or {})})


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without short cuts, and put back what that changes: the model and the random state.

    A forward pass in eval mode writes more than one would think: caches of attention biases (LeViT, TinyViT), hooks by
    which transformers records hidden states. fvcore leaves its own hooks behind when a trace fails. So all that hangs
    on a module is noted, not a list of known culprits.
    """
    put_back = remembered(model)
    # Parameters need no copy: no forward pass writes into them.
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    for module in model.modules():
        if module._compiled_call_impl is not None:
            module._compiled_call_impl = None  # module.compile()
        module.training = False  # not .eval(): some models override .train(), and not all of them for the better
    try:
        with random_numbers_kept(model), slow_path():
            yield
    finally:
        put_back()
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)


@contextmanager
def random_numbers_kept(model: nn.Module) -> Iterator[None]:
    """Put the random state back, on the CPU and where the model lives; Python's and NumPy's as well."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    kind = accelerators[0].type if accelerators else "cuda"
    try:
        with torch.random.fork_rng(devices=[device.index or 0 for device in accelerators], device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the precision of the weights, whoever asks for another one.

    Around the call, as ``with torch.autocast(…):`` does, or within it, as the forward does that ``accelerator.prepare``
    puts in a model's place: meanwhile autocast begins for nobody. Rounding to three digits is as large as what proofs
    look for.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu", *([] if accelerator is None else [accelerator.type])]
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(patch.object(torch.autocast, "__enter__", lambda self: self))
        stack.enter_context(patch.object(torch.autocast, "__exit__", lambda *_: None))
        yield


@contextmanager
def slow_path() -> Iterator[None]:
    """Switch off two short cuts while counting.

    The fast path of `nn.MultiheadAttention` is one opaque operator that hides its products from both counters. A weight
    that autocast has cast in one pass and kept is a constant in the next, which a trace refuses.
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
