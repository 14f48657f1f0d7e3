"""``"slice"``: keep the first tokens and drop the rest. The free lower limit, for measuring what merging is worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError
from ltm_retrofit.merging.methods import SCOPES, Grid, Keys, Method, Place
from ltm_retrofit.merging.pool import PoolGrid
from ltm_retrofit.merging.tokens import Assignment, GridAssignment, Mask, Merge, Merged, dense_unmerge_macs, fixed


class SliceMask(Mask):
    """Keep the first P tokens."""

    def forward(self, inner: Tensor, tokens: Tensor, sizes: Tensor | None, *_: object, **__: object) -> Merged:
        """Keep the first P tokens; unmerging gives every lost token the last kept one. Arguments: see `Mask`."""
        batch, count = tokens.shape[0], fixed(tokens.shape[1])
        stay = self.kept_at(count)
        kept = tokens[:, :stay]
        places = torch.arange(count, device=tokens.device).expand(batch, -1)
        # Unmerging has to give every dropped token something. The last kept one stands for none of them in the
        # attention, so its size stays one.
        assignment = Assignment(places[:, :stay], places[:, stay:], tokens.new_ones(batch, count - stay, 1))
        return Merged(kept, torch.ones_like(kept[..., 0]), Merge(assignment))


class CropGrid(PoolGrid):
    """Keep the upper left H'×W' tokens."""

    def forward(self, tokens: Tensor, grid: Grid) -> tuple[Tensor, Grid, Merge]:
        """Crop ``(B, H·W, D)`` tokens that lie line by line on ``grid``."""
        index, share, grid_out = self.boxes(tokens, grid)
        cropped = tokens.view(tokens.shape[0], *grid, self.dim)[:, : grid_out[0], : grid_out[1]].flatten(1, 2)
        return cropped, grid_out, Merge(GridAssignment(index, share.expand(tokens.shape[0], -1, -1), tokens.shape[1]))


def _build(place: Place, keys: Keys) -> nn.Module:
    if place.grid is not None and place.grid_out is not None:
        return CropGrid(place.dim, place.grid, place.grid_out)
    return SliceMask(place.tokens_in, place.tokens_out, place.prefix)


def _macs(place: Place) -> int:
    """Nothing is multiplied."""
    if place.tokens_out < max(1, place.prefix):
        raise CountError(f"slicing to {place.tokens_out} tokens would cut prefix tokens ({place.prefix})")
    return 0


def _unmerge_macs(place: Place) -> int:
    """``(N − P)·D``: the last kept token, once for each that was dropped."""
    if place.grid is not None:
        return dense_unmerge_macs(place)
    return place.cells * (place.tokens_in - place.tokens_out) * (place.width or place.dim)


METHOD = Method("slice", 1, SCOPES, _build, _macs, _unmerge_macs)
