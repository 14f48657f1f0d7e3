"""What was found: data only. What a scope must know of a site besides stands in its own `site.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, overload

from ltm_retrofit.finding.example import sizes_in_words
from ltm_retrofit.merging.methods import Scope


@dataclass(frozen=True)
class TokenLayout:
    """How a block's tokens lie, one image.

    ``order`` is BNC, NBC (tokens before images), BHWC or BCHW; ``prefix`` tokens lead and ``trail`` tokens end each
    sequence; the patches between them lie in raster order of ``grid``. ``sequences`` of ``tokens`` each lie side by
    side in the batch (MobileViT: 4).
    """

    tokens: int
    prefix: int
    grid: tuple[int, int] | None
    order: str = "BNC"
    trail: int = 0
    sequences: int = 1


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """A block in which tokens may be merged, with all that was proven of it."""

    #: fields that hold paths of modules
    paths: ClassVar[tuple[str, ...]] = ("block", "attention")

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

    @property
    def parts(self) -> tuple[str, ...]:
        """The modules that belong to one block of the model."""
        return (self.attention,)

    @property
    def spare(self) -> bool:
        """Whether it is chosen only where its attention has no other site in this scope."""
        return False


class Refused(NamedTuple):
    """Why a block or an attention has no site in a scope; the name ``""`` is the whole model."""

    name: str
    reason: str


class Found(NamedTuple):
    """What one scope found: the sites that serve an attention, by its number in the recording, and what it refused."""

    sites: dict[int, list[AttentionSite]]
    refused: list[Refused]


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
    sizes_said: dict[str, tuple[int, int]] = field(default_factory=dict)  # who says which (H, W), first who is followed
    base: dict[str, str] = field(default_factory=dict)  # library, class and architecture of the model
    alternatives: tuple[AttentionSite, ...] = ()
    attentions: int = 0  # seen in one forward pass
    covered: int = 0  # of those: that a site makes cheaper, a grid site all those behind it
    narrowed: dict[str, str] = field(default_factory=dict)  # why a block is not in the best scope

    @property
    def tokens(self) -> int | None:
        """How many tokens an image makes, where the first site is; None where there is none."""
        layout = self.found[0].layout if self.found else None
        return None if layout is None else layout.tokens * layout.sequences

    def of(self, scope: str) -> tuple[Any, ...]:
        """Return the sites in a scope, ``"FLOW"`` for one, alternatives included, each of the scope's own class."""
        return tuple(site for site in (*self.found, *self.alternatives) if site.scope == scope)

    def why(self, block: str) -> str | None:
        """Return why a block, or the attention in it, is in no scope or in no better one."""
        reasons = {**self.narrowed, **self.excluded}
        return next((why for name, why in reasons.items() if name == block or name.startswith(f"{block}.")), None)

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
        if self.sizes_said:
            lines.append(f"input {sizes_in_words(self.sizes_said, self.tokens)}")
        return "\n".join(lines)
