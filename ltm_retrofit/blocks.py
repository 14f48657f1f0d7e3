"""How a block is changed: its ``forward`` is intercepted on the instance, its class and its keys stay."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError, UnsupportedBlock
from ltm_retrofit.graph.sites import AttentionSite
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import Carried, carried_by, carry, unmerge_all
from ltm_retrofit.plan import MergePlan

#: name under which masks are registered on their blocks, and the plan on the model
CHILD = "ltm"
#: mark that `finetune` leaves on a model, so that no report calls fine-tuned weights the original's
FINETUNED = "ltm_finetuned"


class BlockForward:
    """Stands in for one block's ``forward``: head → mask or slice → tail, handing on what the tokens carry.

    A plain object in the block's ``__dict__``: it pickles and deep-copies with the block and then belongs to the copy.

    Args:
        block: the block it belongs to.
        site: what was found of it.
        expects: whether an earlier site has merged, so that tokens must arrive with their sizes.
        keep: token count to slice to after the attention, or None.
        last: whether this is the last block that tokens pass through.
        unmerge: whether to bring every token back at its end.
    """

    def __init__(
        self, block: nn.Module, site: AttentionSite, *, expects: bool, keep: int | None, last: bool, unmerge: bool
    ) -> None:
        self.block, self.name = block, site.block
        self.signature, self.halves, self.key, self.bias = site.signature, site.halves, site.key, site.bias
        self.tokens, self.prefix = site.layout.tokens, site.layout.prefix
        self.expects, self.keep, self.last, self.unmerge = expects, keep, last, unmerge
        self.mode = "merge"  # or "identity" (cut, nothing merged: proof (e)) or "original"

    @property
    def __signature__(self) -> inspect.Signature:
        """The host's own, for whoever inspects ``block.forward``."""
        return inspect.signature(type(self.block).forward.__get__(self.block))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block.

        Raises:
            CountError: where tokens arrive without the sizes that an earlier site gave them, or in another number.
            UnsupportedBlock: where it is called with other arguments than in the proven call.
        """
        block = self.block
        if self.mode == "original":
            return type(block).forward(block, *args, **kwargs)
        tokens = self.signature.split(self.name, args, kwargs)
        if self.mode == "identity":
            halves = self.halves[block.training, False]
            return halves.tail(block, halves.head(block, tokens, None)[0])
        carried = carried_by(tokens)
        if carried is None:
            self._check_fresh(tokens)
        elif carried.sizes.shape[1] != tokens.shape[1]:
            raise CountError(
                f"block {self.name!r} received {tokens.shape[1]} tokens that carry {carried.sizes.shape[1]} sizes"
            )
        bias: Tensor | None = None
        if carried is not None and self.bias is not None:
            bias = carried.sizes.log()[:, None, None, :].to(tokens.dtype)
        halves = self.halves[block.training, bias is not None]
        stream, inner = halves.head(block, tokens, bias)
        mask = block._modules.get(CHILD)
        if mask is not None:
            sizes = None if carried is None else carried.sizes
            key = self.key.mean_map(block) if mask.wants_key else None
            stream, new_sizes, step = mask(inner, stream, sizes, key)
            carried = Carried(new_sizes, (*(carried.steps if carried else ()), step))
        if self.keep is not None:
            stream = stream[:, : self.keep]
        out = halves.tail(block, stream)
        if self.last and carried is not None:
            if self.unmerge:
                out = unmerge_all(out, carried.steps)
            carried = carried._replace(sizes=out.new_ones(out.shape[:2]))  # only the trace still looks at it
        return carry(out, carried)

    def _check_fresh(self, tokens: Tensor) -> None:
        """Check tokens that carry nothing."""
        if self.expects:
            raise CountError(
                f"block {self.name!r} received tokens without the sizes that earlier merges gave them: something "
                "between the blocks made a new tensor (reentrant gradient checkpointing, an FSDP wrapper that copies "
                "inputs, an operation between blocks), or the block was called by itself. Use non-reentrant "
                "checkpointing (use_reentrant=False), or `with ltm_retrofit.disabled(model):`"
            )
        if tokens.shape[1] != self.tokens:
            raise CountError(
                f"block {self.name!r} was planned for {self.tokens} tokens and received {tokens.shape[1]}: run the "
                "model at the input size it was converted for, or restore it and convert again with an example of the "
                "new size"
            )


#: methods of host models that lay every block's tokens out on the full grid
GRID_METHODS = ("forward_intermediates", "get_intermediate_layers")


class Refusal:
    """Stands in for a host's method that needs every token after every block; passes on what `disabled` asks for."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse by name.

        Raises:
            UnsupportedBlock: unless the original path is on.
        """
        if all(forward.mode == "original" for forward in forwards_of(self.model)):
            return getattr(type(self.model), self.name)(self.model, *args, **kwargs)
        raise UnsupportedBlock(
            f"{type(self.model).__name__}.{self.name} lays the tokens of every block out on the full grid, and a "
            "converted model has merged some: convert with output_tokens='full' and read the last tokens off "
            "forward_features, or call it within `with ltm_retrofit.disabled(model):`"
        )


class Retrofit(nn.Module):
    """What the converted model itself keeps: the plan, and the statistics of the feature that its classifier reads.

    Registered on the model as ``ltm``; ``readout`` is None where there is no classifier or nothing to train.
    ``finetuned`` says whether the weights are still the pretrained ones; it is saved with them.
    """

    finetuned: Tensor

    def __init__(self, plan: MergePlan, readout: Statistics | None, *, finetuned: bool = False) -> None:
        super().__init__()
        self.plan, self.readout = plan, readout
        self.register_buffer("finetuned", torch.tensor(finetuned))

    def extra_repr(self) -> str:
        """Say what was planned in a printed model."""
        return f"{self.plan.config.method}, tokens {', '.join(map(str, self.plan.tokens))}"


def forwards_of(model: nn.Module) -> Iterator[BlockForward]:
    """Return the interceptors of a converted model, in depth order."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, BlockForward):
            yield forward
