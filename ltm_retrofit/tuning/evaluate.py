"""Accuracy of a model, converted or not."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ltm_retrofit.converted.classifier import follow_classifier
from ltm_retrofit.converted.record import get_retrofit, is_retrofitted
from ltm_retrofit.errors import DataError, ExampleError, TrainingError
from ltm_retrofit.finding.example import home, logits_of, prepare_example, run
from ltm_retrofit.finding.recording import record
from ltm_retrofit.merging.ib import soft_targets
from ltm_retrofit.tuning.data import Data, batches_on, check_labels, is_table
from ltm_retrofit.tuning.heads import places_of
from ltm_retrofit.tuning.images import make_loader
from ltm_retrofit.undisturbed import undisturbed


@torch.no_grad()
def predictions(
    model: nn.Module, data: Data, batch_size: int = 128, accelerator: Accelerator | None = None
) -> tuple[Tensor, Tensor]:
    """Return predicted classes and labels ``(n,)``, in the data's order, in eval mode; both in the model's numbers.

    Where there is an accelerator of several processes, they share the data and all return the whole.

    Raises:
        DataError: where there is no image, or labels do not fit the model's classes.
        TrainingError: where the model puts out no logits.
    """
    guesses, truths = [], []
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        classes = count_classes(model) if is_table(data) else 0  # of a loader, what the first logits say
        places = check_data(model, data, "evaluation", classes) if is_table(data) else None
        loader = make_loader(model, data, batch_size=batch_size, shuffle=False, places=places)
        shared: Accelerator | None = None
        if accelerator is not None and accelerator.num_processes > 1 and isinstance(loader, DataLoader):
            shared, loader = accelerator, accelerator.prepare_data_loader(loader)
        for inputs, labels in tqdm(batches_on(loader, home(model)[0]), desc="evaluate", leave=False, disable=None):
            assert labels is not None
            logits = logits_of(run(model, inputs))
            classes = classes or _width(model, logits, inputs)
            if logits is None or not classes:
                raise TrainingError(f"{type(model).__name__} puts out no class logits (B, C): give it a classifier")
            seen = logits.argmax(dim=-1), soft_targets(labels, classes).argmax(dim=-1)
            if shared is not None:
                seen = shared.gather_for_metrics(seen)
            guesses.append(seen[0].cpu())
            truths.append(seen[1].cpu())
    finally:
        for module, flag in flags.items():
            module.training = flag
    if not guesses:
        raise DataError("there is no image to evaluate on")
    return torch.cat(guesses), torch.cat(truths)


def check_data(model: nn.Module, data: Data, split: str, classes: int) -> tuple[int, ...] | None:
    """Check a data set's labels against a model's classes; return the class of each of them, where they differ.

    Raises:
        DataError: columns missing, no image, labels that do not fit the model's classes, a class without images.
    """
    places = places_of(model, data, classes)
    check_labels(data, classes, split, places)
    return places


def evaluate(model: nn.Module, data: Data, batch_size: int = 128, accelerator: Accelerator | None = None) -> float:
    """Return top-1 accuracy in percent, in eval mode.

    Raises:
        DataError: where labels do not fit the model's classes, or there is no image.
        TrainingError: where the model puts out no logits.
    """
    guesses, truths = predictions(model, data, batch_size, accelerator)
    return 100 * float((guesses == truths).float().mean())


def evaluate_in_memory(model: nn.Module, data: Data, batch_size: int, accelerator: Accelerator) -> float:
    """Do what `evaluate` does, in smaller batches where memory ends.

    Raises:
        TrainingError: where one image is too much, or where the batches are not this process's to choose.
    """
    size, ours = batch_size, is_table(data) and accelerator.num_processes == 1

    def halve() -> int:
        nonlocal size
        if not ours or size == 1:
            raise TrainingError(
                f"a batch of {size} validation images does not fit into memory"
                if is_table(data)
                else "a batch of the validation loader does not fit into memory: pass one of smaller batches"
            )
        size //= 2
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=halve)  # type: ignore[untyped-decorator]
    def accuracy(batch_size: int) -> float:
        return evaluate(model, data, batch_size, accelerator)

    return float(accuracy())


def count_classes(model: nn.Module) -> int:
    """Return how many classes a model's logits have.

    Raises:
        TrainingError: where it puts out no logits.
    """
    if is_retrofitted(model):
        follow_classifier(model)
        classes = get_retrofit(model).plan.classes
    else:
        try:
            with undisturbed(model), torch.no_grad():
                example = prepare_example(model, None)
                classes = _width(model, logits_of(run(model, example)), example)
        except ExampleError:  # nobody knows its input; what it says of itself may be of a head that is gone
            classes = int(next((number for number in _said(model) if number), 0))
    if not classes:
        raise TrainingError(f"{type(model).__name__} puts out no class logits (B, C): give it a classifier first")
    return int(classes)


def _width(model: nn.Module, logits: Tensor | None, inputs: Any) -> int:
    """Return C of logits; 0 where a model that says it has no classes puts out features instead."""
    if logits is None:
        return 0
    said = _said(model)
    if said and not any(said) and not record(model, inputs).readouts(logits.shape[1]):
        return 0
    return logits.shape[1]


def _said(model: nn.Module) -> list[int]:
    # not of the config: every Hugging Face config says 2 unless told otherwise, a tower's too
    return [number for name in ("num_classes", "num_labels") if (number := getattr(model, name, None)) is not None]
