"""Keep the first tokens: the free lower limit, for measuring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError
from ltm_retrofit.merging.matching import kept_at
from ltm_retrofit.merging.methods import SCOPES, Grid, Keys, Method, Place
from ltm_retrofit.merging.pool import PoolGrid
from ltm_retrofit.merging.tokens import Assignment, GridAssignment, Mask, Merged, Step


class SliceMask(Mask):
    """Keep the first P tokens: the free lower limit, for measuring."""

    def __init__(self, tokens_in: int, tokens_out: int, prefix: int = 0) -> None:
        super().__init__()
        self.tokens_in, self.tokens_out, self.prefix = tokens_in, tokens_out, prefix

    def forward(
        self,
        inner: Tensor,
        tokens: Tensor,
        sizes: Tensor | None,
        key: tuple[Tensor, Tensor | None] | None = None,
        groups: int = 1,
        padded: bool = False,
    ) -> Merged:
        """Keep the first P tokens; unmerging gives every lost token the last kept one."""
        batch, count = tokens.shape[0], int(tokens.shape[1])
        stay = self.tokens_out
        if count != self.tokens_in:
            stay = kept_at(count, self.tokens_in, self.tokens_out, self.prefix)
        kept = tokens[:, :stay]
        places = torch.arange(count, device=tokens.device).expand(batch, -1)
        weights = tokens.new_ones(batch, count - stay, 1)
        assignment = Assignment(places[:, :stay], places[:, stay:], weights)
        return Merged(kept, torch.ones_like(kept[..., 0]), Step(assignment, None))


class CropGrid(PoolGrid):
    """Keep the upper left H'×W' tokens: the free lower limit, for measuring."""

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Step]:
        """Crop ``(B, H·W, D)`` tokens that lie row by row on ``grid``."""
        index, share, kept = self.boxes(tokens, grid)
        cropped = tokens.view(tokens.shape[0], *grid, self.dim)[:, : kept[0], : kept[1]].flatten(1, 2)
        return cropped, kept, Step(GridAssignment(index, share.expand(tokens.shape[0], -1, -1), tokens.shape[1]), None)


def _build(place: Place, keys: Keys) -> nn.Module:
    if place.grid is not None and place.kept is not None:
        return CropGrid(place.dim, place.grid, place.kept)
    return SliceMask(place.tokens_in, place.tokens_out, place.prefix)


def _macs(place: Place) -> int:
    if place.tokens_out < max(1, place.prefix):
        raise CountError(f"slicing to {place.tokens_out} tokens would cut prefix tokens ({place.prefix})")
    return 0


def _unmerge_macs(place: Place) -> int:
    width = place.width or place.dim
    if place.grid is not None:
        return place.tokens_in * place.tokens_out * width
    return place.groups * (place.tokens_in - place.tokens_out) * width


METHOD = Method("slice", 1, SCOPES, _build, _macs, _unmerge_macs)
