"""What was found: data only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn

from ltm_retrofit.finding.call import Signature
from ltm_retrofit.merging.methods import Scope

if TYPE_CHECKING:
    from ltm_retrofit.scopes.flow.cut import Halves
    from ltm_retrofit.scopes.local.padding import Companions


def _nothing() -> Companions:
    from ltm_retrofit.scopes.local.padding import Companions

    return Companions()


@dataclass(frozen=True)
class TokenLayout:
    """How a block's tokens lie, one image.

    ``order`` is BNC, NBC (tokens before images), BHWC or BCHW; ``prefix`` tokens lead and ``trail`` tokens end each
    sequence; the patches between them lie in raster order of ``grid``. ``rows`` sequences of ``tokens`` lie side by
    side in the batch (MobileViT: 4).
    """

    tokens: int
    prefix: int
    grid: tuple[int, int] | None
    order: str = "BNC"
    trail: int = 0
    rows: int = 1


@dataclass(frozen=True)
class KeySource:
    """Where a block's keys come from, read off the gradient of the keys: rows of one affine map of ``h``.

    ``weight`` and ``bias`` are parameter paths below the block; ``bias`` is a constant tensor where no parameter is
    the bias, or None. ``rows[head]`` are the map's output features that make the head's key.
    """

    weight: str
    bias: str | Tensor | None
    rows: Tensor  # (heads, d) int64

    def mean_map(self, block: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return ``(W_m (d, D), b_m (d,) or None)``: the mean over heads of the block's present key map."""
        weight = block.get_parameter(self.weight)
        bias = block.get_parameter(self.bias) if isinstance(self.bias, str) else self.bias
        rows = self.rows.to(weight.device)
        mean = weight[rows].mean(dim=0)
        return mean, None if bias is None else bias.to(weight)[rows].mean(dim=0)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a block for one image: ``head(N)`` and ``tail(N)`` are ``fixed + linear·N + square·N²``."""

    head: tuple[int, int, int]
    tail: tuple[int, int, int]

    def __call__(self, tokens_in: int, tokens_out: int) -> int:
        """Return the block's MACs with ``tokens_in`` before and ``tokens_out`` after its mask."""
        return sum(
            fixed + linear * count + square * count * count
            for (fixed, linear, square), count in ((self.head, tokens_in), (self.tail, tokens_out))
        )


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """A block in which tokens may be merged, with all that was proven of it."""

    block: str
    attention: str
    kind: str  # the block's class name, for the reader
    dim: int
    layout: TokenLayout
    scope: Scope
    proofs: tuple[str, ...]
    key_dim: int
    heads: int | None = None
    macs: int = 0  # of the block, or of the part of it that merging makes cheaper
    bias: str | None = None  # the argument that is added to the attention's logits
    provenance: str = "traced"


@dataclass(frozen=True, kw_only=True)
class FlowSite(AttentionSite):
    """A block that may be cut between attention and MLP, after which the rest of the network takes fewer tokens."""

    cost: Cost
    signature: Signature
    halves: dict[tuple[bool, bool], Halves]  # (training, with attention bias)
    key: KeySource


@dataclass(frozen=True, kw_only=True)
class LocalSite(AttentionSite):
    """An MLP behind an attention: modules that treat each token alone, one handing its result to the next.

    Or, where it ``mixes``, the attention itself, which takes its tokens as a set.

    ``cell`` is the group of tokens, rows × columns of the grid, in which merging happens; ``weight`` names the first
    weight matrix that reads the tokens, below the first module.
    """

    chain: tuple[str, ...]
    host: str  # the module on which the mask is registered
    cell: tuple[int, int]
    cost: tuple[int, int, int]  # multiply-adds of the chain for N tokens: fixed + linear·N + square·N²
    width: int  # of the chain's output
    weight: str
    mixes: bool = False
    companions: Companions = field(default_factory=_nothing)  # what the attention got beside its tokens


@dataclass(frozen=True, kw_only=True)
class GridSite(AttentionSite):
    """A module whose 4-d input or output is the token map, after which the network runs on a smaller grid.

    ``segment`` holds the MACs from here to the next grid site, or to the end, by the grid that enters it.
    """

    where: str  # merge its "input" or its "output"
    weight: str  # the parameter that reads the map, below the model
    segment: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Ending:
    """What comes after the blocks: who reads the tokens, and the feature that the classifier reads."""

    prefix_only: bool  # proven: the model's output depends on the last block's prefix tokens only
    prefix_macs: int  # MACs after the blocks where only the prefix tokens are left, minus those with all of them
    readouts: tuple[str, ...]
    classes: int


@dataclass(frozen=True)
class Sites(Sequence[AttentionSite]):
    """The blocks in which tokens may be merged, in depth order; ``excluded`` says of each other attention why not.

    Each attention is listed once, in the best scope that the proofs allow; ``alternatives`` are the other scopes.
    """

    found: tuple[AttentionSite, ...]
    excluded: dict[str, str]
    total_macs: int
    ending: Ending
    input_size: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fixed_inputs: dict[str, Any] = field(default_factory=dict)  # what of the example is no image, `fixed_of`
    base: dict[str, str] = field(default_factory=dict)  # library, class and architecture of the model
    alternatives: tuple[AttentionSite, ...] = ()
    attentions: int = 0  # seen in one forward pass
    covered: int = 0  # of those: that a site makes cheaper, a grid site all those behind it
    narrowed: dict[str, str] = field(default_factory=dict)  # why a block is in no better scope

    @property
    def flow(self) -> tuple[FlowSite, ...]:
        """The sites in scope FLOW."""
        return tuple(site for site in (*self.found, *self.alternatives) if isinstance(site, FlowSite))

    @property
    def local(self) -> tuple[LocalSite, ...]:
        """The sites in scope LOCAL, alternatives included."""
        return tuple(site for site in (*self.found, *self.alternatives) if isinstance(site, LocalSite))

    @property
    def grid(self) -> tuple[GridSite, ...]:
        """The sites in scope GRID, alternatives included."""
        return tuple(site for site in (*self.found, *self.alternatives) if isinstance(site, GridSite))

    def why(self, block: str) -> str | None:
        """Return why a block, or the attention in it, is in no scope or in no better one."""
        reasons = {**self.narrowed, **self.excluded}
        return next((why for name, why in reasons.items() if name == block or name.startswith(f"{block}.")), None)

    def named(self, block: str) -> AttentionSite | None:
        """Return the site of this name: the best one, where there are several scopes."""
        return next((site for site in (*self.found, *self.alternatives) if site.block == block), None)

    @overload
    def __getitem__(self, index: int) -> AttentionSite: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[AttentionSite]: ...
    def __getitem__(self, index: int | slice) -> AttentionSite | Sequence[AttentionSite]:
        """Return a site by depth."""
        return self.found[index]

    def __len__(self) -> int:
        """Return how many blocks may be cut."""
        return len(self.found)

    def __iter__(self) -> Iterator[AttentionSite]:
        """Go through the sites in depth order."""
        return iter(self.found)

    def rows(self) -> list[dict[str, object]]:
        """Return one row a site, of plain values."""
        return [
            {
                "block": site.block,
                "attention": site.attention,
                "class": site.kind,
                "tokens": site.layout.tokens,
                "prefix": site.layout.prefix,
                "heads": site.heads,
                "dim": site.dim,
                "scope": site.scope.value,
                "proofs": "".join(site.proofs),
                "macs": site.macs,
                "size-aware attention": site.bias is not None,
                "provenance": site.provenance,
            }
            for site in self.found
        ]

    def __str__(self) -> str:
        """Return the table of sites."""
        block = max([len("block"), *(len(site.block) for site in self.found)])
        inner = max([len("attention"), *(len(site.attention) for site in self.found)])
        lines = [f"{'block':<{block}}  {'attention':<{inner}}  tokens  prefix  heads   dim  scope  proofs"]
        for site in self.found:
            lines.append(
                f"{site.block:<{block}}  {site.attention:<{inner}}  {site.layout.tokens:>6}  {site.layout.prefix:>6}  "
                f"{site.heads or '':>5}  {site.dim:>4}  {site.scope.value:<5}  {' '.join(site.proofs)}"
            )
        lines += [f"left out: {name}: {reason}" for name, reason in self.excluded.items()]
        return "\n".join(lines)
