"""Another set of classes gets a new head."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset  # type: ignore[attr-defined]
from torch import nn

from ltm_retrofit.converted.record import is_retrofitted
from ltm_retrofit.errors import AlreadyRetrofitted, DataError
from ltm_retrofit.finding.example import logits_of, prepare_example
from ltm_retrofit.finding.recording import record
from ltm_retrofit.undisturbed import undisturbed

#: names on the model the parameters and buffers of a head that is new
NEW_HEAD = "ltm_new_head"


def set_classes(model: nn.Module, names: Sequence[str] | int) -> str | None:
    """Give a model the classes of these names, in this order; return how: ``"new"``, ``"by name"``, or None.

    A number is that of classes without names.

    Where the model knows all of the names, its head becomes the rows of these classes: the same head in another order,
    or a part of it. Where it has another number of classes and does not know them, it gets a head that is ``"new"``.
    None is the head as it is. timm models get a head through their own ``reset_classifier``; others by replacing the
    linear modules that put out the logits.

    Raises:
        AlreadyRetrofitted: change the head before converting.
        DataError: where there is no class, or the model has no linear classifier to replace, or has as many classes,
            knows some of the names and has them elsewhere.
    """
    if is_retrofitted(model):
        raise AlreadyRetrofitted("the statistics of a converted model belong to its classes: restore it first")
    with undisturbed(model), torch.no_grad():
        recording = record(model, prepare_example(model, None))
    logits = logits_of(recording.output)
    classes = 0 if logits is None else logits.shape[1]
    unnamed = isinstance(names, int)
    names = [f"LABEL_{index}" for index in range(names)] if isinstance(names, int) else names  # transformers' own
    if not names:
        raise DataError("a head has at least one class, and these data have none")
    known_names = {} if unnamed else _places(model)
    places = [known_names.get(_plain(name)) for name in names]
    whole = [place for place in places if place is not None]
    known = len(whole) == len(set(whole)) == len(names)
    if classes == len(names):
        moved = [place for at, place in enumerate(places) if place != at]
        if not whole and known_names and not all(name.isdigit() for name in names):
            own, place = min(known_names.items(), key=lambda known: known[1])
            warnings.warn(
                f"the data has as many classes as {type(model).__name__}, {len(names)}, under names that it does not "
                f"know: its head stays, and the data's {names[place]!r}, class {place}, is taken for its {own!r}",
                stacklevel=2,
            )
        if not moved or not whole:
            return None
        if not known:
            _check_unmoved(model, names, places)
            return None
    readouts = recording.readouts(classes) if classes else ()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # a new head is the same in every run
        before = set(model.state_dict(keep_vars=True).values())
        _replace_head(model, names, readouts, whole if known else None)
    if isinstance(given := getattr(model, "pretrained_cfg", None), Mapping):
        kept = {key: value for key, value in given.items() if key not in ("label_names", "label_descriptions")}
        model.pretrained_cfg = kept if unnamed else {**kept, "label_names": list(names)}  # type: ignore[assignment]
    state = model.state_dict(keep_vars=True)
    model.__dict__[NEW_HEAD] = tuple(name for name, tensor in state.items() if tensor not in before)
    return "by name" if known else "new"


def places_of(model: nn.Module, data: Any, classes: int) -> tuple[int, ...] | None:
    """Return the model's class of each of a data set's, by their names; None where they are the same, or unnamed.

    Raises:
        DataError: where the model knows some of the names and has them elsewhere.
    """
    names: list[str] = getattr((data.features or {}).get("label"), "names", None) or []
    known_names = _places(model) if names else {}
    if not known_names or max(known_names.values()) >= classes:  # what a head that is gone called its classes
        return None
    places = [known_names.get(_plain(name)) for name in names]
    whole = [place for place in places if place is not None]
    if len(whole) == len(set(whole)) == len(names):
        return None if whole == list(range(len(names))) else tuple(whole)
    _check_unmoved(model, names, places)
    return None


def _check_unmoved(model: nn.Module, names: Sequence[str], places: Sequence[int | None]) -> None:
    """Check that a model has the names that it knows where the data has them.

    Raises:
        DataError: naming one that it has elsewhere.
    """
    elsewhere = [(at, place) for at, place in enumerate(places) if place not in (None, at)]
    if elsewhere:
        at, place = elsewhere[0]
        raise DataError(
            f"the data's class {at} is {names[at]!r}, which {type(model).__name__} knows as its class {place}, and it "
            "does not know all of them: give the data the model's class names, or the model a head of its own"
        )


def _places(model: nn.Module) -> dict[str, int]:
    """Return the class of each name that a model knows its classes by; a name of two classes is none."""
    said = getattr(getattr(model, "config", None), "id2label", None) or {}
    labels = {int(index): [label, *str(label).split(",")] for index, label in said.items()}
    given = getattr(model, "pretrained_cfg", None)
    given = given if isinstance(given, Mapping) else {}
    if given.get("label_names"):
        labels = {index: [label] for index, label in enumerate(given["label_names"])}
    elif "pretrained_cfg" in model.__dict__ and (subset := infer_imagenet_subset(model)):
        info = ImageNetInfo(subset)
        count = info.num_classes()  # type: ignore[no-untyped-call]
        texts = ((info.index_to_label_name(index), info.index_to_description(index)) for index in range(count))
        labels = {index: [synset, text, *text.split(",")] for index, (synset, text) in enumerate(texts)}
    found: dict[str, set[int]] = {}
    for index, names in labels.items():
        for name in names:
            found.setdefault(_plain(name), set()).add(index)
    unnamed = {f"label {index}" for index in labels}  # what transformers calls classes that nobody named
    return {name: indices.pop() for name, indices in found.items() if len(indices) == 1 and name not in unnamed}


def _plain(name: str) -> str:
    return str(name).lower().replace("_", " ").strip()


def new_head(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a head that `set_classes` made: no checkpoint of the base has them as they are."""
    named = dict(model.named_parameters())
    return {named[name] for name in model.__dict__.get(NEW_HEAD, ()) if name in named}


def _replace_head(model: nn.Module, names: Sequence[str], readouts: Sequence[str], rows: Sequence[int] | None) -> None:
    """Put a new head in place, or, with ``rows``, the linear modules' own rows of these classes."""
    reset = getattr(model, "reset_classifier", None)
    if callable(reset) and rows is None:
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
        if rows is not None:
            for key, parameter in head.named_parameters():
                parameter.copy_(old.get_parameter(key)[list(rows)])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, head.to(weight).train(old.training))
    config = getattr(model, "config", None)
    if config is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {label: index for index, label in enumerate(names)}
        model.num_labels = len(names)  # type: ignore[assignment]
    elif isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = len(names)  # type: ignore[assignment]
