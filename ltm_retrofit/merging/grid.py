"""Old names, until their callers have moved."""

from __future__ import annotations

from ltm_retrofit.merging.mask import GridMask
from ltm_retrofit.merging.methods import Grid
from ltm_retrofit.merging.pool import PoolGrid, grid_at, grid_overlaps
from ltm_retrofit.merging.slice import CropGrid

__all__ = ["CropGrid", "GridMask", "PoolGrid", "grid_at", "grid_macs", "grid_overlaps"]


def grid_macs(method: str, dim: int, key_dim: int, grid: Grid, kept: Grid, classes: int, clusters: int) -> int:
    """Return the multiply-adds of one grid mask for one image."""
    places, width = grid_overlaps(grid, kept)[0].shape
    if method == "slice":
        return 0
    if method == "pool":
        return int(places * width * dim)
    tokens = grid[0] * grid[1]
    keys = tokens * dim * key_dim + places * width * key_dim
    return int(keys + places * width * dim + 2 * tokens * dim + 2 * clusters * (dim + classes))
