"""Epoch after epoch through the training data, from any place on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ltm_retrofit.errors import CheckpointError, DataError
from ltm_retrofit.tuning import checkpoints
from ltm_retrofit.tuning.images import Images, Order, Stream

#: stands for the batch after the last one
END = object()


class Passes:
    """The epochs of a run, and the passes through the data that they take.

    An epoch is as many batches as the loader has, or as many as were asked for: a pass through the data then goes on in
    the next epoch, and a new one begins where the data ends.

    Args:
        loader: as Accelerate prepared it.
        place: what of a data set's own loader can be sent to a pass; None of any other loader.
        length: batches in an epoch; None is all that the loader has.
        images: in a batch, in all processes.

    Raises:
        DataError: where the length is neither given nor known, or zero.
    """

    def __init__(self, loader: Any, place: Order | Stream | None, *, length: int | None, images: int) -> None:
        self.loader, self.place, self.images = loader, place, images
        try:
            self.known: int | None = len(loader)
        except TypeError:
            self.known = None
        if length is None and self.known is None:
            raise DataError(
                "finetune needs to know how many steps an epoch has: pass a loader that has a length, or set "
                "TrainConfig.steps"
            )
        if self.known == 0:
            raise DataError("the training loader has no batch: it needs at least one")
        self.length = length or self.known or 0
        #: which pass this is, batches drawn of it, and the random numbers that it began with
        self.turn, self.within, self.random = 0, 0, dict[str, Any]()
        self.flow: Iterator[Any] | None = None

    @property
    def _rows(self) -> Images | None:
        dataset = getattr(self.loader, "dataset", None)
        return dataset if isinstance(dataset, Images) else None

    def unreadable(self) -> list[int]:
        """Return which images of a data set could not be read so far, by this process; of a stream, in one pass."""
        if isinstance(self.place, Stream):
            return list(range(int(self.place.unreadable.sum())))
        return [] if self._rows is None else self._rows.unreadable.nonzero().flatten().tolist()

    def set_unreadable(self, places: list[int]) -> None:
        """Count these images as those that could not be read."""
        if self._rows is not None:
            self._rows.unreadable[places] = True

    def digest(self) -> str:
        """Tell data sets apart that have as many images; empty where that would take reading them."""
        return "" if self._rows is None else self._rows.digest()

    def _own_generators(self) -> list[torch.Generator]:
        loader = self.loader if isinstance(self.loader, DataLoader) else None
        samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
        found = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
        found.append(getattr(loader, "synchronized_generator", None))  # Accelerate's
        return [one for one in found if isinstance(one, torch.Generator)]

    def generators(self) -> list[Tensor]:
        """Return where the loader's own sources of randomness are."""
        return [generator.get_state() for generator in self._own_generators()]

    def set_generators(self, states: list[Tensor]) -> None:
        """Put them back there."""
        for generator, state in zip(self._own_generators(), states, strict=True):
            generator.set_state(state)

    def state(self) -> dict[str, Any]:
        """Return where the passes are."""
        return {"turn": self.turn, "within": self.within, "random": self.random, "loader": self.generators()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.turn, self.within, self.random = state["turn"], state["within"], state["random"]
        self.set_generators(state["loader"])

    def draw(self, done: int) -> Iterator[Any]:
        """Go through the batches of an epoch that are not done.

        Raises:
            CheckpointError: where the data are not those of the run that goes on.
            DataError: where the loader has no batch.
        """
        for _ in range(self.length - done):
            yield self._next()
        if self.within == self.known:
            self._finish()

    def _next(self) -> Any:
        if self.within == self.known:
            self._finish()
        while True:
            batch = next(self._flow(), END)
            if batch is not END:
                self.within += 1
                return batch
            if not self.within:
                raise self._empty()
            if self.known is not None and self.within < self.known:
                self._warn(f"ends after {self.within}: it starts over there")
            self._turn_over()

    def _empty(self) -> DataError:
        if self.turn:
            return DataError(
                "the training loader gives no batch when it is started over: pass one that does, not an iterator"
            )
        if isinstance(self.place, Stream):
            return DataError(
                f"the stream has fewer images than the batch of {self.images} needs, for each of the loader's workers: "
                "lower batch_size or workers"
            )
        return DataError("the training loader has no batch: it needs at least one")

    def _finish(self) -> None:
        """End a pass that has come to its length; what lies behind is never seen."""
        if next(self._flow(), END) is not END:
            self._warn("goes on after them: the rest of its batches is left out")
        self._turn_over()

    def _turn_over(self) -> None:
        self.turn, self.within, self.flow = self.turn + 1, 0, None

    def _warn(self, what: str) -> None:
        warnings.warn(f"the training loader says that it has {self.known} batches, and {what}", stacklevel=2)

    def _flow(self) -> Iterator[Any]:
        """Return the pass that is under way, from its next batch on."""
        if self.flow is None:
            if not self.within:
                self.random = {"process": checkpoints.random_state(), "loader": self.generators()}
            self.flow = self._from_here()
        return self.flow

    def _from_here(self) -> Iterator[Any]:
        """Begin a pass, or go on with it.

        A data set's own loader goes to the place at once. Any other, and a stream, is drawn from up to there: the same
        batches come wherever their order follows from the random numbers that the pass began with.

        Raises:
            CheckpointError: where there are not as many.
        """
        if isinstance(self.place, Order):
            self.place.begin(self.turn, self.within * self.images)
            return iter(self.loader)
        if self.place is not None:
            self.place.begin(self.turn)
        if not self.within:
            return iter(self.loader)
        after = checkpoints.random_state()
        checkpoints.set_random_state(self.random["process"])
        self.set_generators(self.random["loader"])
        flow: Iterator[Any] = iter(self.loader)
        for at in range(self.within):
            if next(flow, END) is END:
                raise CheckpointError(
                    f"the checkpoint's run had drawn {self.within} batches of the data, and these end after {at}: go "
                    "on with the same data"
                )
        checkpoints.set_random_state(after)
        return flow
