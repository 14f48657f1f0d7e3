"""Epoch after epoch through the training data, from any place on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ltm_retrofit.errors import DataError
from ltm_retrofit.tuning import checkpoints
from ltm_retrofit.tuning.images import Images, Order, Stream


class Passes:
    """The epochs of a run.

    Args:
        loader: as Accelerate prepared it.
        place: what of a data set's own loader can be sent to an epoch; None of any other loader.
        length: batches in an epoch; None is all that the loader has.
        images: in a batch, in all processes.
        epochs: of the run.

    Raises:
        DataError: where the length is neither given nor known, or zero.
    """

    def __init__(
        self, loader: Any, place: Order | Stream | None, *, length: int | None, images: int, epochs: int
    ) -> None:
        self.loader, self.place, self.images, self.epochs = loader, place, images, epochs
        try:
            known = len(loader)
        except TypeError:
            known = None
        if length is None and known is None:
            raise DataError(
                "finetune needs to know how many steps an epoch has: pass a loader that has a length, or set "
                "TrainConfig.steps"
            )
        if known == 0:
            raise DataError("the training loader has no batch: it needs at least one")
        self.length = length or known or 0
        self.whole = self.length == known
        self.random: dict[str, Any] = {}  # what the epoch began with

    @property
    def _rows(self) -> Images | None:
        dataset = getattr(self.loader, "dataset", None)
        return dataset if isinstance(dataset, Images) else None

    def unreadable(self) -> list[int]:
        """Return which images of a data set could not be read so far, by this process; of a stream, in this pass."""
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

    def draw(self, epoch: int, done: int) -> Iterator[Any]:
        """Go through the batches of an epoch that are not done.

        A data set's own loader goes to the place at once. Any other is drawn from up to there: the same batches come
        wherever their order follows from the random numbers that the epoch began with.
        """
        if not done:
            self.random = {"process": checkpoints.random_state(), "loader": self.generators()}
        if isinstance(self.place, Order) and self.whole:
            self.place.begin(epoch, done * self.images)
            return iter(self.loader)
        if self.place is not None:
            self.place.begin(epoch)
        after = checkpoints.random_state()
        if done:
            checkpoints.set_random_state(self.random["process"])
            self.set_generators(self.random["loader"])
        drawn = iter(self.loader) if self.whole else islice(self._over_and_over(epoch), self.length)
        if done:
            for _ in range(done):
                next(drawn)
            checkpoints.set_random_state(after)
        return drawn

    def _over_and_over(self, epoch: int) -> Iterator[Any]:
        """Go through a loader as often as it takes; each time in another order where it is a data set's.

        Raises:
            DataError: where it has no batch.
        """
        while True:
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise DataError("the training loader has no batch: it needs at least one")
            epoch += self.epochs
            if self.place is not None:
                self.place.begin(epoch)
