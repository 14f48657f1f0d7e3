"""Which classes a model has, which the data have, whether the two agree, and how many are recognised.

Over 400 lines: whoever asks what is recognised has to know which of the model's classes a label is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ltm_retrofit.converted.classifier import follow_classifier
from ltm_retrofit.converted.record import get_retrofit, is_retrofitted
from ltm_retrofit.errors import AlreadyRetrofitted, DataError, ExampleError, TrainingError
from ltm_retrofit.finding.example import home, logits_of, prepare_example, run
from ltm_retrofit.finding.recording import record
from ltm_retrofit.merging.ib import soft_targets
from ltm_retrofit.progress import progress
from ltm_retrofit.tuning.data import Data, batches_on, check_kind, columns_of, is_stream, is_table, make_loader, size_of
from ltm_retrofit.tuning.processes import Accelerator, is_main
from ltm_retrofit.tuning.settings import TrainConfig
from ltm_retrofit.undisturbed import undisturbed

#: names on the model the parameters and buffers of a classifier that is new
NEW_CLASSIFIER = "ltm_new_classifier"

#: gives a module for the time of a batch, such as a converted model whose original path runs meanwhile
Version = Callable[[], AbstractContextManager[nn.Module]]


# --------------------------------------------------------------------------------------------- the classes of data


def names_in(data: Data) -> list[str] | None:
    """Return what a data set calls its classes, in their order; None where they are numbers only."""
    names: list[str] | None = getattr((data.features or {}).get("label"), "names", None)
    return names


def labels_in(data: Data, split: str) -> set[int]:
    """Return the labels that a data set has.

    Raises:
        DataError: where they are no whole numbers.
    """
    stored = data.with_format(None)["label"]  # as they are stored, without a transform of every image
    others = {str(label): label for label in stored if type(label) is not int}
    if others:
        raise DataError(
            f"the {split} split has labels that are no whole numbers: {[others[key] for key in sorted(others)][:5]}: "
            "number them with dataset.class_encode_column('label'), and drop images without one"
        )
    return set(stored)


def classes_in(data: Data, split: str) -> list[str] | int:
    """Name the classes of a data set; where they have no names, say how many there are.

    Raises:
        DataError: where there is none, or the numbers leave some out.
    """
    if names := names_in(data):
        return names
    seen = sorted(labels_in(data, split))
    if not seen or seen != list(range(len(seen))):
        raise DataError(
            f"the {split} split has labels {', '.join(map(str, seen[:8])) or 'of no image'}{' …' * (len(seen) > 8)}: "
            "number the classes from 0 on without gaps, or give them names (datasets.ClassLabel)"
        )
    return len(seen)


def check_same_classes(train: Data, test: Data, split: str = "training") -> None:
    """Check that a label means the same in two splits, as far as they say what it means; ``split`` names the first.

    Raises:
        DataError: where their classes have other names.
    """
    said = [names_in(data) for data in (train, test) if "label" in (data.features or {})]
    if len(said) == 2 and said[0] != said[1]:
        raise DataError(
            f"the {split} split and the test split have different classes, and one label would mean two things: "
            f"{_difference(said[0], said[1], split)}. Give both splits the same class folders"
        )


def _difference(first: list[str] | None, other: list[str] | None, split: str) -> str:
    """Say how the classes of a split differ from those of the test split."""
    if first is None or other is None:
        return f"{split if first is None else 'test'} labels are numbers without names"
    only = {split: [one for one in first if one not in other], "test": [one for one in other if one not in first]}
    if not any(only.values()):
        place = next(place for place, (one, two) in enumerate(zip(first, other, strict=False)) if one != two)
        return f"they come in another order, class {place} is {first[place]!r} in one and {other[place]!r} in the other"
    return " and ".join(f"only the {name} split has {listed(names)}" for name, names in only.items() if names)


def listed(names: Sequence[str], most: int = 8) -> str:
    """Join names with commas, as many as fit a line; of the others say how many."""
    return ", ".join(map(repr, names[:most])) + f" and {len(names) - most} more" * (len(names) > most)


def check_data(model: nn.Module, data: Data, split: str, classes: int) -> tuple[int, ...] | None:
    """Check a data set's labels against a model's classes; return the class of each of them, where they differ.

    Raises:
        DataError: columns missing, no image, labels that do not fit the model's classes, a class without images.
    """
    class_of = _class_of(model, data, classes)
    check_labels(data, classes, split, class_of)
    return class_of


def check_labels(data: Data, classes: int, split: str, class_of: Sequence[int] | None = None) -> None:
    """Check a data set's columns and labels; ``class_of`` is the model's class of each label, where they differ.

    Raises:
        DataError: columns missing, labels outside the classes, or a class that no image has.
    """
    columns = columns_of(data)
    if {"image", "label"} - set(columns):
        raise DataError(
            f"the {split} split has columns {', '.join(columns)}; expected image and label: rename them with "
            "dataset.rename_column, or name them in the recipe's data section"
        )
    if is_stream(data):
        return  # its labels are checked as they come
    if len(data) == 0:
        raise DataError(f"the {split} split is empty")
    seen = labels_in(data, split)
    if class_of is not None:
        seen = {class_of[label] if label in range(len(class_of)) else label for label in seen}
    outside = sorted(label for label in seen if not 0 <= label < classes)
    if outside:
        raise DataError(
            f"the {split} split has labels {outside[:5]} outside the model's {classes} classes (0 to {classes - 1}): "
            "give the model a classifier of as many classes as the data has"
        )
    if absent := sorted(set(range(classes)) - seen):
        names = dict(enumerate(names_in(data) or ())) if class_of is None else {}
        shown = ", ".join(names.get(label, str(label)) for label in absent[:5]) + " …" * (len(absent) > 5)
        raise DataError(
            f"no image of the {split} split has class {shown} ({len(absent)} of the model's {classes} classes): use a "
            "split that has all of them, stratified for example, or give the model another classifier"
        )


# ------------------------------------------------------------------------------------------ the classes of a model


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
        except ExampleError:  # nobody knows its input; what it says may be of a classifier that is gone
            classes = next((number for number in _said(model) if number), 0)
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


def labels_of(model: nn.Module, classes: int) -> list[str]:
    """Return what a model's classes are called: by its config or by timm, else by number; no two the same.

    Example:
        >>> import timm
        >>> from ltm_retrofit.tuning.classes import labels_of
        >>> labels_of(timm.create_model("vit_tiny_patch16_224", num_classes=3), 3)
        ['class 0', 'class 1', 'class 2']
    """
    said = _said_names(model)
    if max(said, default=0) >= classes:  # what a classifier that is gone called its classes
        said = {}
    given = [str(said.get(index, [""])[0]).split(",")[0] for index in range(classes)]  # of "tench, Tinca tinca" tench
    unnamed = [_plain(name) in ("", f"label {index}") for index, name in enumerate(given)]
    return [
        f"class {index}" if unnamed[index] else name if given.count(name) == 1 else f"{name} (class {index})"
        for index, name in enumerate(given)
    ]


def _known(model: nn.Module) -> dict[str, int]:
    """Return the class of each name that a model knows its classes by; a name of two classes is none."""
    labels = _said_names(model)
    found: dict[str, set[int]] = {}
    for index, names in labels.items():
        for name in names:
            found.setdefault(_plain(name), set()).add(index)
    unnamed = {f"label {index}" for index in labels}  # what transformers calls classes that nobody named
    return {name: indices.pop() for name, indices in found.items() if len(indices) == 1 and name not in unnamed}


def _said_names(model: nn.Module) -> dict[int, list[str]]:
    """Return all names that a model gives each of its classes, the one to show first."""
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
        labels = {index: [*text.split(","), text, synset] for index, (synset, text) in enumerate(texts)}
    return labels


def _plain(name: str) -> str:
    return str(name).lower().replace("_", " ").strip()


def _find(known: Mapping[str, int], names: Sequence[str]) -> tuple[list[int | None], bool]:
    """Return the model's class of each name, and whether each has one of its own."""
    found = [known.get(_plain(name)) for name in names]
    return found, None not in found and len(set(found)) == len(names)


def _class_of(model: nn.Module, data: Data, classes: int) -> tuple[int, ...] | None:
    """Return the model's class of each of a data set's, by their names; None where they are the same, or unnamed.

    Raises:
        DataError: where the model knows some of the names and has them elsewhere.
    """
    names = names_in(data) or []
    known = _known(model) if names else {}
    if not known or max(known.values()) >= classes:  # what a classifier that is gone called its classes
        return None
    found, complete = _find(known, names)
    if not complete:
        _check_unmoved(model, names, found)
        if (unknown := _unknown(names, found)) and any(own is not None for own in found):
            host = type(model).__name__
            warnings.warn(f"{host} knows no class {unknown}: counted as its class of the same number", stacklevel=2)
    moved = complete and found != list(range(len(names)))
    return tuple(own for own in found if own is not None) if moved else None


def _unknown(names: Sequence[str], found: Sequence[int | None]) -> str:
    return ", ".join(repr(name) for name, own in zip(names, found, strict=True) if own is None)


def _check_unmoved(model: nn.Module, names: Sequence[str], found: Sequence[int | None]) -> None:
    """Check that a model has the names that it knows where the data has them.

    Raises:
        DataError: naming one that it has elsewhere.
    """
    host, unknown = type(model).__name__, _unknown(names, found)
    for index, own in enumerate(found):
        if own not in (None, index):
            raise DataError(
                f"the data's class {index} is {names[index]!r}, which {host} knows as its class {own}, and it does not "
                f"know {unknown or 'each by itself'}: give the data the model's class names, or the model a classifier "
                "of its own"
            )


# ------------------------------------------------------------------------------------------------ a new classifier


def set_classes(model: nn.Module, names: Sequence[str] | int) -> str | None:
    """Give a model the classes of these names, in this order; return how: ``"new"``, ``"by name"``, or None.

    A number is that of classes without names.

    Where the model knows all of the names, its classifier keeps the weights of these classes: all of them in another
    order, or a part. Where it has another number of classes and does not know them, it gets a classifier that is
    ``"new"``. None says that it stays. timm models get a classifier through their own ``reset_classifier``; others by
    replacing the linear modules that put out the logits.

    Raises:
        AlreadyRetrofitted: change the classifier before converting.
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
        raise DataError("a classifier has at least one class, and these data have none")
    known = {} if unnamed else _known(model)
    found, complete = _find(known, names)
    if classes == len(names):
        if known and set(found) == {None} and not all(name.isdigit() for name in names):
            name, index = min(known.items(), key=lambda item: item[1])
            warnings.warn(
                f"the data has as many classes as {type(model).__name__}, {len(names)}, under names that it does not "
                f"know: its classifier stays, and the data's {names[index]!r}, class {index}, is taken for its "
                f"{name!r}",
                stacklevel=2,
            )
        if not complete:
            _check_unmoved(model, names, found)
        if not complete or found == list(range(classes)):
            return None
    kept = [own for own in found if own is not None] if complete else None
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)  # a new classifier is the same in every run
        before = set(model.state_dict(keep_vars=True).values())
        _replace_classifier(model, names, recording.readouts(classes) if classes else (), kept)
    if isinstance(given := getattr(model, "pretrained_cfg", None), Mapping):
        rest = {key: value for key, value in given.items() if key not in ("label_names", "label_descriptions")}
        model.pretrained_cfg = rest if unnamed else {**rest, "label_names": list(names)}  # type: ignore[assignment]
    state = model.state_dict(keep_vars=True)
    model.__dict__[NEW_CLASSIFIER] = tuple(name for name, tensor in state.items() if tensor not in before)
    return "by name" if complete else "new"


def _replace_classifier(
    model: nn.Module, names: Sequence[str], readouts: Sequence[str], kept: Sequence[int] | None
) -> None:
    """Put a new classifier in place, or one with the weights that the old one has for the ``kept`` classes."""
    reset = getattr(model, "reset_classifier", None)
    if callable(reset) and kept is None:
        reset(len(names))
        return
    if not readouts:
        raise DataError(
            f"{type(model).__name__} has no linear classifier to replace: load a class that has one, such as "
            "AutoModelForImageClassification"
        )
    for name in readouts:
        old = model.get_submodule(name)
        weight = old.get_parameter("weight")
        linear = nn.Linear(weight.shape[1], len(names), bias=getattr(old, "bias", None) is not None)
        if kept is not None:
            for key, parameter in linear.named_parameters():
                parameter.copy_(old.get_parameter(key)[list(kept)])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear.to(weight).train(old.training))
    config = getattr(model, "config", None)
    if config is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {label: index for index, label in enumerate(names)}
        model.num_labels = len(names)  # type: ignore[assignment]
    elif isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = len(names)  # type: ignore[assignment]


def new_classifier(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a classifier that `set_classes` made: no checkpoint of the base has them."""
    named = dict(model.named_parameters())
    return {named[name] for name in model.__dict__.get(NEW_CLASSIFIER, ()) if name in named}


# ------------------------------------------------------------------------------------------------------- accuracy


def evaluate(model: nn.Module, data: Data, batch_size: int = 128, accelerator: Accelerator | None = None) -> float:
    """Return a model's top-1 accuracy in percent, converted or not. The model runs in eval mode and stays as it was.

    Example:
        >>> import timm, torch
        >>> import ltm_retrofit as ltm
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=7)
        >>> images, labels = torch.randn(14, 3, 32, 32), torch.arange(14) % 7
        >>> 0 <= ltm.evaluate(model, [(images, labels)]) <= 100
        True

    Args:
        model: any classifier.
        data: a `datasets` data set with columns ``image`` and ``label``, or a loader of batches.
        batch_size: images at once, of a data set.
        accelerator: of a run of several processes, which share the data.

    Raises:
        DataError: where labels do not fit the model's classes, or there is no image.
        TrainingError: where the model puts out no logits.
    """
    check_kind(data, "data")
    guesses, truths = predictions(model, data, batch_size, accelerator)
    return 100 * int((guesses == truths).sum()) / len(truths)


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
    for (logits,), labels in answers(model, [itself(model)], data, batch_size, accelerator):
        guesses.append(logits.argmax(dim=-1).cpu())
        truths.append(labels.cpu())
    return torch.cat(guesses), torch.cat(truths)


def itself(model: nn.Module) -> Version:
    """Return a model as a version of it: as it is."""
    return lambda: nullcontext(model)


def answers(
    model: nn.Module,
    versions: Sequence[Version],
    data: Data,
    batch_size: int = 128,
    accelerator: Accelerator | None = None,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the logits of several versions of a model to each batch, and its labels ``(B,)``; each image is read once.

    Args:
        model: whose images they take, and whose classes they have; labels come in its numbers.
        versions: each gives a module for the time of a batch; all run in eval mode.
        data: as for `evaluate`.
        batch_size: images at once, of a data set.
        accelerator: of several processes, which share the data and all return the whole.

    Raises:
        DataError, TrainingError: as from `predictions`.
    """
    class_of = check_data(model, data, "evaluation", count_classes(model)) if is_table(data) else None
    config = TrainConfig(batch_size=batch_size, unreadable=0.0)  # no image to evaluate on may be missing
    for logits, targets, _, gather in _answered(model, versions, data, config, accelerator, class_of):
        assert targets is not None
        *every, truths = gather([*logits, targets.argmax(dim=-1)])
        yield every, truths


def judged(
    model: nn.Module,
    data: Data,
    judge: Callable[[Tensor, Tensor | None, Any], Tensor],
    config: TrainConfig,
    accelerator: Accelerator | None = None,
    class_of: Sequence[int] | None = None,
    *,
    labelled: bool = True,
) -> Tensor:
    """Return a judgement ``(n, …)`` of a model's answer to each image, in the data's order, in eval mode.

    Args:
        model: any classifier.
        data: a data set whose labels were checked, or a loader.
        judge: from logits ``(b, C)``, soft labels ``(b, C)`` or None, and the inputs of a batch, to ``(b, …)``.
        config: of a data set, how many images at once, and the share of them that may be unreadable.
        accelerator: of several processes, which share the data and all return the whole.
        class_of: the model's class of each label, where they differ.
        labelled: whether there have to be labels.

    Raises:
        DataError: where there is no image, or labels do not fit the model's classes.
        TrainingError: where the model puts out no logits.
    """
    found: list[Tensor] = []
    passes = _answered(model, [itself(model)], data, config, accelerator, class_of, labelled=labelled)
    for (logits,), targets, inputs, gather in passes:
        found += [each.cpu() for each in gather([judge(logits, targets, inputs)])]
    return torch.cat(found)


#: logits of each version, soft labels, inputs, and what brings together what several processes saw
Answered = tuple[list[Tensor], Tensor | None, Any, Callable[[list[Tensor]], list[Tensor]]]


@torch.no_grad()
def _answered(
    model: nn.Module,
    versions: Sequence[Version],
    data: Data,
    config: TrainConfig,
    accelerator: Accelerator | None,
    class_of: Sequence[int] | None,
    *,
    labelled: bool = True,
) -> Iterator[Answered]:
    """Go through the batches of some data, see `answers` and `judged`."""
    loader = make_loader(model, data, config, shuffle=False, class_of=class_of)
    shared = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
    shared = shared if isinstance(loader, DataLoader) else None
    loader = loader if shared is None else shared.prepare_data_loader(loader)

    def gather(seen: list[Tensor]) -> list[Tensor]:
        return seen if shared is None else list(shared.gather_for_metrics(seen))

    classes, empty = 0, True  # the number of classes is what the first logits say
    with progress("evaluate", len(data) if is_table(data) else None, "images", on=is_main()) as bar:
        for inputs, labels in batches_on(loader, home(model)[0], labelled=labelled):
            seen = []
            for version in versions:
                with version() as one, _evaluating(one):
                    logits = logits_of(run(one, inputs))
                    classes = classes or _width(one, logits, inputs)
                if logits is None or not classes:
                    raise TrainingError(f"{type(one).__name__} puts out no class logits (B, C): give it a classifier")
                seen.append(logits)
            yield seen, None if labels is None else soft_targets(labels, classes), inputs, gather
            bar.update(size_of(inputs) * (1 if shared is None else shared.num_processes))
            empty = False
    if empty:
        raise DataError("there is no image to evaluate on")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode meanwhile."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
