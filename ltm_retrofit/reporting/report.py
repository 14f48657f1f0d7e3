"""measure(): what a conversion gained and what it lost, as an object, a table, JSON and Markdown."""

from __future__ import annotations

import json
import platform
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ltm_retrofit.converted.record import (
    converted_part,
    disabled,
    forwards_of,
    get_plan,
    is_retrofitted,
    was_finetuned,
)
from ltm_retrofit.converted.resizing import present_example
from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.example import Example, home, prepare_example
from ltm_retrofit.macs import MacCount, count_macs
from ltm_retrofit.reporting.bench import batch_latencies
from ltm_retrofit.scopes.base import CHILD
from ltm_retrofit.tuning.classes import evaluate
from ltm_retrofit.tuning.data import Data

ACCURACIES = {
    "original": "original",
    "original_finetuned": "original, same fine-tune",
    "converted": "converted",
    "finetuned": "converted, fine-tuned",
    "sliced_finetuned": "sliced to the same counts, same fine-tune",
}


@dataclass(frozen=True)
class Report:
    """What was measured. What was not is None, never zero. Accuracies in percent, latencies in milliseconds.

    Example:
        >>> import timm
        >>> import ltm_retrofit as ltm
        >>> tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
        >>> report = ltm.measure(timm.create_model("vit_tiny_patch16_224", **tiny), batches=())
        >>> report.macs["original"], report.macs["converted"], report.accuracy["original"]
        (2138832, None, None)
    """

    model: str
    hardware: str
    macs: dict[str, int | None]
    params: dict[str, int | None]
    latency_ms: dict[str, dict[int, float] | None]
    latency_ratio: dict[int, tuple[float, float, float]] | None
    merging_share: dict[int, float] | None
    accuracy: dict[str, float | None]
    modules: dict[str, dict[str, int] | None]
    plan: dict[str, Any] | None
    extra: dict[str, Any] = field(default_factory=dict)

    def with_accuracy(self, **entries: float) -> Report:
        """Return the same report with more accuracies, each measured in its time."""
        return replace(self, accuracy={**self.accuracy, **entries})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; ``extra`` (a recipe's run puts its recipe there) stands beside the rest."""
        values = asdict(self)
        return {**values.pop("extra"), **values}

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        """Return the tables as text."""
        return "\n\n".join([f"{self.model} on {self.hardware}", *map(_columns, self._tables())])

    def to_markdown(self) -> str:
        """Return the tables in Markdown, that of the plan included."""
        tables = self._tables()
        if self.plan is not None:
            rows = self.plan["rows"]
            shown = [[r["site"], r["scope"], f"{r['tokens_in']} → {r['tokens_out']}", r["action"]] for r in rows]
            tables.append([["site", "scope", "tokens", "action"], *shown])
        return "\n\n".join([f"{self.model} on {self.hardware}", *map(_markdown, tables)]) + "\n"

    def _tables(self) -> list[list[list[str]]]:
        """Return what was measured as tables of text, the first line of each its columns' names."""
        tables = [[["", "original", "converted", "ratio (quartiles)"], *self._costs()]]
        if accuracies := self._accuracies():
            tables.append([["accuracy", "top-1", "to the better original"], *accuracies])
        return tables

    def _costs(self) -> list[list[str]]:
        original, converted = self.macs["original"], self.macs["converted"]
        share = "" if converted is None or original is None else f"×{converted / original:.3f}"
        before, after = self.params["original"], self.params["converted"]
        lines = [
            ["GMACs, one image", _shown(original, 1e9), _shown(converted, 1e9), share],
            ["parameters, M", _shown(before, 1e6), _shown(after, 1e6), ""],
        ]
        ours = self.latency_ms["converted"]
        for batch, time in (self.latency_ms["original"] or {}).items():
            ratio = "" if not self.latency_ratio else "×{:.2f} ({:.2f} to {:.2f})".format(*self.latency_ratio[batch])
            lines.append([f"latency, batch {batch}, ms", f"{time:.1f}", f"{ours[batch]:.1f}" if ours else "—", ratio])
        return lines

    def _accuracies(self) -> list[list[str]]:
        measured = {key: value for key, value in self.accuracy.items() if value is not None}
        # the fair comparison: fine-tuning alone may have made the original better, or worse
        best = max((measured[key] for key in ("original", "original_finetuned") if key in measured), default=None)
        lines = []
        for key, label in ACCURACIES.items():
            if key in measured:
                gap = "" if best is None or key.startswith("original") else f"{measured[key] - best:+.2f}"
                lines.append([label, f"{measured[key]:.2f} %", gap])
        return lines


def measure(
    model: nn.Module,
    example: Example | None = None,
    *,
    data: Data | None = None,
    batches: tuple[int, ...] = (1, 8, 32),
    rounds: int = 10,
) -> Report:
    """Measure a model, converted or not: MACs (of one image), parameters, paired latency, accuracy.

    Args:
        model: the model.
        example: as for `find_sites`.
        data: a data set or loader; fills the one entry of ``accuracy`` that the model in hand is.
        batches: batch sizes to time; empty to leave latency out.
        rounds: timed passes at each batch size.

    Raises:
        CountError: where two counters disagree, or the counted MACs are not the planned ones.

    Example:
        >>> import timm
        >>> import ltm_retrofit as ltm
        >>> tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
        >>> model = ltm.retrofit(timm.create_model("vit_tiny_patch16_224", **tiny), ltm.LTMConfig(flops=0.8))
        >>> report = ltm.measure(model, batches=(1,), rounds=3)
        >>> 0.78 <= report.macs["converted"] / report.macs["original"] <= 0.8
        True
    """
    # of a wrapper, what is converted in it; of a part of a converted model it would be said that it is the original
    if next(forwards_of(model), None) is not None:
        model = converted_part(model)
    example = present_example(model) if example is None else prepare_example(model, example)
    converted = is_retrofitted(model)
    with disabled(model) if converted else nullcontext():
        before = count_macs(model, example)
    after = count_macs(model, example) if converted else None
    if after is not None and after.total != get_plan(model).macs:
        raise CountError(
            f"the plan predicts {get_plan(model).macs:,} MACs and {after.total:,} were counted: measure at the plan's "
            f"input size {get_plan(model).input_size}. Else macs or unmerge_macs of method "
            f"{get_plan(model).config.method!r} says something other than its mask does"
        )
    times = batch_latencies(model, example, batches, rounds=rounds) if batches else {}
    accuracy: dict[str, float | None] = dict.fromkeys(ACCURACIES)
    if data is not None:
        accuracy[_entry(model)] = evaluate(model, data)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    every = sum(sizes.values())
    ours = sum(size for name, size in sizes.items() if converted and CHILD in name.split("."))
    return Report(
        model=_describe(model),
        hardware=_hardware(model),
        macs={"original": before.total, "converted": after.total if after else None},
        params={"original": every - ours, "converted": every if converted else None},
        latency_ms={
            "original": {batch: paired.original for batch, paired in times.items()} or None,
            "converted": {b: p.converted for b, p in times.items() if p.converted is not None} or None,
        },
        latency_ratio={batch: paired.ratio for batch, paired in times.items() if paired.ratio} or None,
        merging_share={b: p.merging for b, p in times.items() if p.merging is not None} or None,
        accuracy=accuracy,
        modules={"original": _by_module(before), "converted": _by_module(after) if after else None},
        plan=get_plan(model).to_dict() if converted else None,
    )


def _entry(model: nn.Module) -> str:
    """Say which entry of ``accuracy`` a model is."""
    if is_retrofitted(model):
        if get_plan(model).config.method == "slice" and was_finetuned(model):
            return "sliced_finetuned"
        return "finetuned" if was_finetuned(model) else "converted"
    return "original_finetuned" if was_finetuned(model) else "original"


def _by_module(count: MacCount) -> dict[str, int]:
    return {name: macs for name, macs in count.by_module.items() if macs}


def _describe(model: nn.Module) -> str:
    declared = getattr(model, "pretrained_cfg", None) or {}
    return str(declared.get("architecture") or type(model).__name__)


def _hardware(model: nn.Module) -> str:
    device = home(model)[0]
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _shown(value: int | None, unit: float) -> str:
    return "—" if value is None else f"{value / unit:.4g}"


def _columns(table: list[list[str]]) -> str:
    """Lay a table out in columns, the first one to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _markdown(table: list[list[str]]) -> str:
    names, *lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([names, "|" + "---|" * len(table[0]), *lines])
