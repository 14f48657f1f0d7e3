"""What do several conversions of one model gain, and what do they lose? Accuracy against MACs and time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ltm_retrofit.calibrate import difference
from ltm_retrofit.config import LTMConfig
from ltm_retrofit.convert import restore, retrofit
from ltm_retrofit.converted.record import get_plan, is_retrofitted
from ltm_retrofit.converted.resizing import present_example
from ltm_retrofit.errors import AlreadyRetrofitted, RecipeError, RetrofitError
from ltm_retrofit.finding.example import Example, repeat_batch
from ltm_retrofit.reporting.bench import paired_latency
from ltm_retrofit.reporting.report import AT_ONCE, columns, describe, hardware, markdown
from ltm_retrofit.tuning.classes import answers, itself
from ltm_retrofit.tuning.data import Data


@dataclass(frozen=True)
class Point:
    """One conversion beside the original.

    ``change`` is of top-1 in points, ``kl`` the mean Kullback-Leibler divergence of its answers from the original's, in
    nats; each has its standard error over the images, that of ``change`` paired. ``time`` is the ratio of a pass to the
    original's in the same run: median and quartiles.
    """

    method: str
    schedule: str
    budget: float
    share: float
    tokens: tuple[int, ...]
    change: float
    change_error: float
    kl: float
    kl_error: float
    time: tuple[float, float, float]

    @property
    def asked(self) -> tuple[str, str, float]:
        """What it is a measurement of."""
        return self.method, self.schedule, self.budget

    @property
    def name(self) -> str:
        """What its line is called."""
        return self.method if self.schedule == LTMConfig.schedule else f"{self.method}, {self.schedule}"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """Build a point from what `Frontier.to_dict` says of it."""
        return cls(**{**values, "tokens": tuple(values["tokens"]), "time": tuple(values["time"])})


@dataclass(frozen=True)
class Frontier:
    """Several conversions of one model, measured on the same images.

    Args:
        model: what it is called.
        hardware: on which times were taken.
        split: what the images are called.
        images: how many there are.
        batch: images in a timed pass.
        top1: of the original, in percent.
        points: what was measured.
        left_out: what could not be, and why.
    """

    model: str
    hardware: str
    split: str
    images: int
    batch: int
    top1: float
    points: list[Point] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def rows(self) -> list[list[str]]:
        """Return a table of text, the first line its columns' names."""
        lines = [["", "MACs", f"time, batch {self.batch}", "top-1", "change", "KL to the original"]]
        lines.append(["original", "×1.000", "×1.00", f"{self.top1:.2f} %", "", ""])
        for point in sorted(self.points, key=lambda point: (-point.budget, point.name)):
            lines.append(
                [
                    f"{point.name}, {point.budget:g}",
                    f"×{point.share:.3f}",
                    "×{:.2f} ({:.2f} to {:.2f})".format(*point.time),
                    f"{self.top1 + point.change:.2f} %",
                    f"{point.change:+.2f} ± {point.change_error:.2f}",
                    f"{point.kl:.4f} ± {point.kl_error:.4f}",
                ]
            )
        return lines

    def __str__(self) -> str:
        """Return the table as text."""
        return "\n\n".join([self._title(), columns(self.rows()), *filter(None, ["\n".join(self.left_out)])])

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        notes = "\n".join(f"- {said}" for said in self.left_out)
        return "\n\n".join(filter(None, [self._title(), markdown(self.rows()), "![](compare.png)", notes])) + "\n"

    def write(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Write compare.json, compare.md and compare.png into a folder that is there."""
        values = {**self.to_dict(), **extra, "files": ["compare.json", "compare.md", "compare.png"]}
        Path(folder, "compare.json").write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
        Path(folder, "compare.md").write_text(self.to_markdown(), encoding="utf-8")
        self.draw().savefig(Path(folder, "compare.png"), dpi=120)

    def draw(self) -> Figure:
        """Draw top-1 against time, a line a method; the bars are one standard error of the change."""
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.axhline(self.top1, color="0.6", linestyle=":", zorder=1)
        axes.annotate("original", (1.0, self.top1), (0, 5), textcoords="offset points", ha="right", color="0.4")
        axes.plot([1.0], [self.top1], "o", color="0.4")
        names = list(dict.fromkeys(point.name for point in self.points))
        for place, name in enumerate(names):
            own = sorted((p for p in self.points if p.name == name), key=lambda point: point.share)
            times, right = [point.time[0] for point in own], [self.top1 + point.change for point in own]
            axes.errorbar(
                times, right, [point.change_error for point in own], fmt="o-", capsize=3, color=f"C{place}", label=name
            )
            for point, x, y in zip(own, times, right, strict=True):
                text = f"×{point.share:.2f} of the MACs" if point is own[0] and not place else f"×{point.share:.2f}"
                axes.annotate(
                    text, (x, y), (6, -12 if place % 2 else 6), textcoords="offset points", color=f"C{place}", size=8
                )
        axes.set_xlabel(f"time of a pass, batch {self.batch}, share of the original's")
        axes.set_ylabel("top-1, %")
        axes.set_title(f"{self.model}: {self.images} images", size=10)
        axes.spines[["top", "right"]].set_visible(False)
        if names:
            axes.legend(frameon=False, loc="lower right")
        return figure

    def _title(self) -> str:
        return f"{self.model} on {self.hardware}; {self.images} images: {self.split}. Nothing was tuned"


def frontier(
    model: nn.Module,
    data: Data,
    *,
    budgets: Sequence[float],
    methods: Sequence[str] = ("ltm",),
    schedules: Sequence[str] = (LTMConfig.schedule,),
    images: Example | None = None,
    split: str = "",
    batch: int = 8,
    rounds: int = 10,
    known: Iterable[Point] = (),
    say: Callable[[str], object] = str,
) -> Iterator[Frontier]:
    """Convert a model in each way, measure it and restore it; the model ends as it began.

    Args:
        model: not converted, with a classifier.
        data: a data set or loader with labels, in the same order each time.
        budgets: shares of the MACs to keep.
        methods: names in the registry.
        schedules: as for `LTMConfig`.
        images: what ``"calibrated"`` chooses by, see `make_plan`.
        split: what the data are called.
        batch: images in a timed pass.
        rounds: of timing, in alternation with the original.
        known: points of an earlier run with the same model and data, which are not measured again.
        say: receives a line for each result, as it comes.

    Yields:
        all that is known, after each point.

    Raises:
        AlreadyRetrofitted: `restore` the model first.
        RecipeError: where nothing is asked for.
        DataError, TrainingError: as from `evaluate`.

    Example:
        >>> import timm, torch
        >>> from ltm_retrofit.reporting.frontier import frontier
        >>> tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
        >>> model = timm.create_model("vit_tiny_patch16_224", **tiny)
        >>> data = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 7)]
        >>> *_, found = frontier(model, data, budgets=[0.8, 0.6], rounds=3)
        >>> [point.budget for point in found.points]
        [0.8, 0.6]
    """
    if is_retrofitted(model):
        raise AlreadyRetrofitted("conversions are compared from the original on: restore the model first")
    asked = list(dict.fromkeys(product(methods, schedules, budgets)))
    if not asked:
        raise RecipeError("nothing to compare: name a budget, a method and a schedule")
    points = {point.asked: point for point in known}
    original, labels = _answered(model, data)
    truths = original.argmax(dim=1) == labels
    top1 = 100 * float(truths.float().mean())
    say(f"original                     top-1 {top1:.2f} % of {len(labels)} images")
    left_out: list[str] = []
    example = repeat_batch(present_example(model), batch)
    for method, schedule, budget in asked:
        key, called = (method, schedule, budget), f"{method}, {schedule}, {budget:g}"
        if key not in points:
            try:
                config = LTMConfig(flops=budget, method=method, schedule=schedule)
                retrofit(model, config, images=images)
            except RetrofitError as error:
                left_out.append(f"{called}: {error}")
                say(left_out[-1])
                continue
            try:
                time = paired_latency(model, example, rounds=rounds).ratio
                assert time is not None  # a converted model has one
                plan, (logits, _) = get_plan(model), _answered(model, data)
            finally:
                restore(model)
            lost = _differs(original, logits, truths, labels)
            points[key] = Point(*key, plan.share, plan.tokens, *lost, time)
        point = points[key]
        told = f"top-1 {point.change:+.2f} ± {point.change_error:.2f}, KL {point.kl:.4f} ± {point.kl_error:.4f}"
        say(f"{called:28} ×{point.share:.3f} of the MACs, ×{point.time[0]:.2f} of the time, {told}")
        kept = [points[key] for key in asked if key in points]
        yield Frontier(
            describe(model), hardware(model), split or "those given", len(labels), batch, top1, kept, [*left_out]
        )


def _answered(model: nn.Module, data: Data) -> tuple[Tensor, Tensor]:
    """Return logits ``(n, C)`` and labels ``(n,)``."""
    found = [(logits.cpu(), labels.cpu()) for (logits,), labels in answers(model, [itself(model)], data, AT_ONCE)]
    logits, labels = map(torch.cat, zip(*found, strict=True))
    return logits, labels


def _differs(before: Tensor, after: Tensor, truths: Tensor, labels: Tensor) -> tuple[float, float, float, float]:
    """Return the change of top-1 in points and the divergence in nats, each with its standard error."""
    change = 100 * ((after.argmax(dim=1) == labels).float() - truths.float())
    by = difference([before], [after]).by
    spread = [float(each.std(correction=0)) / math.sqrt(len(each)) for each in (change, by)]
    return float(change.mean()), spread[0], float(by.mean()), spread[1]
