"""What is looked at while a converted model runs: masks where nothing else sees them, and what was frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.call import Settings, changed_setting
from ltm_retrofit.scopes.base import Interceptor
from ltm_retrofit.scopes.local.site import LocalSite, names_of, side_tensors


class MaskWatch:
    """A forward pre-hook of an attention: refuses masks by which tokens fill up, which an MLP would merge with others.

    That there is a hook also keeps `nn.TransformerEncoderLayer` from its fused inference path, which calls none of its
    children, so that nothing would be merged.

    Args:
        attention: the module.
        site: what was found behind it.
        forward: the interceptor that merges there; its mode says whether it does.
    """

    def __init__(self, attention: nn.Module, site: LocalSite, forward: Interceptor) -> None:
        self.name, self.forward, self.names = site.attention, forward, names_of(attention)
        self.free, self.fixed = site.side_inputs.free, dict(site.side_inputs.fixed)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call.

        Raises:
            UnsupportedBlock: where it holds a tensor by which tokens may fill up: one that the example's had not, or
                not with that value.
        """
        if self.forward.mode != "merge":
            return
        for value in args:
            if isinstance(value, Tensor) and value.is_nested:
                raise UnsupportedBlock(self._refusal("a nested tensor (nn.TransformerEncoder makes one of a mask)"))
        for path, value in side_tensors(self.names, args, kwargs):
            expected = self.fixed.get(path)
            if path in self.free or value.is_meta or (expected is None and value.ndim == 0):  # a size, while traced
                continue
            said = f"{path}={tuple(value.shape)}, which may hide tokens"
            if expected is None and value.ndim < 2:
                raise UnsupportedBlock(self._refusal(said))
            same = (value == (value.flatten()[:1] if expected is None else expected)).all()
            if torch.compiler.is_compiling():  # no value may be read: the graph checks it when it runs
                torch._assert_async(same, self._refusal(said))
            elif not bool(same):
                raise UnsupportedBlock(self._refusal(said))

    def _refusal(self, given: str) -> str:
        return (
            f"attention {self.name!r} was called with {given}; {self.forward.name!r} behind it merges tokens in scope "
            "LOCAL, where those that only fill up would be merged with the rest: pass images without padding, convert "
            "in scope FLOW, or call the model within `with ltm_retrofit.disabled(model):`"
        )


class PoolingWatch:
    """A forward pre-hook of a module around the block that slices: refuses where it pools tokens otherwise now.

    Args:
        settings: what it says of its pooling.
        block: the name of the block.
    """

    def __init__(self, settings: Settings, block: str) -> None:
        self.settings, self.block = settings, block

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare."""
        check_settings(module, self.settings, self.block)


def check_settings(module: nn.Module, settings: Settings, block: str) -> None:
    """Check that the attributes that a block was cut with, or sliced for, are those of now.

    Raises:
        UnsupportedBlock: where one differs.
    """
    if (changed := changed_setting(module, settings)) is not None:
        name, old, new = changed
        raise UnsupportedBlock(
            f"{name!r} of a {type(module).__name__} was {old!r} when block {block!r} was converted and is {new!r} now, "
            "which the conversion would not follow: set it back, or call ltm_retrofit.restore(model), set it, and "
            "retrofit again"
        )


def watch(module: nn.Module, watching: MaskWatch | PoolingWatch) -> None:
    """Have a module watched, once in each way."""
    unwatch(module, type(watching))
    module.register_forward_pre_hook(watching, with_kwargs=True)


def unwatch(module: nn.Module, kind: type[MaskWatch] | type[PoolingWatch] = MaskWatch) -> None:
    """Take such hooks of ours away."""
    for number in [number for number, kept in module._forward_pre_hooks.items() if isinstance(kept, kind)]:
        del module._forward_pre_hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)
