"""finetune(): a short fine-tune with the information-bottleneck bound, through Accelerate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.utils.data import DataLoader

from ltm_retrofit.converted.record import FINETUNED, load_state, masks_of
from ltm_retrofit.errors import CheckpointError, DataError, TrainingError
from ltm_retrofit.finding.example import home
from ltm_retrofit.merging.mask import MaskModule
from ltm_retrofit.merging.matching import SimilarityMask
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.tuning import checkpoints
from ltm_retrofit.tuning.data import Data, columns_of, is_stream, is_table
from ltm_retrofit.tuning.evaluate import check_data, count_classes
from ltm_retrofit.tuning.history import History
from ltm_retrofit.tuning.images import Order, Stream, make_loader
from ltm_retrofit.tuning.loop import Run
from ltm_retrofit.tuning.parameters import checkpointed, chosen, low_rank
from ltm_retrofit.tuning.passes import Passes
from ltm_retrofit.tuning.processes import own_accelerator
from ltm_retrofit.tuning.resuming import resume as go_on
from ltm_retrofit.tuning.settings import TrainConfig


def finetune(
    model: nn.Module,
    train: Data,
    val: Data | None = None,
    *,
    config: TrainConfig | None = None,
    checkpoints_to: str | Path | None = None,
    resume: bool = False,
) -> History:
    """Fine-tune a model in place, converted or not, through Accelerate.

    Where a batch of a data set does not fit into memory, the run starts over with batches of half the size, twice as
    many to a step, and warns.

    Args:
        model: any classifier; the bound is left out where there is no learnable mask.
        train: a `datasets` data set with columns ``image`` and ``label``, streamed or not, or a loader of batches.
        val: likewise, not streamed; its accuracy is noted after every epoch.
        config: see `TrainConfig`.
        checkpoints_to: folder for a checkpoint every ``config.checkpoint_every`` steps and after each epoch.
        resume: go on from that folder's checkpoint where it has one, with the model as it was given at first. On a CPU
            losses and weights are those of a run that was never interrupted, bit for bit.

    Returns:
        The history. The model keeps its device, training flags and ``requires_grad``.

    Raises:
        CheckpointError: a checkpoint that is not to be resumed, is of another run, or cannot be written.
        DataError: labels that do not fit the model's classes, columns missing, a class without images.
        TrainingError: no classifier, nothing to train; a training batch that does not fit into memory (the model is
            then as it was), or one of ``val``; a loss that is not finite (the model then holds weights of at most
            twenty steps before, which the error names).
    """
    config = config or TrainConfig()
    folder = None if checkpoints_to is None else Path(checkpoints_to)
    if resume and folder is None:
        raise CheckpointError("resume needs the folder that the checkpoints were written to: set checkpoints_to")
    with own_accelerator(config) as accelerator:
        classes = count_classes(model)
        places = _check_data(model, train, val, classes, config)
        if is_stream(train) and accelerator.num_processes > 1:
            raise DataError(
                f"a stream cannot be shared out among {accelerator.num_processes} processes: use a data set"
            )
        _check_annealed(model, config)
        state = None if folder is None else checkpoints.read(folder)
        if state is not None and not resume:
            raise CheckpointError(
                f"{folder} holds a checkpoint of an earlier run: go on from it with resume, or name another folder"
            )
        return _attempts(model, train, val, config, accelerator, classes, places, folder, state)


def _check_data(
    model: nn.Module, train: Data, val: Data | None, classes: int, config: TrainConfig
) -> tuple[int, ...] | None:
    """Check the data; return the model's class of each of the training data's, where they differ.

    Raises:
        DataError: see `finetune`.
    """
    if val is not None and is_stream(val):
        raise DataError("validation data is read anew after every epoch and cannot be a stream: load it whole")
    if val is not None and is_table(val):
        check_data(model, val, "validation", classes)
    elif isinstance(val, Iterator):
        raise DataError(
            "validation data is read anew after every epoch and cannot be an iterator: pass a loader or a list"
        )
    elif val is not None and hasattr(val, "__len__") and not len(val):
        raise DataError("the validation loader has no batch: it needs at least one")
    if is_table(train) and ("label" in columns_of(train) or not config.distill):
        return check_data(model, train, "training", classes)
    return None


def _attempts(
    model: nn.Module,
    train: Data,
    val: Data | None,
    config: TrainConfig,
    accelerator: Accelerator,
    classes: int,
    places: tuple[int, ...] | None,
    folder: Path | None,
    state: Mapping[str, Any] | None,
) -> History:
    """Run with as many images at once as there is memory for."""
    start = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
    statistics = [module for module in model.modules() if isinstance(module, Statistics)]
    known = [(module.memory.state(), module.target_perplexity) for module in statistics]
    size = config.batch_size
    if state is not None and config.batch_size % int(state["batch_images"]) == 0:  # it did not all fit into memory
        size = int(state["batch_images"])
    retried, marked = False, FINETUNED in model.__dict__

    def halve() -> int:
        nonlocal size, retried
        accelerator.free_memory()  # it holds on to the optimizer of the attempt that failed
        load_state(model, start)
        if not marked:
            model.__dict__.pop(FINETUNED, None)
        for module, (memory, perplexity) in zip(statistics, known, strict=True):
            module.memory.set_state(memory, home(model)[0])
            module.aim(perplexity)
        if not is_table(train):
            raise TrainingError("a batch of the training loader does not fit into memory: pass one of smaller batches")
        if state is not None and not retried:
            raise TrainingError(
                f"the checkpoint's run had {size} images at once, which do not fit into memory here: go on where there "
                "is as much of it, or begin anew in another folder"
            )
        if size % 2 or accelerator.num_processes > 1:
            raise TrainingError(
                f"a batch of {size} images does not fit into memory, and cannot be halved"
                + (f" in {accelerator.num_processes} processes" if accelerator.num_processes > 1 else "")
                + ": lower batch_size"
            )
        size, retried = size // 2, True
        together = config.batch_size * config.accumulate // size
        warnings.warn(f"out of memory: starting over with {size} images at once, {together} times a step", stacklevel=1)
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halve)  # type: ignore[untyped-decorator]
    def attempt(batch_size: int) -> History:
        loader = make_loader(
            model,
            train,
            batch_size=batch_size,
            shuffle=True,
            augment=config.augment,
            seed=config.seed,
            workers=config.workers,
            unreadable=config.unreadable,
            places=places,
        )
        if folder is not None and getattr(loader, "persistent_workers", False):
            warnings.warn(
                "the loader's persistent workers keep random numbers from epoch to epoch that no checkpoint holds: what"
                " they draw differs after a resume. Set persistent_workers=False for the same images bit for bit",
                stacklevel=2,
            )
        passes = _passes(loader, accelerator, config, batch_size)
        with ExitStack() as stack:
            stack.enter_context(checkpoints.own_random_state(config.seed + accelerator.process_index))
            stack.enter_context(low_rank(model, config))
            stack.enter_context(checkpointed(model, config.checkpointing))
            stack.enter_context(_kept_state(model, config.train))
            stack.enter_context(_gated(model, config.gate))
            accumulate = config.accumulate * config.batch_size // batch_size
            run = Run(model, accelerator, config, classes, passes, accumulate, folder)
            if state is not None and not retried:
                go_on(run, state)
            return run.go(val)

    history: History = attempt()
    return history


def _passes(loader: object, accelerator: Accelerator, config: TrainConfig, images: int) -> Passes:
    """Let the processes share a loader.

    Raises:
        DataError: where it is none that can be shared.
    """
    place: Order | Stream | None = None
    if isinstance(loader, DataLoader):
        place = next((part for part in (loader.sampler, loader.dataset) if isinstance(part, (Order, Stream))), None)
    if accelerator.num_processes > 1:
        if not isinstance(loader, DataLoader):
            raise DataError(
                f"{accelerator.num_processes} processes share a torch DataLoader or a data set among them, got "
                f"{type(loader).__name__}"
            )
        if loader.batch_size is not None and loader.batch_size % accelerator.num_processes:
            raise DataError(
                f"{accelerator.num_processes} processes share each batch, and the loader's have {loader.batch_size} "
                "images: pass one whose batch_size they divide"
            )
        sampler = loader.sampler
        whole = not isinstance(sampler, Sized) or not loader.batch_size or not len(sampler) % loader.batch_size
        if not whole and not loader.drop_last:
            warnings.warn(
                "the last batch of an epoch is short, and the processes fill it up with images of the first one: set "
                "the loader's drop_last to learn what one process would",
                stacklevel=2,
            )
        loader = accelerator.prepare_data_loader(loader)
    together = config.accumulate * config.batch_size // images
    length = None if config.steps is None else config.steps * together
    return Passes(loader, place, length=length, images=images)


def _check_annealed(model: nn.Module, config: TrainConfig) -> None:
    """Check that token counts can fall during training.

    Raises:
        TrainingError: where there is nothing to anneal, or a mask has a fixed grid.
    """
    masks = list(masks_of(model).values())
    if config.anneal and not (masks and all(isinstance(mask, SimilarityMask) for mask in masks)):
        kinds = ", ".join(sorted({type(mask).__name__ for mask in masks})) or "no mask"
        raise TrainingError(
            f"anneal lets the counts of masks by similarity fall (methods ltm and tome, no grids), and this model has "
            f"{kinds}: set it to 0"
        )


@contextmanager
def _gated(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let masks learn which tokens merge, while inside.

    Raises:
        TrainingError: where no mask could.
    """
    masks = [module for module in model.modules() if isinstance(module, MaskModule)] if wanted else []
    if wanted and not masks:
        raise TrainingError("gate is for learnable masks by similarity (method ltm, no grids), and there is none here")
    for mask in masks:
        mask.gated = True
    try:
        yield
    finally:
        for mask in masks:
            del mask.gated


@contextmanager
def _kept_state(model: nn.Module, train: str) -> Iterator[None]:
    """Choose what trains, and put training flags and ``requires_grad`` back afterwards."""
    device = home(model)[0]
    flags = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    if train != "all":
        training = chosen(model, train)
        for parameter in wanted:
            parameter.requires_grad_(parameter in training)
    attributes = set(model.__dict__)
    forward = model.__dict__.get("forward")
    try:
        yield
    finally:
        # Accelerate wraps the forward of the model itself for mixed precision, and leaves a mark
        for name in set(model.__dict__) - attributes - {FINETUNED}:
            del model.__dict__[name]
        if forward is not None:
            model.__dict__["forward"] = forward
        for module in model.modules():
            if isinstance(module, SimilarityMask):
                module.__dict__.pop("reached", None)
        model.to(device)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, flag in flags.items():
            module.training = flag
