"""Scope FLOW: a block cut between attention and MLP, with a mask in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError, UnsupportedBlock
from ltm_retrofit.finding.call import frozen, hides_or_shows, seen_by
from ltm_retrofit.merging.tokens import Carried, carried_by, carry, positions, unmerge_all
from ltm_retrofit.scopes.base import Interceptor
from ltm_retrofit.scopes.flow.site import FlowSite
from ltm_retrofit.scopes.watch import check_settings


class BlockForward(Interceptor):
    """Stands in for one block's ``forward``: front → mask or slice → back, handing on what the tokens carry.

    Args:
        block: the block it belongs to.
        site: what was found of it.
        expects: whether an earlier site has merged, so that tokens must arrive with their sizes.
        keep: token count to slice to after the attention, or None.
        last: whether this is the last block that tokens pass through.
        unmerge: whether to bring every token back at its end.
    """

    def __init__(
        self, block: nn.Module, site: FlowSite, *, expects: bool, keep: int | None, last: bool, unmerge: bool
    ) -> None:
        super().__init__(block, site.block)
        self.signature, self.halves, self.key, self.bias = site.signature, site.halves, site.key, site.bias
        self.tokens, self.prefix = site.layout.tokens, site.layout.prefix
        self.expects, self.keep, self.last, self.unmerge = expects, keep, last, unmerge
        self.settings = frozen(halves.settings for halves in site.halves.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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
        carried = carried_by(tokens)
        if carried is None:
            self._check_fresh()
            if padding is not None:  # a token that only fills up stands for none: it weighs nothing in any merge
                carried = Carried(self.valid(padding, tokens).to(tokens.dtype), (), padded=True)
        elif carried.sizes.shape[1] != tokens.shape[1]:
            raise CountError(
                f"block {self.name!r} received {tokens.shape[1]} tokens that carry {carried.sizes.shape[1]} sizes"
            )
        bias: Tensor | None = None
        if carried is not None and self.bias is not None:
            bias = carried.sizes.log()[:, None, None, :].to(tokens.dtype)
        if carried is not None and carried.steps and followers:
            at = positions(carried.steps)
            whole = carried.steps[0].assignment.whole
            followers = self.signature.gather(followers, whole, at)
        halves = self.halves[block.training, bias is not None]
        stream, inner = halves.front(block, tokens, bias, followers)
        mask = self.mask
        if mask is not None:
            sizes = None if carried is None else carried.sizes
            key = self.key.mean_map(block) if mask.wants_key else None
            padded = carried is not None and carried.padded
            stream, new_sizes, step = mask(inner, stream, sizes, key, padded=padded)
            carried = Carried(new_sizes, (*(carried.steps if carried else ()), step), padded)
        if self.keep is not None:
            stream = stream[:, : self.keep]
        out = halves.back(block, stream)
        if self.last and carried is not None:
            if self.unmerge:
                out = unmerge_all(out, carried.steps)
            carried = carried._replace(sizes=out.new_ones(out.shape[:2]))  # only the trace still looks at it
        return carry(out, carried)

    def valid(self, padding: Tensor, tokens: Tensor) -> Tensor:
        """Read off an attention mask ``(B, 1, 1 or N, N)`` which tokens are more than filling: ``(B, N)`` bool.

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
        if not torch.compiler.is_compiling():
            rows = seen if seen.shape[1] > 1 else seen.expand(-1, tokens.shape[1], -1)
            if not bool(((rows == valid[:, None, :]) | ~valid[:, :, None]).all()):
                raise UnsupportedBlock(
                    f"converted block {self.name!r} was called with a mask {tuple(padding.shape)} by which tokens see "
                    "different others: only padding, the same for all, is supported once tokens are merged"
                )
        return valid

    def _check_fresh(self) -> None:
        """Check tokens that carry nothing."""
        if self.expects:
            raise CountError(
                f"block {self.name!r} received tokens without the sizes that earlier merges gave them: something "
                "between the blocks made a new tensor (reentrant gradient checkpointing, an FSDP wrapper that copies "
                "inputs, an operation between blocks), or the block was called by itself. Use non-reentrant "
                "checkpointing (use_reentrant=False), or `with ltm_retrofit.disabled(model):`"
            )
