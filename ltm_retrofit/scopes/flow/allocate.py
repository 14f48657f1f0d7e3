"""How many tokens leave where, so that what is lost is least: exact for a sum of losses, by dynamic programming."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ltm_retrofit.scopes.flow.site import FlowSite

#: token counts that are looked at; and steps into which the MACs that must go are divided
COUNTS, STEPS = 48, 800

#: MACs of a site that turns n tokens into p, its mask included
Price = Callable[[FlowSite, int, int], int]


def levels(tokens: int, prefix: int, count: int = COUNTS) -> list[int]:
    """Return token counts from ``tokens`` down, evenly spaced, prefix tokens included."""
    counts = np.round(prefix + (tokens - prefix) * np.linspace(0.03, 1, count)).astype(int)
    return sorted({max(prefix + 1, int(each)) for each in counts}, reverse=True)


class Curve:
    """What is lost where one site alone leaves p tokens, between the counts at which that was measured.

    Losses are squares of small changes, so their roots are what is drawn straight lines between; below the lowest
    measured count the last line goes on. Fewer tokens never lose less.
    """

    def __init__(self, tokens: int, measured: Mapping[int, float]) -> None:
        points = sorted({tokens: 0.0, **measured}.items(), reverse=True)
        self.counts = np.array([count for count, _ in points][::-1], dtype=float)
        self.roots = np.sqrt(np.maximum.accumulate([loss for _, loss in points]))[::-1]

    def __call__(self, counts: Sequence[int]) -> np.ndarray:
        """Return the loss at each count."""
        p = np.asarray(counts, dtype=float)
        slope = (self.roots[0] - self.roots[1]) / (self.counts[1] - self.counts[0])
        roots = np.interp(p, self.counts, self.roots)
        return np.asarray(np.where(p < self.counts[0], self.roots[0] + slope * (self.counts[0] - p), roots) ** 2)


def allocate(
    sites: Sequence[FlowSite],
    curves: Mapping[str, Curve],
    price: Price,
    counts: Sequence[int],
    saving: int,
    most: int,
) -> list[dict[str, int]]:
    """Return for 1, 2, … ``most`` merging sites the counts that save enough and lose least, where there are any.

    A site that turns n tokens into p adds what it alone would lose with p, less what it alone would lose with n: for
    one site after the other at the same depth that is exact. The state after a block is (tokens that are left, MACs
    that were saved, sites that merged); every state keeps its smallest sum of losses.

    Args:
        sites: all blocks, in depth order.
        curves: of those that may merge, by block.
        price: MACs of a block, less what it costs in the original.
        counts: token counts to choose from, falling, the first is that before anything merged.
        saving: how many MACs must go.
        most: how many sites may merge.
    """
    unit = saving / STEPS
    losses = np.full((len(counts), STEPS + 1, most + 1), np.inf)
    losses[0, 0, 0] = 0
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for site in sites:
        after, before_count, before_saved = np.full_like(losses, np.inf), *np.full((2, *losses.shape), -1, np.int16)
        curve = curves[site.block](counts) if site.block in curves else None
        for a, n in enumerate(counts):
            if not np.isfinite(losses[a]).any():
                continue
            for b in range(a, len(counts) if curve is not None else a + 1):
                macs = price(site, n, counts[b])
                if macs > 0:
                    continue
                lost = max(0.0, curve[b] - curve[a]) if curve is not None and b > a else 0.0
                merges = int(b > a)
                # savings are rounded down, so that a plan that is found saves enough
                gained = min(int(-macs / unit), STEPS)
                moved = _shifted(losses[a, :, : most + 1 - merges] + lost, gained)
                better = moved[0] < after[b, gained:, merges:]
                after[b, gained:, merges:][better] = moved[0][better]
                before_count[b, gained:, merges:][better] = a
                before_saved[b, gained:, merges:][better] = moved[1][better]
        losses = after
        steps.append((before_count, before_saved))
    return [found for used in range(1, most + 1) if (found := _read_back(sites, counts, losses, steps, used))]


def _shifted(losses: np.ndarray, gained: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses by what is saved afterwards, from ``gained`` up, and where each came from.

    All that saves enough is one state, the last.
    """
    values = losses[: STEPS + 1 - gained].copy()
    origin = np.arange(len(values))[:, None].repeat(values.shape[1], axis=1)
    values[-1], origin[-1] = losses[STEPS - gained :].min(axis=0), losses[STEPS - gained :].argmin(axis=0)
    origin[-1] += STEPS - gained
    return values, origin


def _read_back(
    sites: Sequence[FlowSite],
    counts: Sequence[int],
    losses: np.ndarray,
    steps: Sequence[tuple[np.ndarray, np.ndarray]],
    used: int,
) -> dict[str, int]:
    """Return the counts on the way to the smallest loss with so many sites; none where there is no way."""
    place, saved, found = int(losses[:, STEPS, used].argmin()), STEPS, dict[str, int]()
    if not np.isfinite(losses[place, STEPS, used]):
        return {}
    for site, (before_count, before_saved) in zip(reversed(sites), reversed(steps), strict=True):
        state = (place, saved, used)
        place, saved = int(before_count[state]), int(before_saved[state])
        if place != state[0]:
            found[site.block] = counts[state[0]]
            used -= 1
    return found
