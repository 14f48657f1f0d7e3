"""What a user may ask for: frozen, strict, versioned settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

from ltm_retrofit.errors import RecipeError, check_choice
from ltm_retrofit.merging.methods import Scope, method_names

SCHEDULES = ("auto", "stages", "every", "calibrated")
OUTPUT_TOKENS = ("auto", "full")


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `RecipeError` on the first of ``given`` that is not in ``known``, suggesting the nearest known key."""
    known = list(known)
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise RecipeError(f"{where}: unknown key {key!r}; {hint}")


class Strict:
    """`from_dict` that knows its keys and `to_dict` that it can read again, for frozen dataclasses."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping.

        Raises:
            RecipeError: where a key is unknown, or missing and without a default.
        """
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        check_keys(values, known, cls.__name__)
        needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
        if missing := [name for name in needed if name not in values]:
            raise RecipeError(f"{cls.__name__} lacks {', '.join(missing)}: it was cut off, or is not one of ours")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON and YAML can hold."""
        values = asdict(self)  # type: ignore[call-overload]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class LTMConfig(Strict):
    """What shall be merged, and how much. Exactly one of ``flops``, ``latency`` and ``tokens`` is given.

    Args:
        flops: target share of the whole model's MACs, masks included, at the example's size. The plan's share lies
            in ``[flops − 0.02, flops]``, otherwise there is a `BudgetError`.
        latency: target share of the original's median time of a forward pass, measured on this machine while planning.
        latency_batch: how many images at once that is measured with.
        tokens: token counts after each site in depth order, prefix tokens included.
        method: a name in the registry: ``"ltm"`` (learnable token merging), ``"tome"`` (the published parameter-free
            baseline), ``"pool"`` (average pooling to the same counts), ``"slice"`` (keep the first P tokens: the free
            lower limit, for measuring), or one of your own.
        schedule: which sites merge. ``"auto"``: in scope FLOW five of every twelve blocks, evenly spread before the
            last two, and from the first block on where ``flops`` is below 0.45; where ``tokens`` are given, as many
            sites as counts, evenly spread over the depth; in scope GRID as ``"stages"``. ``"stages"``: of the d blocks
            in scope FLOW or GRID the 0-based ⌊d/4⌋, ⌊d/2⌋, ⌊3d/4⌋. ``"every"``: every block. In scope LOCAL always
            every block. ``"calibrated"``: the plan that changes the answers to a few images least, see `make_plan`.
        sites: block names to choose from, instead of the schedule.
        scope: force one scope: ``"FLOW"`` (tokens stay merged), ``"GRID"`` (a smaller H'×W' grid goes on) or
            ``"LOCAL"`` (merged for the MLP only); the best that the proofs allow where left out.
        output_tokens: ``"auto"`` brings every token back after the last block where something reads them;
            ``"full"`` always does, for feature extraction.
        rounds: in how many rounds tokens leave at a site, of ``"ltm"``; the method's own number where left out.
        ib_step: whether the masks of ``"ltm"`` weigh tokens by a step down the bound (docs/method.md, item 5).

    Raises:
        RecipeError: where a value cannot be.

    Example:
        >>> import ltm_retrofit as ltm
        >>> config = ltm.LTMConfig(flops=0.7, method="tome")
        >>> config == ltm.LTMConfig.from_dict(config.to_dict())
        True
    """

    flops: float | None = None
    tokens: tuple[int, ...] | None = None
    latency: float | None = None
    latency_batch: int = 8
    method: str = "ltm"
    schedule: str = "auto"
    sites: tuple[str, ...] | None = None
    scope: str | None = None
    output_tokens: str = "auto"
    rounds: int | None = None
    ib_step: bool = False

    def __post_init__(self) -> None:
        """Check every value; nothing is corrected silently."""
        budget = {"flops": self.flops, "latency": self.latency, "tokens": self.tokens}
        if sum(value is not None for value in budget.values()) != 1:
            given = ", ".join(f"{name}={value!r}" for name, value in budget.items())
            raise RecipeError(f"give exactly one of flops, latency and tokens, got {given}")
        for name, what in (("flops", "MACs"), ("latency", "the time")):
            value = budget[name]
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < 1):
                raise RecipeError(f"{name} is the share of {what} to keep, between 0 and 1, got {value!r}")
        for name in ("tokens", "sites"):
            if (value := getattr(self, name)) is not None:
                if isinstance(value, str) or not isinstance(value, Sequence) or not value:
                    raise RecipeError(f"{name} must be a sequence with something in it, got {value!r}")
                object.__setattr__(self, name, tuple(value))
        if self.tokens is not None:
            if not all(type(count) is int and count > 0 for count in self.tokens):
                raise RecipeError(f"tokens must be positive whole numbers, one for each site, got {self.tokens!r}")
            if list(self.tokens) != sorted(self.tokens, reverse=True):
                raise RecipeError(f"token counts cannot grow from site to site, got {self.tokens!r}")
        if self.sites is not None and not all(isinstance(site, str) for site in self.sites):
            raise RecipeError(f"sites are names of blocks, got {self.sites!r}")
        for name in ("rounds", "latency_batch"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value > 0):
                raise RecipeError(f"{name} is a positive whole number, got {value!r}")
        check_choice(self.method, method_names(), "method")
        check_choice(self.schedule, SCHEDULES, "schedule")
        check_choice(self.output_tokens, OUTPUT_TOKENS, "output_tokens")
        if self.scope is not None:
            check_choice(self.scope, [scope.value for scope in Scope], "scope")
