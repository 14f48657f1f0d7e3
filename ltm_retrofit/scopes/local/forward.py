"""Scope LOCAL: an MLP sees merged tokens, and every token gets its group's update."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ltm_retrofit.errors import CountError, UnsupportedBlock
from ltm_retrofit.finding.call import hooks_of
from ltm_retrofit.finding.layouts import as_tokens, from_tokens, spatial_of
from ltm_retrofit.merging.tokens import Assignment, DenseAssignment, GridAssignment, fixed
from ltm_retrofit.scopes.base import Interceptor, unwatch, watch
from ltm_retrofit.scopes.local.site import Cells, LocalSite, choose_cell, names_of, side_tensors


class Open:
    """What the first module of a chain leaves for the last one: an attribute of the tensor that goes through."""

    NAME = "ltm_open"

    def __init__(self, cells: Cells, assignment: Assignment | DenseAssignment | GridAssignment, shape: tuple[int, ...]):
        self.cells, self.assignment, self.shape = cells, assignment, shape


class LocalForward(Interceptor):
    """Stands in for one module of a chain: the first merges, the last brings every token back.

    Args:
        block: the module it belongs to.
        site: the chain.
        host: the module on which the mask is registered.
        first: whether it is the first of the chain.
        last: whether it is the last one; both where the chain is one module.
        attention: the module before it, whose masks are watched.
    """

    shortens = False

    def __init__(
        self, block: nn.Module, site: LocalSite, host: nn.Module, *, first: bool, last: bool, attention: nn.Module
    ) -> None:
        super().__init__(block, site.block)
        self.attention, self.watching = attention, MaskWatch(attention, site, self)
        self.keeper, self.first, self.last = host, first, last
        self.order, self.layout, self.cell, self.dim = site.layout.order, site.layout, site.cell, site.dim
        self.bound = site.bound

    def put_in_place(self) -> None:
        """Intercept from now on."""
        super().put_in_place()
        watch(self.attention, self.watching)

    def take_away(self) -> None:
        """Leave the module and the attention as they were."""
        super().take_away()
        unwatch(self.attention, MaskWatch)

    @property
    def host(self) -> nn.Module:
        """The first module of the chain, or one in it where that is a container."""
        return self.keeper

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the module on merged tokens."""
        if self.mode != "merge":
            return self.original(x, *args, **kwargs)
        if self.first:
            x, opened = self.merge(x)
        else:
            opened = getattr(x, Open.NAME, None)
            if opened is None and not hasattr(x, Open.NAME):
                raise CountError(
                    f"a module of {self.name!r} received tokens without what the one before it knew of their merge: "
                    f"{' or '.join(hooks_of(self.block)) or 'something between them'} made a new tensor. Hooks that "
                    "put tensors in others' places work on the block as a whole"
                )
        out = self.original(x, *args, **kwargs)
        if not self.last:
            # on the tensor, not on the module: no state is left for threads or copies to share
            setattr(out, Open.NAME, opened)
            return out
        return out if opened is None else self.unmerge(out, opened)

    def cells(self, count: int, spatial: tuple[int, ...]) -> Cells:
        """Lay tokens out in cells: those of the plan at the planned size, else those that fit the size in hand."""
        layout = self.layout
        planned = layout.grid
        assert planned is not None
        if count == layout.tokens and (len(spatial) != 2 or spatial == planned):
            return Cells(count, layout.prefix, layout.trail, planned, self.cell)
        if self.bound:
            raise UnsupportedBlock(
                f"{self.name!r} was converted for {layout.tokens} tokens, of which its attention hides some from "
                f"others, and was called with {count}: which may be merged is known of the planned size only. Convert "
                "with an example of this size"
            )
        patches = max(0, count - layout.prefix - layout.trail)
        side = round(patches**0.5)
        grid = (side, side) if side * side == patches else (1, patches)
        if len(spatial) == 2:
            grid = (spatial[0], spatial[1])
        return Cells(count, layout.prefix, layout.trail, grid, choose_cell(grid, self.dim))

    def merge(self, x: Tensor) -> tuple[Tensor, Open | None]:
        """Merge within cells; fewer tokens than can be merged pass unchanged."""
        spatial = tuple(fixed(size) for size in spatial_of(tuple(x.shape), self.order))
        tokens = as_tokens(x, self.order)
        cells = self.cells(prod(spatial), spatial)
        if cells.per_sequence < 1 or cells.size < 2:
            return x, None
        lead, middle, rest = cells.apart(tokens)
        mask = self.mask
        assert mask is not None
        # one descriptor for each sequence: how many of them (windows) an image has, another input size would change
        merged, _, merge = mask(middle, middle, None, None, cells.per_sequence)
        self.tell(merge)
        merged = merged.reshape(tokens.shape[0], -1, merged.shape[-1])
        short = torch.cat([lead, merged, rest], dim=1)
        opened = Open(cells, merge.assignment, spatial)
        return from_tokens(short, self.order, (*[1] * (len(spatial) - 1), short.shape[1])), opened

    def unmerge(self, out: Tensor, opened: Open) -> Tensor:
        """Give every token its group's result."""
        cells = opened.cells
        lead, middle, rest = cells.ends(as_tokens(out, self.order))
        middle = opened.assignment.unmerge(middle.reshape(-1, middle.shape[1] // cells.per_sequence, middle.shape[2]))
        return from_tokens(cells.together(lead, middle, rest), self.order, opened.shape)


class MaskWatch:
    """A forward pre-hook of an attention: refuses masks that mark padding, which the MLP behind would merge.

    That there is a hook also keeps `nn.TransformerEncoderLayer` from its fused inference path, which calls none of its
    children, so that nothing would be merged.

    Args:
        attention: the module.
        site: what was found behind it.
        forward: the interceptor that merges there; its mode says whether it does.
    """

    def __init__(self, attention: nn.Module, site: LocalSite, forward: LocalForward) -> None:
        self.name, self.forward, self.names = site.attention, forward, names_of(attention)
        self.free, self.fixed = site.side_inputs.free, dict(site.side_inputs.fixed)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call.

        Raises:
            UnsupportedBlock: where it holds a tensor that may mark padding: one that the example's call had not, or
                not with that value.
        """
        if self.forward.mode != "merge":
            return
        for value in args:
            if isinstance(value, Tensor) and value.is_nested:
                raise UnsupportedBlock(self._refusal("a nested tensor (nn.TransformerEncoder makes one of a mask)"))
        for path, value in side_tensors(self.names, args, kwargs):
            expected = self.fixed.get(path)
            if path in self.free or value.is_meta or (expected is None and value.ndim == 0):  # a size, while traced
                continue
            said = f"{path}={tuple(value.shape)}, which may hide tokens"
            if expected is None and value.ndim < 2:
                raise UnsupportedBlock(self._refusal(said))
            same = (value == (value.flatten()[:1] if expected is None else expected)).all()
            if torch.compiler.is_compiling():  # no value may be read: the graph checks it when it runs
                torch._assert_async(same, self._refusal(said))
            elif not bool(same):
                raise UnsupportedBlock(self._refusal(said))

    def _refusal(self, given: str) -> str:
        return (
            f"attention {self.name!r} was called with {given}; {self.forward.name!r} behind it merges tokens in scope "
            "LOCAL, where padding would be merged with the rest: pass images without padding, convert in scope FLOW, "
            "or call the model within `with ltm_retrofit.disabled(model):`"
        )
