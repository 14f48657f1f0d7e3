"""How far has it come? A bar with rate and time left; where there is no terminal, a line now and then."""

from __future__ import annotations

import sys
from typing import Any

#: seconds for which nothing is shown: what is over by then needs no bar
DELAY = 2.0
#: seconds between two lines, where there is no terminal
EVERY = 15.0


def progress(what: str, total: float | None, unit: str, *, done: float = 0, on: bool = True) -> Any:
    """Return a bar of tqdm, shown on stderr after two seconds: a context, whose ``update(count)`` says what was done.

    Example:
        >>> from ltm_retrofit.progress import progress
        >>> with progress("adding", total=3, unit="numbers") as bar:
        ...     for number in (1, 2, 3):
        ...         bar.update(1)

    Args:
        what: what is being done.
        total: how much there is to do; None where nobody knows.
        unit: what is counted.
        done: how much of it was done before.
        on: whether anything is shown.
    """
    from tqdm.auto import tqdm

    terminal = sys.stderr is not None and sys.stderr.isatty()
    how = {"dynamic_ncols": True} if terminal else {"mininterval": EVERY, "maxinterval": 2 * EVERY, "ncols": 100}
    bar = tqdm if terminal else _lines()
    return bar(desc=what, total=total, initial=done, unit=f" {unit}", delay=DELAY, leave=False, disable=not on, **how)


def _lines() -> Any:
    """Return a bar that writes each of its states as a line of its own."""
    from tqdm.std import tqdm

    class Lines(tqdm):  # type: ignore[misc]
        """tqdm calls `display` to show a state, and with an empty text to wipe it away."""

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            text = str(self) if msg is None else msg
            if text:
                print(text, file=self.fp, flush=True)

    return Lines
