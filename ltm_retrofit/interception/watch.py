"""Scope LOCAL sees no mask where it merges, so what the attention before it is called with is looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.graph.padding import hides, hides_nothing, masks_given, names_of
from ltm_retrofit.graph.sites import LocalSite
from ltm_retrofit.interception.base import Interceptor


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
        self.name, self.masked, self.forward, self.names = site.attention, site.masked, forward, names_of(attention)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call.

        Raises:
            UnsupportedBlock: where a mask hides tokens that none hid in the example.
        """
        if self.forward.mode != "merge":
            return
        for value in args:
            if isinstance(value, Tensor) and value.is_nested:
                raise UnsupportedBlock(self._refusal("a nested tensor (nn.TransformerEncoder makes one of a mask)"))
        for name, mask in masks_given(self.names, args, kwargs):
            if name in self.masked or mask.is_meta:
                continue
            if torch.compiler.is_compiling():  # no value may be read: the graph checks it when it runs
                torch._assert_async(hides_nothing(mask), self._refusal(f"a mask ({name}) that hides tokens"))
            elif hides(mask):
                raise UnsupportedBlock(self._refusal(f"{name}={tuple(mask.shape)}, a mask that hides tokens"))

    def _refusal(self, given: str) -> str:
        return (
            f"attention {self.name!r} was called with {given}; {self.forward.name!r} behind it merges tokens in scope "
            "LOCAL, where those that only fill up would be merged with the rest: pass images without padding, convert "
            "in scope FLOW, or call the model within `with ltm_retrofit.disabled(model):`"
        )


def watch(attention: nn.Module, watching: MaskWatch) -> None:
    """Have an attention watched, once."""
    unwatch(attention)
    attention.register_forward_pre_hook(watching, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Take away what `watch` put in place."""
    for number in [number for number, kept in module._forward_pre_hooks.items() if isinstance(kept, MaskWatch)]:
        del module._forward_pre_hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)
