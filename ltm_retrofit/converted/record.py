"""What a converted model keeps of its conversion, how its interceptors run, and who is converted."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import NotRetrofitted
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.merging.tokens import Mask
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.scopes.base import CHILD, Interceptor, Record

#: mark that `finetune` leaves on a model, so that no report calls fine-tuned weights the original's
FINETUNED = "ltm_finetuned"

#: where a model came from that was loaded from a folder of ours: the folder, and the hash of its weights
LOADED = "ltm_loaded_from"

#: shape, dtype and a checksum of an entry of a state dict
Fingerprint = tuple[tuple[int, ...], str, int]


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
        # a number, not a boolean: `torch.optim.swa_utils.AveragedModel` takes the mean of all buffers
        self.register_buffer("finetuned", torch.tensor(float(finetuned)))

    def forward(self, x: Any) -> Any:
        """Hand on what comes: a model that is an `nn.Sequential` calls every child of its own, this one last."""
        return x

    def extra_repr(self) -> str:
        """Say what was planned in a printed model."""
        return f"{self.plan.config.method}, tokens {', '.join(map(str, self.plan.tokens))}"


# ------------------------------------------------------------------------------------------------- who is converted


def unwrapped(model: nn.Module) -> nn.Module:
    """Return what lies in wrappers that hand calls on as they are: `torch.compile`, data parallel ones, and PEFT's.

    What is converted is the model in them. So it stays converted when it is taken out.
    """
    while True:
        library, kind = type(model).__module__.partition(".")[0], type(model).__name__
        inner = None
        if kind in ("OptimizedModule", "DistributedDataParallel", "DataParallel") and library == "torch":
            inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        elif library == "peft" and hasattr(model, "get_base_model"):
            adds_tokens = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
            inner = None if adds_tokens else model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def converted_part(model: nn.Module) -> nn.Module:
    """Return the converted model: this one, or the one that lies in it where it is a wrapper.

    Raises:
        NotRetrofitted: where there is none, or several, or where it is this one that lies in a converted one.
    """
    if _holds(model):
        return model
    holders = list(filter(_holds, model.modules()))
    if len(holders) == 1:
        return holders[0]
    kind = type(model).__name__
    if holders:
        names = [name or "itself" for name, module in model.named_modules() if module in holders]
        raise NotRetrofitted(f"several parts of this {kind} are converted, {', '.join(names)}: pass one of them")
    if next(forwards_of(model), None) is not None:
        raise NotRetrofitted(
            f"this {kind} is a part of a converted model, and the plan belongs to the whole: pass the model that "
            "retrofit was given. Where that is gone, ltm_retrofit.restore(part) takes the conversion away; then "
            "convert the part itself"
        )
    raise NotRetrofitted(
        f"this {kind} is not converted, nor is anything in it: call ltm_retrofit.retrofit(model, LTMConfig(...)) first"
    )


def _holds(module: nn.Module) -> bool:
    """Say whether a module has a record, and blocks that it is of: as a part, they may have been restored since."""
    record = module._modules.get(CHILD)
    return isinstance(record, Retrofit) and any(f.conversion == record.conversion for f in forwards_of(module))


def get_retrofit(model: nn.Module) -> Retrofit:
    """Return what a converted model keeps of its conversion.

    Raises:
        NotRetrofitted: where it is not converted.
    """
    record = converted_part(model)._modules[CHILD]
    assert isinstance(record, Retrofit)
    return record


def is_retrofitted(model: nn.Module) -> bool:
    """Say whether a model, or the one model in a wrapper, is converted.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> ltm.is_retrofitted(model), ltm.is_retrofitted(ltm.retrofit(model))
        (False, True)
    """
    try:
        converted_part(model)
    except NotRetrofitted:
        return False
    return True


def get_plan(model: nn.Module) -> MergePlan:
    """Return the plan of a converted model.

    Raises:
        NotRetrofitted: where it is not converted.

    Example:
        >>> import timm, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> ltm.get_plan(ltm.retrofit(model, ltm.LTMConfig(tokens=(12, 9)))).tokens
        (12, 9, 1)
    """
    return get_retrofit(model).plan


def was_finetuned(model: nn.Module) -> bool:
    """Say whether `finetune` has trained a model's weights, before or after its conversion."""
    if is_retrofitted(model):
        return bool(get_retrofit(model).finetuned)
    return bool(model.__dict__.get(FINETUNED, False))


def mark_finetuned(model: nn.Module) -> None:
    """Note that a model's weights are no longer the pretrained ones."""
    if is_retrofitted(model):
        get_retrofit(model).finetuned.fill_(True)
    else:
        model.__dict__[FINETUNED] = True


# ------------------------------------------------------------------------------------------------ what runs in it


def forwards_of(model: nn.Module) -> Iterator[Interceptor]:
    """Return the interceptors of a converted model, in depth order."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Interceptor):
            yield forward


def masks_of(model: nn.Module) -> dict[str, Any]:
    """Return the mask of each site that merges, by the site's name."""
    return {forward.name: forward.mask for forward in forwards_of(model) if forward.mask is not None}


def hosts_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the masks by the modules on which they are registered, as `install` takes them."""
    return {forward.host: forward.mask for forward in forwards_of(model) if forward.mask is not None}


def learns(mask: nn.Module) -> bool:
    """Say whether a module is a mask that training teaches: one with parameters, or with statistics for the bound."""
    return has_step(mask) or (isinstance(mask, Mask) and next(mask.parameters(), None) is not None)


def has_step(mask: nn.Module) -> bool:
    """Say whether a module is a mask with the IB step: one with statistics of its own."""
    return isinstance(getattr(mask, "statistics", None), Statistics)


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


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the original path meanwhile, for teachers and comparisons.

    Raises:
        NotRetrofitted: where the model is not converted.

    Example:
        >>> import timm, torch, ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> images = torch.randn(2, 3, 32, 32)
        >>> before = model.eval()(images)
        >>> with ltm.disabled(ltm.retrofit(model)):
        ...     torch.equal(model(images), before)
        True
    """
    get_plan(model)
    with in_mode(model, "original"):
        yield model


# --------------------------------------------------------------------------------------------- what it is made of


#: bytes at whose multiples torch puts what it allocates itself
ALIGNED = 64


def align(model: nn.Module) -> Callable[[], None]:
    """Move weights that lie at odd addresses to even ones, in place; the numbers and the parameters stay the same.

    transformers maps weights straight from a file, wherever in it they lie. Products of them come out a rounding apart
    from those of the same weights anywhere else, and no file could bring such a model back to the bit.

    Returns:
        a function that puts them back.
    """
    moved = []
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta and tensor.data_ptr() % ALIGNED:
            moved.append((tensor, tensor.data))
            tensor.data = tensor.data.clone()

    def put_back() -> None:
        for tensor, values in moved:
            tensor.data = values

    return put_back


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that the model itself gave, strictly.

    Not by the model's own method: that of transformers' wrapper of timm models puts a prefix before keys of ours.
    """
    nn.Module.load_state_dict(model, state, strict=True)


def fingerprint(value: Tensor) -> Fingerprint:
    """Return shape, dtype and a checksum of the bytes in their order.

    (An exclusive or of the numbers would not do: a first step of Adam moves weights of one by the same amount up or
    down, and an even number of each is nothing again.)
    """
    return tuple(value.shape), str(value.dtype), 0 if value.is_meta else zlib.crc32(bytes_of(value))


def bytes_of(value: Tensor) -> memoryview:
    """Return what a tensor is stored as, on the CPU."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def fingerprints_of(model: nn.Module) -> dict[str, Fingerprint]:
    """Return the fingerprint of every entry of a state dict."""
    return {key: fingerprint(value) for key, value in model.state_dict().items()}
