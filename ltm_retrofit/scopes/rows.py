"""What one site does, and what every search for a budget has in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

CLUSTERS = 64  # A of every mask's statistics


@dataclass(frozen=True)
class Row:
    """What one site does: ``merge`` N tokens into P, or ``slice`` to the prefix tokens after the last attention.

    Counts are of one sequence of one image, prefix tokens included; ``grid`` is H'×W' in scope GRID.
    """

    site: str
    scope: str
    tokens_in: int
    tokens_out: int
    action: str = "merge"
    grid: tuple[int, int] | None = None


#: rows, and by how many MACs they change the model
Option = tuple[tuple[Row, ...], int]


class Budget(Protocol):
    """The search in one scope."""

    def search(self, change: int) -> Iterator[list[Option]]:
        """Yield batches of plans that change the MACs by about ``change`` (negative), simplest first."""
        ...

    def change(self, rows: Sequence[Row]) -> int:
        """Return by how many MACs rows change the model, masks included."""
        ...

    def from_tokens(self, tokens: Sequence[int]) -> tuple[Row, ...]:
        """Turn a user's counts into rows.

        Raises:
            CountError: where they do not fit the sites.
        """
        ...
