"""What a converted model refuses or does otherwise: methods that it cannot follow, pooling that changed, and saving."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ltm_retrofit.converted.record import forwards_of
from ltm_retrofit.errors import UnsupportedBlock
from ltm_retrofit.finding.call import Settings, settings_of
from ltm_retrofit.merging.tokens import carried_by, unmerge_all
from ltm_retrofit.scopes.base import CHILD, check_settings, unwatch, watch

#: methods of host models that lay every block's tokens out on the full grid
GRID_METHODS = ("forward_intermediates", "get_intermediate_layers")
#: methods of host models that take blocks away, and the plan's sites with them
CUTTING_METHODS = ("prune_intermediate_layers",)
#: methods of host models that write them down, and what does so for a converted one
WRITING_METHODS = {"save_pretrained": "save_as_host", "push_to_hub": "push_as_host"}
#: the room of saving stands above this one: it is looked up when one of these is called
WRITING_ROOM = "ltm_retrofit.saving.as_host"
#: what torch calls of each module to make something else of it, and why it cannot be made of a converted block
REFUSED_OF_BLOCKS = {
    # by `nn.DataParallel`, in each forward pass; the copy takes all that hangs on a block, the interceptor too
    "_replicate_for_data_parallel": (
        "nn.DataParallel copies converted block {} for another device, where it would compute with the weights of this "
        "one: use nn.parallel.DistributedDataParallel (torchrun), or one device"
    ),
    # by `torch.jit.script`, before it compiles
    "__prepare_scriptable__": (
        "torch.jit.script compiles Python's source, and that of converted block {} is not its own any more: use "
        "torch.jit.trace(model, images), torch.export.export or torch.compile"
    ),
}
#: what attributes that say how tokens are pooled have in their names
POOLING = "pool"


def guard(model: nn.Module) -> None:
    """Refuse what would give other results silently.

    Methods of a model, and of whatever in it holds converted blocks, that want tokens which are merged; where a scope
    gives every token back, they keep theirs.
    """
    for path, module in model.named_modules():
        shorten = [forward.shortens for forward in forwards_of(module)]
        refused = (*CUTTING_METHODS, *(GRID_METHODS if any(shorten) else ()))
        for name in refused if shorten else ():
            if callable(getattr(module, name, None)):
                module.__dict__[name] = Refusal(module, path, name)
        for name in WRITING_METHODS if shorten else ():
            if name not in module.__dict__ and callable(getattr(type(module), name, None)):
                module.__dict__[name] = Writing(module, path, name)
    for forward in forwards_of(model):
        for name, why in REFUSED_OF_BLOCKS.items():
            forward.block.__dict__[name] = Refusing(forward.name, why)
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        model.__dict__.setdefault("load_state_dict", Loading(model))
    watch_pooling(model)
    bring_back(model)


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    for module in model.modules():
        unwatch(module, PoolingWatch)
        for number in [number for number, kept in module._forward_hooks.items() if isinstance(kept, BringingBack)]:
            del module._forward_hooks[number]
        for name, refusal in list(module.__dict__.items()):
            if isinstance(refusal, Refusal):
                del module.__dict__[name]
                if refusal.original is not None:
                    module.__dict__[name] = refusal.original
            elif isinstance(refusal, Writing | Loading | Refusing):
                del module.__dict__[name]


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


class Writing:
    """Stands in for a host's method that writes the model down: what it writes is the converted model.

    transformers' own would write the host under its own name, with masks that no class of transformers reads: loaded
    again it would run unmerged, without a word. So would a part of a converted model, which has no plan of its own.

    Args:
        module: the model, or a part of it with converted blocks in it.
        path: the part's name below the model; empty for the model.
        name: the method's.
    """

    def __init__(self, module: nn.Module, path: str, name: str) -> None:
        self.module, self.path, self.name = module, path, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write the converted model, with the arguments of the host's method.

        Raises:
            UnsupportedBlock: where it is a part that is asked for.
        """
        if self.path:
            raise UnsupportedBlock(
                f"{self.path} ({type(self.module).__name__}) is a part of a converted model, and cannot be loaded "
                "without the whole: save the model itself, or call ltm_retrofit.restore(model) first"
            )
        return getattr(import_module(WRITING_ROOM), WRITING_METHODS[self.name])(self.module, *args, **kwargs)


class Refusing:
    """Stands in for a method of a block that torch calls to make something else of it: refuses by name.

    Args:
        name: the site that the block belongs to.
        why: said of it, with what to do instead; ``{}`` stands for the name.
    """

    def __init__(self, name: str, why: str) -> None:
        self.name, self.why = name, why

    def __call__(self) -> nn.Module:
        """Refuse.

        Raises:
            UnsupportedBlock: always.
        """
        raise UnsupportedBlock(self.why.format(repr(self.name)))


class Loading:
    """Stands in for a ``load_state_dict`` of a host's own: the record's entries are loaded past it.

    That of transformers' wrapper of timm models, by which Trainer reads its checkpoints, puts a prefix before them.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as `nn.Module.load_state_dict` does.

        Raises:
            RuntimeError: where keys are missing or unexpected, and it is to be strict.
        """
        top = f"{CHILD}."
        ours = {key.removeprefix(top): value for key, value in state_dict.items() if key.startswith(top)}
        theirs = {key: value for key, value in state_dict.items() if not key.startswith(top)}
        record = self.module._modules[CHILD].load_state_dict(ours, strict=False, assign=assign)  # type: ignore[union-attr]
        found = type(self.module).load_state_dict(self.module, theirs, strict=False, assign=assign)
        missing = [key for key in found.missing_keys if not key.startswith(top)] + [
            top + k for k in record.missing_keys
        ]
        unexpected = [*found.unexpected_keys, *(top + key for key in record.unexpected_keys)]
        if strict and (missing or unexpected):
            raise RuntimeError(f"{type(self.module).__name__}: missing keys {missing}, unexpected keys {unexpected}")
        return found._replace(missing_keys=missing, unexpected_keys=unexpected)


class BringingBack:
    """A forward hook of a module around all blocks: the states of inner blocks that it puts out get every token back.

    transformers collects what each layer puts out (``output_hidden_states``), and others read one of those: LLaVA the
    last but one of its tower. Merged tokens carry where each original one went.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the output with states as long as the host's."""
        return _whole(output)


def _whole(value: Any) -> Any:
    """Bring back what tensors in nested mappings, tuples and lists carry; what carries nothing stays the same."""
    if isinstance(value, Tensor):
        carried = carried_by(value)
        return value if carried is None else unmerge_all(value, carried.merges)
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if (whole := _whole(entry)) is not entry:
                value[key] = whole  # type: ignore[index]  # a dict, or what transformers makes of one
        return value
    if type(value) in (tuple, list):
        every = [_whole(entry) for entry in value]
        return value if all(a is b for a, b in zip(every, value, strict=True)) else type(value)(every)
    return value


def bring_back(model: nn.Module) -> None:
    """Have inner states brought back where the plan says that all tokens are, after the last block."""
    blocks = [forward for forward in forwards_of(model) if forward.shortens]
    if not any(getattr(forward, "unmerge", False) for forward in blocks):
        return
    for module in model.modules():
        own = {forward.block for forward in forwards_of(module)} - {module}
        if own.issuperset(forward.block for forward in blocks):
            module.register_forward_hook(BringingBack())


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


def watch_pooling(model: nn.Module) -> None:
    """Have the modules around a sliced block watched for how they pool, as far as an attribute of theirs says so."""
    for name in [forward.name for forward in forwards_of(model) if forward.keep is not None]:
        parents = [name[:end] for end, letter in enumerate(f"{name}.") if letter == "."][:-1]
        for module in map(model.get_submodule, ["", *parents]):
            unwatch(module, PoolingWatch)
            if settings := tuple((name, value) for name, value in settings_of(module).items() if POOLING in name):
                watch(module, PoolingWatch(settings, name))
