"""Scope FLOW: a block cut between attention and MLP, with a mask in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError, UnsupportedBlock
from ltm_retrofit.finding.call import frozen, hides_or_shows, hooks_of, seen_by
from ltm_retrofit.merging.tokens import Carried, carried_by, carry, positions, unmerge_all
from ltm_retrofit.scopes.base import Interceptor, check_settings
from ltm_retrofit.scopes.flow.site import FlowSite


class FlowForward(Interceptor):
    """Stands in for one block's ``forward``: front half, mask or slice, back half.

    What masks leave behind travels on the tokens from block to block, so that the model holds no state.

    Args:
        block: the block it belongs to.
        site: what was found of it.
        before: the intercepted block that hands it its tokens, if there is one.
        expects: whether an earlier site has merged, so that tokens must arrive with their sizes.
        keep: token count to slice to after the attention, or None.
        last: whether this is the last block that tokens pass through.
        unmerge: whether to bring every token back at its end.
    """

    def __init__(
        self,
        block: nn.Module,
        site: FlowSite,
        before: nn.Module | None = None,
        *,
        expects: bool,
        keep: int | None,
        last: bool,
        unmerge: bool,
    ) -> None:
        super().__init__(block, site.block)
        self.before = before
        self.signature, self.halves, self.key, self.bias = site.signature, site.halves, site.key, site.bias
        self.prefix = site.layout.prefix
        self.expects, self.keep, self.last, self.unmerge = expects, keep, last, unmerge
        self.settings = frozen(halves.settings for halves in site.halves.values())

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block.

        Raises:
            CountError: where tokens arrive without the sizes that an earlier site gave them.
            UnsupportedBlock: where it is called with other arguments than in the proven call, or has other attributes.
        """
        block = self.block
        if self.mode == "original":
            return self.original(*args, **kwargs)
        check_settings(block, self.settings, self.name)
        tokens, followers, padding = self.signature.split(self.name, args, kwargs, self.bias)
        if tokens.is_nested:
            raise UnsupportedBlock(
                f"converted block {self.name!r} was called with a nested tensor, as nn.TransformerEncoder makes of a "
                "padding mask: build it with enable_nested_tensor=False, pass no mask, or call the model within "
                "`with ltm_retrofit.disabled(model):`"
            )
        if self.mode == "identity":
            halves = self.halves[block.training, padding is not None]
            return halves.back(block, halves.front(block, tokens, padding, followers)[0])

        carried = self.arriving(tokens, padding)
        bias: Tensor | None = None
        if carried is not None and self.bias is not None:
            # a token that stands for s is attended to as often as s tokens: exp(q·k + log s) = s exp(q·k)
            bias = carried.sizes.log()[:, None, None, :].to(tokens.dtype)
        if carried is not None and carried.merges and followers:
            whole = carried.merges[0].assignment.whole
            followers = self.signature.gather(followers, whole, positions(carried.merges))
        halves = self.halves[block.training, bias is not None]
        stream, inner = halves.front(block, tokens, bias, followers)
        stream, carried = self.merge(stream, inner, carried)
        if self.keep is not None:
            stream = stream[:, : self.keep]
        out = halves.back(block, stream)
        if not self.last:
            return carry(out, carried)
        return unmerge_all(out, carried.merges) if self.unmerge and carried is not None else out

    def arriving(self, tokens: Tensor, padding: Tensor | None) -> Carried | None:
        """Return what tokens ``(B, N, D)`` bring with them; None before anything was merged."""
        carried = carried_by(tokens)
        if carried is None:
            if self.expects:
                hooks = [*(hooks_of(self.before) if self.before is not None else ()), *hooks_of(self.block)]
                named = "".join(f"{hook} on it or on the block before it, " for hook in dict.fromkeys(hooks))
                raise CountError(
                    f"block {self.name!r} received tokens without the sizes that earlier merges gave them: something "
                    f"between the blocks made a new tensor ({named}reentrant gradient checkpointing, an FSDP wrapper "
                    "that copies inputs, an operation between blocks), or the block was called by itself. Take hooks "
                    "off or convert with scope='LOCAL', use non-reentrant checkpointing (use_reentrant=False), or "
                    "`with ltm_retrofit.disabled(model):`"
                )
            if padding is None:
                return None
            # padding stands for no token: with size zero it weighs nothing in any merge
            return Carried(self.valid(padding, tokens).to(tokens.dtype), (), padded=True)
        if carried.sizes.shape[1] != tokens.shape[1]:
            raise CountError(
                f"block {self.name!r} received {tokens.shape[1]} tokens that carry {carried.sizes.shape[1]} sizes"
            )
        return carried

    def merge(self, stream: Tensor, inner: Tensor, carried: Carried | None) -> tuple[Tensor, Carried | None]:
        """Merge ``(B, N, D)`` tokens behind the attention, which read ``inner``; where there is no mask, hand on."""
        mask = self.mask
        if mask is None:
            return stream, carried
        sizes, merges, padded = (None, (), False) if carried is None else carried
        # the published baseline compares by the keys that the block has now, also while it trains
        key = self.key.mean_map(self.block) if getattr(mask, "wants_key", False) else None
        stream, sizes, merge = mask(inner, stream, sizes, key, padded=padded)
        self.tell(merge)
        return stream, Carried(sizes, (*merges, merge), padded)

    def valid(self, padding: Tensor, tokens: Tensor) -> Tensor:
        """Read off an attention mask ``(B, 1, 1 or N, N)`` which tokens are no padding: ``(B, N)`` bool.

        Raises:
            UnsupportedBlock: where valid tokens see different others, which merged tokens could not.
        """
        unread = torch.compiler.is_compiling() or not padding.is_floating_point()
        if padding.ndim != 4 or not (unread or hides_or_shows(padding)):
            raise UnsupportedBlock(
                f"converted block {self.name!r} was called with {self.bias} {tuple(padding.shape)} that is no mask of "
                "zeros and large negative numbers: merged tokens have no bias of their own"
            )
        seen = seen_by(padding).expand(tokens.shape[0], -1, -1, -1).any(dim=1)
        valid = seen.any(dim=1)
        if not torch.compiler.is_compiling():  # no value may be read there
            views = seen if seen.shape[1] > 1 else seen.expand(-1, tokens.shape[1], -1)
            if not bool(((views == valid[:, None, :]) | ~valid[:, :, None]).all()):
                raise UnsupportedBlock(
                    f"converted block {self.name!r} was called with a mask {tuple(padding.shape)} by which tokens see "
                    "different others: only padding, the same for all, is supported once tokens are merged"
                )
        return valid
