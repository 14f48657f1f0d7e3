"""Which mask a site gets, and what of the pretrained weights its similarity starts from."""

from __future__ import annotations

import torch
from torch import nn

from ltm_retrofit.finding.example import home
from ltm_retrofit.finding.layouts import principal_keys
from ltm_retrofit.merging.baselines import PoolMask, SliceMask, ToMeMask
from ltm_retrofit.merging.grid import CropGrid, GridMask, PoolGrid
from ltm_retrofit.merging.mask import MaskModule
from ltm_retrofit.plan import MergePlan
from ltm_retrofit.scopes.flow.site import FlowSite
from ltm_retrofit.scopes.grid.site import GridSite
from ltm_retrofit.scopes.local.budget import cells_of
from ltm_retrofit.scopes.local.site import LocalSite
from ltm_retrofit.scopes.rows import Row

MASKS = (MaskModule, ToMeMask, PoolMask, SliceMask, PoolGrid)
LEARNABLE = (MaskModule, GridMask)


def flow_mask(block: nn.Module, site: FlowSite, row: Row, plan: MergePlan) -> nn.Module:
    """Make the mask of a block that is cut; it compares tokens by the mean over heads of the block's own keys."""
    device, dtype = home(block)
    prefix, method = site.layout.prefix, plan.config.method
    if method != "ltm":
        return _baseline(method, site.dim, row.tokens_in, row.tokens_out, prefix).to(device).train(block.training)
    mask = MaskModule(
        site.dim, site.key_dim, row.tokens_in, row.tokens_out, prefix, max(1, plan.classes), plan.clusters
    ).to(device, dtype)
    weight, bias = site.key.mean_map(block)
    with torch.no_grad():
        mask.key.weight.copy_(weight)
        mask.key.bias.copy_(bias if bias is not None else torch.zeros_like(mask.key.bias))
    return mask.train(block.training)


def local_mask(model: nn.Module, site: LocalSite, row: Row, plan: MergePlan) -> nn.Module:
    """Make the mask of an MLP; it compares tokens by what the MLP's first weights make of them."""
    first = model.get_submodule(site.chain[0])
    device, dtype = home(first)
    count, size, rest = cells_of(site)
    kept, method = (row.tokens_out - rest) // count, plan.config.method
    weight = first.get_parameter(site.weight)
    keys = principal_keys(weight, site.key_dim)
    if method != "ltm":
        return _baseline(method, site.dim, size, kept, 0, keys).to(device).train(first.training)
    learned = MaskModule(site.dim, site.key_dim, size, kept, 0, max(1, plan.classes), plan.clusters).to(device, dtype)
    with torch.no_grad():
        learned.key.weight.copy_(keys)
        learned.key.bias.zero_()
    return learned.train(first.training)


def grid_mask(model: nn.Module, site: GridSite, row: Row, plan: MergePlan) -> nn.Module:
    """Make the mask of a token map; it compares tokens by what the first weights that read them make of them."""
    device, dtype = home(model)
    method, planned = plan.config.method, site.layout.grid
    assert planned is not None and row.grid is not None
    # earlier sites have made the map smaller
    rows = next(h for h, w in sorted(site.segment) if h * w == row.tokens_in)
    grid = (rows, row.tokens_in // rows)
    training = model.get_submodule(site.block).training
    if method in ("pool", "slice"):
        kind = PoolGrid if method == "pool" else CropGrid
        return kind(site.dim, grid, row.grid).to(device).train(training)
    mask = GridMask(site.dim, site.key_dim, grid, row.grid, max(1, plan.classes), plan.clusters).to(device, dtype)
    with torch.no_grad():
        mask.key.weight.copy_(principal_keys(model.get_parameter(site.weight), site.key_dim))
    return mask.train(training)


def _baseline(
    method: str, dim: int, tokens_in: int, tokens_out: int, prefix: int, keys: torch.Tensor | None = None
) -> nn.Module:
    if method == "slice":
        return SliceMask(tokens_in, tokens_out, prefix)
    if method == "pool":
        return PoolMask(tokens_in, tokens_out, prefix)
    return ToMeMask(dim, tokens_in, tokens_out, prefix, keys)
