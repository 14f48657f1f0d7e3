"""A classifier that changes after conversion: do the tokens that are left still serve it, and what is known of it?"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.guards import watch_pooling
from ltm_retrofit.converted.record import forwards_of, get_retrofit, has_step, in_mode, learns, masks_of
from ltm_retrofit.converted.resizing import at_planned_size
from ltm_retrofit.errors import ExampleError, UnsupportedBlock, in_words
from ltm_retrofit.finding.example import Example, home, make_example, run, tensors_of
from ltm_retrofit.finding.proofs import all_close
from ltm_retrofit.finding.recording import Recording, record
from ltm_retrofit.macs import count_macs_quick
from ltm_retrofit.merging.statistics import Statistics
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.scopes.base import Interceptor
from ltm_retrofit.undisturbed import remembered, undisturbed

#: timm's method that gives a model another classifier
RESET = "reset_classifier"


class Reset:
    """Stands in for a host's ``reset_classifier``: what the conversion knows follows, or nothing changes.

    Args:
        model: the converted model.
        owner: the module whose method it is: the model, or one in it.
    """

    def __init__(self, model: nn.Module, owner: nn.Module) -> None:
        self.model, self.owner = model, owner

    @property
    def __signature__(self) -> inspect.Signature:
        """The host's own."""
        return inspect.signature(getattr(type(self.owner), RESET).__get__(self.owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Give the model another classifier.

        Raises:
            UnsupportedBlock: where the new one reads tokens that are gone; the model is as it was.
        """
        if torch.is_inference_mode_enabled():
            raise UnsupportedBlock(
                f"{RESET} of a converted {type(self.model).__name__} proves anew what the classifier reads, which "
                "torch.inference_mode() does not allow: call it outside of inference_mode; torch.no_grad() does no harm"
            )
        with _all_or_nothing(self.model), in_mode(self.model, "merge"):
            result = getattr(type(self.owner), RESET)(self.owner, *args, **kwargs)
            _follow(self.model)
        return result


def guard_classifier(model: nn.Module) -> None:
    """Let a newly converted model's record follow its classifier."""
    converted = {forward.block for forward in forwards_of(model)}
    for owner in model.modules():
        own = RESET in owner.__dict__ or not callable(getattr(type(owner), RESET, None))
        if not own and not converted.isdisjoint(owner.modules()):
            owner.__dict__[RESET] = Reset(model, owner)


def unguard_classifier(model: nn.Module) -> None:
    """Undo `guard_classifier`."""
    for module in model.modules():
        if isinstance(module.__dict__.get(RESET), Reset):
            del module.__dict__[RESET]


def follow_classifier(model: nn.Module, *, thorough: bool = False) -> None:
    """Let a converted model's record follow a classifier that was replaced by hand; otherwise nothing happens.

    Args:
        model: the converted model.
        thorough: also look for a classifier where there was none, which takes forward passes.

    Raises:
        UnsupportedBlock: where the classifier reads tokens that are gone.
    """
    plan = get_retrofit(model).plan
    same = all(_width(model, name) == plan.classes for name in plan.readouts)
    if not same or (thorough and not plan.readouts):
        with _all_or_nothing(model), in_mode(model, "merge"):
            _follow(model)


def _width(model: nn.Module, name: str) -> int:
    """Return how many numbers a linear module puts out; 0 where it is gone, or is no such module any more."""
    try:
        weight = getattr(model.get_submodule(name), "weight", None)
    except AttributeError:
        return 0
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def make_readout(model: nn.Module, plan: MergePlan, masks: Iterable[nn.Module]) -> Statistics | None:
    """Make the statistics of the feature that the classifier reads; None where no mask learns, or nobody reads."""
    if not plan.readouts or not any(map(learns, masks)):
        return None
    width = sum(model.get_submodule(name).get_parameter("weight").shape[1] for name in plan.readouts)
    return Statistics(width, plan.classes, plan.clusters).to(home(model)[0])


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put a model back where something fails meanwhile."""
    put_back = remembered(model)
    try:
        yield
    except BaseException:
        put_back()
        raise


def _follow(model: nn.Module) -> None:
    """Prove the ending anew, then put the plan, the statistics and the counts right."""
    record = get_retrofit(model)
    example = make_example(record.plan.input_size, record.plan.fixed_inputs, model)
    watch_pooling(model)
    served, recording = _record(model, example)
    _prove_ending(served, example, recording.output)
    classes, readouts = recording.classifier()
    plan = dataclasses.replace(record.plan, classes=classes, readouts=readouts, macs_original=recording.macs)
    for part in {model, served}:
        _renew_statistics(part, plan)
    with undisturbed(served), torch.no_grad():
        macs = count_macs_quick(lambda: run(served, example))
    record.plan = dataclasses.replace(plan, macs=macs)  # not inside, where it would be put back


def _record(model: nn.Module, example: Example) -> tuple[nn.Module, Recording]:
    """Record the original path, of the model or of what takes the plan's inputs in its place."""
    try:
        with in_mode(model, "original"):
            return model, record(model, example)
    except ExampleError as error:
        if (twin := at_planned_size(model)) is None:
            raise UnsupportedBlock(
                f"with this classifier it no longer runs on its plan's inputs: {in_words(error)}"
            ) from error
    with in_mode(twin, "original"):
        return twin, record(twin, example)


def _prove_ending(model: nn.Module, example: Example, expected: Any) -> None:
    """Prove that the classifier makes of merged tokens what it should, and reads none of those that are sliced off."""
    try:
        with undisturbed(model), torch.no_grad():
            given = run(model, example)
            wholes = [_run_whole(model, example, forward) for forward in forwards_of(model) if forward.keep is not None]
    except Exception as error:  # whatever a classifier does that wants tokens where there are none
        raise UnsupportedBlock(_refusal(model, f"{type(error).__name__}: {in_words(error)}")) from error
    ours, theirs = ([tuple(tensor.shape) for tensor in tensors_of(output)] for output in (given, expected))
    if ours != theirs:
        raise UnsupportedBlock(_refusal(model, f"outputs have shapes {ours} instead of {theirs}"))
    if not all(all_close(given, whole) for whole in wholes):
        raise UnsupportedBlock(_refusal(model, "its output depends on tokens that the last block slices off"))


def _run_whole(model: nn.Module, example: Example, forward: Interceptor) -> Any:
    """Run without the slice, with NaN in place of what it would take away: a classifier that reads that shows it."""
    keep, forward.keep = forward.keep, None
    handle = forward.block.register_forward_hook(partial(_poison, keep))
    try:
        return run(model, example)
    finally:
        handle.remove()
        forward.keep = keep


def _poison(keep: int | None, block: nn.Module, args: Any, output: Tensor) -> Tensor:
    poisoned = output.clone()
    poisoned[:, keep:] = float("nan")
    return poisoned


def _refusal(model: nn.Module, reason: str) -> str:
    return (
        f"this classifier does not fit what the conversion of {type(model).__name__} leaves of the tokens ({reason}): "
        "keep the pooling that it was converted with, or call ltm_retrofit.restore(model), change the classifier and "
        "retrofit again, or convert with output_tokens='full'"
    )


def _renew_statistics(model: nn.Module, plan: MergePlan) -> None:
    """Start statistics anew where they are of other classes or of another feature."""
    record, masks = get_retrofit(model), list[Any](masks_of(model).values())
    fresh = make_readout(model, plan, masks)
    if _shapes(record.readout) != _shapes(fresh):
        record.readout = fresh if fresh is None else fresh.train(record.training)
    for mask in filter(has_step, masks):
        clusters, dim = mask.statistics.centroids.shape
        other = Statistics(dim, max(1, plan.classes), clusters)
        if _shapes(mask.statistics) != _shapes(other):
            mask.statistics = other.to(home(model)[0]).train(mask.training)


def _shapes(statistics: Statistics | None) -> tuple[torch.Size, ...]:
    return () if statistics is None else (statistics.centroids.shape, statistics.counts.shape)
