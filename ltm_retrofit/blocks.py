"""What a converted model itself keeps and refuses, and how to find what was changed in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.fingerprints import Fingerprint
from ltm_retrofit.interception.base import CHILD, Interceptor, Record
from ltm_retrofit.interception.flow import BlockForward
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.plan import MergePlan

__all__ = [
    "CHILD",
    "FINETUNED",
    "GRID_METHODS",
    "BlockForward",
    "Refusal",
    "Retrofit",
    "forwards_of",
    "load_state",
    "masks_of",
]

#: mark that `finetune` leaves on a model, so that no report calls fine-tuned weights the original's
FINETUNED = "ltm_finetuned"

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


class Retrofit(Record):
    """What the converted model itself keeps: the plan, and the statistics of the feature that its classifier reads.

    Registered on the model as ``ltm``; ``readout`` is None where there is no classifier or nothing to train.
    ``finetuned`` says whether the weights are still the pretrained ones; it is saved with them. ``pretrained`` are
    their fingerprints, by which an adapter knows what changed.
    """

    finetuned: Tensor

    def __init__(
        self,
        plan: MergePlan,
        readout: Statistics | None,
        *,
        finetuned: bool = False,
        pretrained: dict[str, Fingerprint] | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.readout, self.pretrained = plan, readout, pretrained or {}
        self.register_buffer("finetuned", torch.tensor(finetuned))

    def forward(self, x: Any) -> Any:
        """Hand on what comes: a model that is an `nn.Sequential` calls every child of its own, this one last."""
        return x

    def extra_repr(self) -> str:
        """Say what was planned in a printed model."""
        return f"{self.plan.config.method}, tokens {', '.join(map(str, self.plan.tokens))}"


def forwards_of(model: nn.Module) -> Iterator[Interceptor]:
    """Return the interceptors of a converted model, in depth order."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Interceptor):
            yield forward


def masks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the mask of each site that merges, by the site's name."""
    return {forward.name: forward.mask for forward in forwards_of(model) if forward.mask is not None}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that the model itself gave, strictly.

    Not by the model's own method: that of transformers' wrapper of timm models puts a prefix before keys of ours.
    """
    nn.Module.load_state_dict(model, state, strict=True)
