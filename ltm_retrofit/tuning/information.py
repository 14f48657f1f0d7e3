"""What the classifier's feature knows of the image and of the class, estimated from what training passes by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.converted.record import get_retrofit, masks_of
from ltm_retrofit.merging import ib
from ltm_retrofit.merging.memory import Memory
from ltm_retrofit.merging.statistics import of_all_ranks
from ltm_retrofit.tracing import MergeTrace

#: samples that an estimate is made of
SAMPLES = 1024


class Information:
    """Keeps features, inputs and classes of the latest images, and estimates the information bottleneck (METHOD).

    The input of an image is the mean of its patch embeddings: of what the first block of the first merging site's
    list reads, or, where that folds images into the batch, what the nearest module around it reads. Both are clustered
    at the perplexity of the readout's statistics. Plug-in estimates are too high, I(a;b) by about (A − 1)(B − 1) / 2n
    nats: compare them within a run, or with the same numbers of clusters and samples.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        site, mask = next(iter(masks_of(model).items()))
        statistics: Any = mask.statistics
        self.entrances, self.dim = entrances_of(model, site), statistics.centroids.shape[1]
        self.memory = Memory(SAMPLES)  # of inputs, features and soft labels
        self.latest: dict[str, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Remember the input of each forward pass, while inside."""

        def keep(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if tokens is not None and tokens.ndim > 2 and name in self.entrances:
                self.latest[name] = self._mean(tokens.detach())

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True)
            for name in self.entrances
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mean(self, tokens: Tensor) -> Tensor:
        """Average over all but the batch and the width, which is the last dimension or, of a map, the second."""
        shape = tokens.shape
        if tokens.ndim != 4:
            width = tokens.ndim - 1
        elif self.dim in (shape[1], shape[3]):
            width = 3 if shape[3] == self.dim else 1
        else:
            width = 1 if shape[2] == shape[3] else 3
        return tokens.movedim(width, -1).flatten(1, -2).float().mean(dim=1)

    @torch.no_grad()
    def add(self, traced: MergeTrace, targets: Tensor) -> None:
        """Remember a batch: the input of its forward pass, its feature, its soft labels ``(B, C)``."""
        fitting = [name for name in self.entrances if len(self.latest.get(name, ())) == len(targets)]
        if fitting:
            self.entrances = fitting[:1]  # the same from now on, and no other needs to be averaged
            self.memory.add(self.latest[fitting[0]], traced.feature.float(), targets.float())
        self.latest.clear()

    @torch.no_grad()
    def estimate(self) -> dict[str, float]:
        """Return ``ib``, ``i_input`` I(X̃;X), ``i_label`` I(X̃;Y) in nats, ``perplexity`` and ``beta``; {} before a fit.

        In distributed training all processes call it.
        """
        statistics = get_retrofit(self.model).readout
        if statistics is None or not bool(statistics.fitted) or not self.memory:
            return {}
        clusters, width = statistics.centroids.shape
        inputs, features, targets = self.memory.latest()
        rows, targets = of_all_ranks(torch.cat([inputs, features], dim=1), targets)
        inputs, features = rows[:, :-width], rows[:, -width:]
        places = ib.kmeans(inputs, clusters, generator=torch.Generator().manual_seed(0))
        beta = ib.beta_for_perplexity(inputs, places, statistics.target_perplexity)
        phi_x = ib.log_assign(inputs, places, beta).exp()
        phi = ib.log_assign(features, statistics.centroids, statistics.beta).exp()
        i_input, i_label = (value.item() for value in ib.informations(phi, phi_x, targets))
        return {
            "ib": i_input - i_label,
            "i_input": i_input,
            "i_label": i_label,
            "perplexity": statistics.perplexity(features).item(),
            "beta": statistics.beta.item(),
        }


def entrances_of(model: nn.Module, site: str) -> list[str]:
    """Name the first block of the list that a site's block is in, or the block itself, and the modules around it."""
    parent, _, last = site.rpartition(".")
    if last.isdigit() and parent:
        first = next(iter(dict(model.get_submodule(parent).named_children())))
        site = f"{parent}.{first}"
    parts = site.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
