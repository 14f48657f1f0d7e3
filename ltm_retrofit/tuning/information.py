"""What the classifier's feature knows of the image and of the class, estimated from what training passes by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.blocks import get_retrofit, masks_of
from ltm_retrofit.merging import ib
from ltm_retrofit.merging.memory import Memory
from ltm_retrofit.merging.statistics import of_all_ranks
from ltm_retrofit.tracing import MergeTrace

#: samples that an estimate is made of
SAMPLES = 1024


class Information:
    """Keeps features, inputs and classes of the latest images, and estimates the information bottleneck (METHOD).

    The input of an image is the mean of its patch embeddings: of what the first block of the first merging site's
    list reads. Both are clustered at the perplexity of the readout's statistics. Plug-in estimates are too high, I(a;b)
    by about (A − 1)(B − 1) / 2n nats: compare them within a run, or with the same numbers of clusters and samples.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        site, mask = next(iter(masks_of(model).items()))
        self.entrance, self.dim = entrance_of(model, site), mask.dim
        self.memory = Memory(SAMPLES)  # of inputs, features and soft labels
        self.latest: Tensor | None = None

    def listen(self) -> Any:
        """Remember the input of each forward pass; return the hook's handle."""

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            self.latest = None if tokens is None else self._mean(tokens.detach())

        return self.model.get_submodule(self.entrance).register_forward_pre_hook(keep, with_kwargs=True)

    def _mean(self, tokens: Tensor) -> Tensor:
        """Average over all but the batch and the width, which is the last dimension or, of a map, the second."""
        width = 1 if tokens.ndim == 4 and tokens.shape[1] == self.dim != tokens.shape[-1] else tokens.ndim - 1
        return tokens.movedim(width, -1).flatten(1, -2).float().mean(dim=1)

    @torch.no_grad()
    def add(self, traced: MergeTrace, targets: Tensor) -> None:
        """Remember a batch: the input of its forward pass, its feature, its soft labels ``(B, C)``."""
        if self.latest is None or len(self.latest) != len(targets):
            return
        self.memory.add(self.latest, traced.feature.float(), targets.float())

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


def entrance_of(model: nn.Module, site: str) -> str:
    """Name the first block of the list that a site's block is in; the block itself where it is in none."""
    parent, _, last = site.rpartition(".")
    if not last.isdigit() or not parent:
        return site
    first = next(iter(dict(model.get_submodule(parent).named_children())))
    return f"{parent}.{first}"
