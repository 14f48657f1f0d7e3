"""Allocating tokens to sites: as good as trying everything, on problems small enough to try everything."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltm_retrofit.scopes.flow.allocate import STEPS, Curve, allocate, levels

BLOCKS: list[Any] = [SimpleNamespace(block=f"blocks.{place}") for place in range(4)]
COUNTS = [17, 12, 8, 4]
SINGLE = {"blocks.1": 1.0, "blocks.2": 0.7, "blocks.3": 0.2}  # blocks.0 may not merge


def curves(scale: Mapping[str, float], power: float) -> dict[str, Curve]:
    return {
        block: Curve(17, {count: factor * ((17 - count) / 17) ** power for count in COUNTS[1:]})
        for block, factor in scale.items()
    }


def price(site: Any, before: int, after: int) -> int:
    """Costs of a block that has 1,000 MACs a token in each half, and a mask of 50 a token."""
    return 1000 * (before + after - 34) + (50 * before if after < before else 0)


def brute(curve: Mapping[str, Curve], saving: int, used: int) -> float:
    """Return the smallest loss of all plans with so many sites that save enough."""
    best = np.inf
    for counts in product(COUNTS, repeat=len(BLOCKS)):
        present, macs, lost, merged = 17, 0, 0.0, 0
        for site, count in zip(BLOCKS, counts, strict=True):
            if count > present or (count < present and site.block not in curve):
                break
            macs += price(site, present, count)
            if count < present:
                here = curve[site.block]
                lost, merged = lost + max(0.0, float(here([count])[0] - here([present])[0])), merged + 1
            present = count
        else:
            if merged == used and -macs >= saving:
                best = min(best, lost)
    return best


def lost_by(curve: Mapping[str, Curve], plan: Mapping[str, int]) -> float:
    lost, present = 0.0, 17
    for block, count in sorted(plan.items()):
        lost += max(0.0, float(curve[block]([count])[0] - curve[block]([present])[0]))
        present = count
    return lost


def saved_by(plan: Mapping[str, int]) -> int:
    present, macs = 17, 0
    for site in BLOCKS:
        after = plan.get(site.block, present)
        macs, present = macs + price(site, present, after), after
    return -macs


@settings(max_examples=60, deadline=None)
@given(
    scale=st.fixed_dictionaries({block: st.floats(0.01, 3) for block in SINGLE}),
    power=st.floats(1, 4),
    saving=st.integers(1, 70),
)
def test_it_finds_what_trying_everything_finds(scale: dict[str, float], power: float, saving: int) -> None:
    curve, wanted = curves(scale, power), 1000 * saving
    found = {len(plan): plan for plan in allocate(BLOCKS, curve, price, COUNTS, wanted, 3)}
    for used in (1, 2, 3):
        # savings are rounded down block by block: what needs the last of a step may be missed
        easy, hard = brute(curve, wanted, used), brute(curve, wanted + wanted * len(BLOCKS) // STEPS + 1, used)
        if used not in found:
            assert hard == np.inf
            continue
        assert saved_by(found[used]) >= wanted
        assert easy - 1e-9 <= lost_by(curve, found[used]) <= hard + 1e-9


def test_where_a_merge_loses_nothing_it_happens() -> None:
    (plan,) = allocate(BLOCKS, curves({**SINGLE, "blocks.2": 0.0}, 2), price, COUNTS, 20_000, 1)
    assert plan == {"blocks.2": 8}


def test_fewer_tokens_never_lose_less() -> None:
    curve = Curve(17, {12: 0.4, 8: 0.3, 4: 0.9})  # noise
    losses = curve(list(range(17, 1, -1)))
    assert losses[0] == 0 and (np.diff(losses) >= 0).all() and losses[5] == losses[9] == pytest.approx(0.4)
    assert losses[-1] > 0.9, "below the last count that was measured, the line goes on"


@pytest.mark.parametrize("tokens, prefix", [(257, 1), (17, 1), (5, 0), (261, 5)])
def test_counts_fall_from_all_tokens_to_more_than_the_prefix(tokens: int, prefix: int) -> None:
    counts = levels(tokens, prefix)
    assert counts[0] == tokens and counts[-1] > prefix and counts == sorted(set(counts), reverse=True)
