"""Every error that this package raises on purpose. Each message says what was given, what was expected, what to do."""

from __future__ import annotations

import traceback
from collections.abc import Iterable


class RetrofitError(Exception):
    """Parent of all errors of ltm_retrofit."""


class NoAttentionError(RetrofitError):
    """The model attends nowhere, or nowhere that a token could be merged."""


class ExampleError(RetrofitError):
    """The example input is missing, or the model cannot be run on it."""


class UnsupportedBlock(RetrofitError):
    """A block cannot be cut between attention and MLP, or a proof of the cut failed."""


class BudgetError(RetrofitError):
    """No plan meets the asked-for share of MACs; ``nearest`` is the exact share that can be had instead."""

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, float]]:
        """Keep ``nearest`` when the error crosses a process boundary."""
        return type(self), (str(self), self.nearest)


class AlreadyRetrofitted(RetrofitError):
    """The model was converted before."""


class NotRetrofitted(RetrofitError):
    """The model was not converted, so there is nothing to restore, trace or save."""


class BaseMismatch(RetrofitError):
    """The base model is not the one that a plan or a saved folder was made from."""


class CheckpointError(RetrofitError):
    """A folder cannot be written or read: permissions, foreign files, truncated or altered weights."""


class CountError(RetrofitError):
    """Token counts or operation counts do not add up."""


class RecipeError(RetrofitError):
    """A configuration or recipe holds an unknown key or a value that cannot be."""


class DataError(RetrofitError):
    """A data set does not fit the model: labels, classes, columns, images."""


class TrainingError(RetrofitError):
    """Training cannot begin, or had to stop; the model holds the weights from before, or earlier good ones."""


def check_choice(value: object, choices: Iterable[str], name: str) -> None:
    """Raise `RecipeError` where ``value`` is none of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise RecipeError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def in_words(error: BaseException) -> str:
    """Return what an error says, or where it says nothing, the line that raised it: a reason is never empty.

    Example:
        >>> in_words(ValueError("too few"))
        'too few'
        >>> try:
        ...     raise AssertionError
        ... except AssertionError as error:
        ...     in_words(error).endswith("in <module>)")
        True
    """
    said = str(error).strip()
    frames = traceback.extract_tb(error.__traceback__)
    if said or not frames:
        return said or type(error).__name__
    last = frames[-1]
    return f"{last.line or 'raised'} (line {last.lineno} of {last.filename}, in {last.name})"
