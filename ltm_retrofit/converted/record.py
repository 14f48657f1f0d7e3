"""What a converted model itself keeps and refuses, and how to find what was changed in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.fingerprints import Fingerprint
from ltm_retrofit.errors import NotRetrofitted, UnsupportedBlock
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.scopes.base import CHILD, Interceptor, Record
from ltm_retrofit.scopes.flow.forward import BlockForward
from ltm_retrofit.scopes.local.forward import LocalForward

__all__ = [
    "CHILD",
    "FINETUNED",
    "BlockForward",
    "Retrofit",
    "allow_methods",
    "forwards_of",
    "get_retrofit",
    "in_mode",
    "load_state",
    "masks_of",
    "refuse_methods",
]

#: mark that `finetune` leaves on a model, so that no report calls fine-tuned weights the original's
FINETUNED = "ltm_finetuned"

#: methods of host models that lay every block's tokens out on the full grid
GRID_METHODS = ("forward_intermediates", "get_intermediate_layers")
#: methods of host models that take blocks away, and the plan's sites with them
CUTTING_METHODS = ("prune_intermediate_layers",)


class Refusal:
    """Stands in for a host's method that a converted model cannot follow.

    Passes on what `disabled` asks for, and a call that the model's own forward made while it was proven.

    Args:
        module: the model, or a part of it with converted blocks in it.
        path: its name below the model.
        name: the method's.
    """

    def __init__(self, module: nn.Module, path: str, name: str) -> None:
        self.module, self.path, self.name = module, path, name
        self.original: Callable[..., Any] | None = module.__dict__.get(name)  # a user's own
        self.proven: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse by name.

        Raises:
            UnsupportedBlock: where tokens are merged, and the call is none of the proven ones.
        """
        called = f"{self.path}.{self.name}".lstrip(".") + f" ({type(self.module).__name__})"
        if self.name in CUTTING_METHODS:
            raise UnsupportedBlock(
                f"{called} takes blocks away, and the plan of a converted model would no longer fit it: call "
                "ltm_retrofit.restore(model) first, and convert what is left"
            )
        modes = {forward.mode for forward in forwards_of(self.module)}
        asked = [_described(args), {key: _described([value]) for key, value in kwargs.items()}]
        if modes == {"identity"}:
            self.proven.append(asked)
        if "merge" not in modes or asked in self.proven:
            return self.method(*args, **kwargs)
        raise UnsupportedBlock(
            f"{called} lays the tokens of every block out on the full grid, and a converted model has merged some "
            "(output_hidden_states of transformers' wrapper of timm models calls it, too): convert with "
            "output_tokens='full' and read the last tokens off forward_features, or call it within "
            "`with ltm_retrofit.disabled(model):`"
        )

    @property
    def method(self) -> Callable[..., Any]:
        """The host's own method."""
        if self.original is not None:
            return self.original
        method: Callable[..., Any] = getattr(type(self.module), self.name).__get__(self.module)
        return method


def _described(values: Iterable[Any]) -> list[Any]:
    """Say what was given, one tensor like another."""
    return [Tensor if isinstance(value, Tensor) else value for value in values]


def refuse_methods(model: nn.Module) -> None:
    """Refuse methods of a model, and of whatever in it holds converted blocks, that would give other results silently.

    LOCAL blocks give every token back, so that those keep their maps.
    """
    for path, module in model.named_modules():
        kinds = {type(forward) for forward in forwards_of(module)}
        refused = (*CUTTING_METHODS, *(GRID_METHODS if kinds - {LocalForward} else ()))
        for name in refused if kinds else ():
            if callable(getattr(module, name, None)):
                module.__dict__[name] = Refusal(module, path, name)


def allow_methods(model: nn.Module) -> None:
    """Undo `refuse_methods`."""
    for module in model.modules():
        for name, refusal in list(module.__dict__.items()):
            if isinstance(refusal, Refusal):
                del module.__dict__[name]
                if refusal.original is not None:
                    module.__dict__[name] = refusal.original


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


def get_retrofit(model: nn.Module) -> Retrofit:
    """Return what a converted model keeps of its conversion.

    Raises:
        NotRetrofitted: where it is not converted.
    """
    kept = model._modules.get(CHILD)
    if not isinstance(kept, Retrofit):
        raise NotRetrofitted(
            f"this {type(model).__name__} is not converted: call ltm_retrofit.retrofit(model, LTMConfig(...)) first, "
            "and pass the model itself, not a wrapper around it"
        )
    return kept


def forwards_of(model: nn.Module) -> Iterator[Interceptor]:
    """Return the interceptors of a converted model, in depth order."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Interceptor):
            yield forward


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Run every interceptor in this mode meanwhile."""
    before = [(forward, forward.mode) for forward in forwards_of(model)]
    try:
        for forward, _ in before:
            forward.mode = mode
        yield
    finally:
        for forward, old in before:
            forward.mode = old


def masks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the mask of each site that merges, by the site's name."""
    return {forward.name: forward.mask for forward in forwards_of(model) if forward.mask is not None}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that the model itself gave, strictly.

    Not by the model's own method: that of transformers' wrapper of timm models puts a prefix before keys of ours.
    """
    nn.Module.load_state_dict(model, state, strict=True)
