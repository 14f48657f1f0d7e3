"""Another set of classes gets a new head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ltm_retrofit.convert import is_retrofitted
from ltm_retrofit.errors import AlreadyRetrofitted, DataError
from ltm_retrofit.graph.example import logits_of, prepare_example
from ltm_retrofit.graph.probe import record
from ltm_retrofit.undisturbed import undisturbed

#: names on the model the parameters of a head that is new
NEW_HEAD = "ltm_new_head"


def set_classes(model: nn.Module, names: Sequence[str]) -> bool:
    """Give a model as many classes as there are names; return whether it needed a new head.

    timm models through their own ``reset_classifier``; others by replacing the linear modules that put out the logits.

    Raises:
        AlreadyRetrofitted: change the head before converting.
        DataError: where the model has no linear classifier to replace.
    """
    if is_retrofitted(model):
        raise AlreadyRetrofitted("the statistics of a converted model belong to its classes: restore it first")
    with undisturbed(model), torch.no_grad():
        recording = record(model, prepare_example(model, None))
    logits = logits_of(recording.output)
    if logits is not None and logits.shape[1] == len(names):
        return False
    with torch.random.fork_rng():
        torch.manual_seed(0)  # a new head is the same in every run
        before = set(model.parameters())
        _replace_head(model, names, recording.readouts(logits.shape[1]) if logits is not None else ())
    model.__dict__[NEW_HEAD] = tuple(name for name, p in model.named_parameters() if p not in before)
    return True


def new_head(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a head that `set_classes` made: nothing pretrained is in them."""
    named = dict(model.named_parameters())
    return {named[name] for name in model.__dict__.get(NEW_HEAD, ()) if name in named}


def _replace_head(model: nn.Module, names: Sequence[str], readouts: Sequence[str]) -> None:
    reset = getattr(model, "reset_classifier", None)
    if callable(reset):
        reset(len(names))
        return
    if not readouts:
        raise DataError(
            f"{type(model).__name__} has no linear classifier to replace: load a class with a classification head, "
            "such as AutoModelForImageClassification"
        )
    for name in readouts:
        old = model.get_submodule(name)
        weight = old.get_parameter("weight")
        head = nn.Linear(weight.shape[1], len(names), bias=getattr(old, "bias", None) is not None)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, head.to(weight).train(old.training))
    config = getattr(model, "config", None)
    if config is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {label: index for index, label in enumerate(names)}
        model.num_labels = len(names)  # type: ignore[assignment]
