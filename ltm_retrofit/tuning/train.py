"""finetune(): a short fine-tune with the information-bottleneck bound, through Accelerate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

from ltm_retrofit.converted.record import FINETUNED, is_retrofitted, load_state
from ltm_retrofit.errors import CheckpointError, DataError, TrainingError
from ltm_retrofit.finding.example import home
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.tuning import checkpoints
from ltm_retrofit.tuning.classes import check_data, count_classes, new_classifier
from ltm_retrofit.tuning.data import Data, Passes, check_kind, has_labels, is_stream, is_table, make_loader
from ltm_retrofit.tuning.loop import History, Run
from ltm_retrofit.tuning.parameters import checkpointed, choose, low_rank
from ltm_retrofit.tuning.processes import is_main, own_accelerator, with_memory_for
from ltm_retrofit.tuning.settings import TrainConfig
from ltm_retrofit.tuning.validation import Validation, held_out


def finetune(
    model: nn.Module,
    train: Data,
    val: Data | None = None,
    *,
    config: TrainConfig | None = None,
    checkpoints_to: str | Path | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> History:
    """Fine-tune a model in place, converted or not, through Accelerate; it ends no worse than it began.

    It is judged on validation images before the first step and after every epoch, and holds the best state in the end.
    That may be the one that it was given in (`History.kept` is 0): then it is as it was, bit for bit. With labels the
    best state has the highest accuracy, and the lowest loss among equals; without them, the lowest KL to the answers of
    the unconverted model.

    Where a batch of a data set does not fit into memory, the run starts over with batches of half the size, twice as
    many to a step, and warns.

    Example:
        >>> import timm, torch
        >>> import ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4,
        ...                           num_heads=3, num_classes=7)
        >>> model = ltm.retrofit(model, ltm.LTMConfig(flops=0.7))
        >>> loader = [(torch.randn(14, 3, 32, 32), torch.arange(14) % 7) for _ in range(4)]
        >>> history = ltm.finetune(model, loader, loader[:1], config=ltm.TrainConfig(epochs=2, bound="none"))
        settings  ...
        before    ... % of 14 validation images
        epoch 1/2  loss ...
        epoch 2/2  loss ...
        >>> len(history.losses), history.kept in (0, 1, 2)
        (8, True)

    Args:
        model: any classifier; the bound is left out where there is no learnable mask.
        train: a `datasets` data set with columns ``image`` and ``label``, streamed or not, or a loader of batches.
        val: likewise, not streamed, and not the images that the model is tested on. Left out, a tenth of ``train`` is
            held out (``config.held_out``), of each class its share; of a loader or a stream nothing can be, and the
            model then holds the last state.
        config: see `TrainConfig`; what it leaves open is said.
        checkpoints_to: folder for a checkpoint every ``config.checkpoint_every`` steps and after each epoch.
        resume: go on from that folder's checkpoint where it has one, with the model as it was given at first. On a CPU
            losses and weights are those of a run that was never interrupted, bit for bit. A loader of one's own is
            drawn from up to the place: its batches have to follow from torch's, NumPy's and Python's random numbers.
        say: receives a line for all that validation finds, and for the state that is kept.

    Returns:
        The history. The model keeps its device, training flags and ``requires_grad``.

    Raises:
        CheckpointError: a checkpoint that is not to be resumed, is of another run, or cannot be written.
        DataError: labels that do not fit the model's classes, columns missing, a class without images.
        TrainingError: no classifier, nothing to train; a training batch that does not fit into memory (the model is
            then as it was), or one of ``val``; a loss that is not finite (the model then holds weights of at most
            twenty steps before, which the error names).
    """
    tell = say if is_main() else (lambda line: None)
    for data, name in ((train, "train"), (val, "val")):
        check_kind(data, name)
    config = decide(model, config or TrainConfig(), train, tell)
    folder = None if checkpoints_to is None else Path(checkpoints_to)
    if resume and folder is None:
        raise CheckpointError("resume needs the folder that the checkpoints were written to: set checkpoints_to")
    with own_accelerator(config) as accelerator:
        classes = count_classes(model)
        class_of, val_class_of = _check_data(model, train, val, classes, config, accelerator.num_processes)
        validation = None if val is None else Validation(val, config.batch_size, val_class_of)
        if val is None and config.held_out and (parts := _parted(train, config)) is not None:
            tell(
                f"no validation data: {len(parts[1])} of the {len(train)} training images are held out for it, of each "
                "class its share"
            )
            # as many as may be unreadable of all, for all of these may be among the ones held out
            unreadable = min(1.0, config.unreadable / config.held_out)
            train, validation = parts[0], Validation(parts[1], config.batch_size, class_of, unreadable)
        state = None if folder is None else checkpoints.read(folder)
        if state is not None and not resume:
            raise CheckpointError(
                f"{folder} holds a checkpoint of an earlier run: go on from it with resume, or name another folder"
            )
        given = Snapshot(model)
        images = config.batch_size
        if state is not None and images % int(state["batch_images"]) == 0:  # they did not all fit into memory
            images = int(state["batch_images"])

        def train_with(images: int) -> History:
            """Make the run with so many images at once, and take it to its end."""
            loader = make_loader(model, train, replace(config, batch_size=images), shuffle=True, class_of=class_of)
            length = config.steps and config.steps * (config.accumulate * config.batch_size // images)
            passes = Passes(loader, length=length, images=images, accelerator=accelerator)
            with (
                given.handed_back(),
                checkpoints.own_random_state(config.seed + accelerator.process_index),
                low_rank(model, config),
                checkpointed(model, config.checkpointing),
            ):
                choose(model, str(config.train))
                run = Run(model, accelerator, config, classes, passes, folder, validation, tell)
                if state is not None:
                    run.load_state(state)
                history = run.go()
            if history.kept == 0:
                given.undo()
            return history

        def fewer(images: int) -> int:
            """Take back what was learned, and say how many images to try next."""
            accelerator.free_memory()  # it holds on to the optimizer of the attempt that failed
            given.undo()
            return _halved(images, train, config, accelerator.num_processes, resumed=state is not None)

        return with_memory_for(images, train_with, fewer)


def decide(model: nn.Module, config: TrainConfig, train: Data, say: Callable[[str], None]) -> TrainConfig:
    """Return the settings with all that they leave open, and say what was chosen.

    That depends on whether the model has an unconverted self that knows the classes, and on how many images there are.
    """
    known = not new_classifier(model)
    images = len(train) if is_table(train) and not is_stream(train) else None
    if isinstance(train, DataLoader) and train.batch_size and config.batch_size is None:
        config = replace(config, batch_size=train.batch_size)
        images = len(train) * train.batch_size if hasattr(train.dataset, "__len__") else None
    decided = config.decided(taught=known and is_retrofitted(model), known=known, images=images)
    now, before = decided.to_dict(), config.to_dict()
    if chosen := [f"{name} {value}" for name, value in now.items() if before[name] is None and value is not None]:
        say(f"settings  {', '.join(chosen)}: what was not asked for (docs/small_data.md)")
    return decided


def _check_data(
    model: nn.Module, train: Data, val: Data | None, classes: int, config: TrainConfig, processes: int
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Check the data; return the model's class of each of the training and of the validation data's, where they differ.

    Raises:
        DataError: see `finetune`.
    """
    if is_stream(train) and processes > 1:
        raise DataError(f"a stream cannot be shared out among {processes} processes: use a data set")
    if val is not None and is_stream(val):
        raise DataError("validation data is read anew after every epoch and cannot be a stream: load it whole")
    val_class_of = None
    if val is not None and is_table(val):
        if has_labels(val) or not config.distill:
            val_class_of = check_data(model, val, "validation", classes)
    elif isinstance(val, Iterator):
        raise DataError(
            "validation data is read anew after every epoch and cannot be an iterator: pass a loader or a list"
        )
    elif val is not None and hasattr(val, "__len__") and not len(val):
        raise DataError("the validation loader has no batch: it needs at least one")
    if is_table(train) and (has_labels(train) or not config.distill):
        return check_data(model, train, "training", classes), val_class_of
    return None, val_class_of


def _parted(train: Data, config: TrainConfig) -> tuple[Data, Data] | None:
    """Return the training data and those of it that are held out, where that can be."""
    return held_out(train, config.held_out, config.seed) if is_table(train) and not is_stream(train) else None


def _halved(images: int, train: Data, config: TrainConfig, processes: int, *, resumed: bool) -> int:
    """Return half as many images at once, and warn.

    Raises:
        TrainingError: where a run cannot be started over with so many.
    """
    if not is_table(train):
        raise TrainingError("a batch of the training loader does not fit into memory: pass one of smaller batches")
    if resumed:
        raise TrainingError(
            f"the checkpoint's run had {images} images at once, which do not fit into memory here: go on where there "
            "is as much of it, or begin anew in another folder"
        )
    if images % 2 or processes > 1:
        among = f" in {processes} processes" * (processes > 1)
        raise TrainingError(
            f"a batch of {images} images does not fit into memory, and cannot be halved{among}: lower batch_size"
        )
    half = images // 2
    together = config.batch_size * config.accumulate // half
    warnings.warn(f"out of memory: starting over with {half} images at once, {together} times a step", stacklevel=1)
    return half


class Snapshot:
    """A model as it was given: what of it is handed back after a run, and what if the run comes to nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.device = model, home(model)[0]
        self.attributes, self.forward = set(model.__dict__), model.__dict__.get("forward")
        self.flags = {module: module.training for module in model.modules()}
        self.wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self.marked = FINETUNED in model.__dict__
        self.values = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        self.statistics = [
            (module, module.memory.state(), module.target_perplexity)
            for module in model.modules()
            if isinstance(module, Statistics)
        ]

    @contextmanager
    def handed_back(self) -> Iterator[None]:
        """Put back on the way out what a run needs and nobody else: all but weights, statistics and their mark."""
        try:
            yield
        finally:
            # Accelerate wraps the forward of the model itself for mixed precision, and leaves a mark; peft does, too
            for name in set(self.model.__dict__) - self.attributes - {FINETUNED}:
                del self.model.__dict__[name]
            if self.forward is not None:
                self.model.__dict__["forward"] = self.forward
            self.model.to(self.device)
            for parameter, flag in self.wanted.items():
                parameter.requires_grad_(flag)
                parameter.grad = None
            for module, flag in self.flags.items():
                module.training = flag

    def undo(self) -> None:
        """Take back what a run has learned: weights, statistics, and the mark of a fine-tune."""
        load_state(self.model, self.values)
        if not self.marked:
            self.model.__dict__.pop(FINETUNED, None)
        for module, memory, perplexity in self.statistics:
            module.memory.set_state(memory, self.device)
            module.aim(perplexity)
