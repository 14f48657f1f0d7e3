"""measure(): what a conversion gained and what it lost, as an object, a table, JSON, Markdown and HTML."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ltm_retrofit.converted.record import converted_part, disabled, forwards_of, get_plan, is_retrofitted
from ltm_retrofit.converted.resizing import present_example
from ltm_retrofit.errors import CountError
from ltm_retrofit.finding.example import Example, home, prepare_example, shapes_in_words
from ltm_retrofit.macs import MacCount, count_macs
from ltm_retrofit.reporting.answers import ACCURACIES, Answers, compare, versions_of, wilson
from ltm_retrofit.reporting.bench import batch_latencies
from ltm_retrofit.reporting.memory import free_bytes, peak_bytes
from ltm_retrofit.reporting.page import Part, intervals, page
from ltm_retrofit.scopes.base import CHILD
from ltm_retrofit.tuning.data import Data

T = TypeVar("T")
#: images whose answer changed that Markdown shows
SHOWN = 20
#: images that are looked at together, where memory allows; on a CPU more of them are no faster
AT_ONCE = 32


@dataclass(frozen=True)
class Report:
    """What was measured. What was not is None, never zero. Accuracies in percent, latencies in milliseconds.

    ``memory_mb`` is what a pass of one image takes beside the weights: tensors that are alive at once. ``answers`` has
    the images behind the accuracies, ``left_out`` what was not timed, and why.

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
    memory_mb: dict[str, float | None] = field(default_factory=lambda: {"original": None, "converted": None})
    answers: Answers | None = None
    left_out: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def with_accuracy(self, **entries: float) -> Report:
        """Return the same report with more accuracies, each measured in its time."""
        return replace(self, accuracy={**self.accuracy, **entries})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; ``extra`` (a recipe's run puts its recipe there) stands beside the rest."""
        values = asdict(self)
        if values["answers"] is not None:
            values["answers"]["interval"] = self._intervals()
        return {**values.pop("extra"), **values}

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        """Return the tables as text."""
        parts = [self._title(), *map(columns, self._tables()), "\n".join(self._notes()), self.in_short()]
        return "\n\n".join(filter(None, parts))

    def to_markdown(self) -> str:
        """Return the tables in Markdown, that of the plan included; of the images whose answer changed, the first."""
        tables = [*self._tables(), self._plan_rows(), self._classes()]
        changed = self._changed()
        parts = [self._title(), self.in_short(), *(markdown(table) for table in tables if table)]
        parts += ["\n".join(f"- {note}" for note in self._notes()), markdown(changed[: SHOWN + 1]) if changed else ""]
        if len(changed) > SHOWN + 1:
            parts.append(f"{len(changed) - 1 - SHOWN} more stand in report.json.")
        return "\n\n".join(filter(None, parts)) + "\n"

    def to_html(self) -> str:
        """Return a page of one file, which fetches nothing."""
        costs, *accuracies = self._tables()
        answers, spans = self.answers, self._intervals()
        parts = [Part("What it costs", costs, self.left_out)]
        if accuracies:
            values = [(ACCURACIES[key], self.accuracy[key] or 0.0, *span) for key, span in spans.items()]
            said = [] if answers is None else [f"{answers.images} images: {answers.split}", *answers.sentences()]
            drawing = intervals(values) if values else ""
            parts.append(Part("What it recognises", accuracies[0], said, drawing))
        if classes := self._classes():
            parts.append(Part("Class by class, right answers", classes))
        if changed := self._changed():
            parts.append(Part(f"Images whose answer changed: {len(changed) - 1}", changed, words=True))
        if plan := self._plan_rows():
            parts.append(Part("The plan", plan, words=True))
        return page(self.model, self.in_short(), parts, f"Measured on {self.hardware} with ltm_retrofit.")

    def write(self, folder: str | Path) -> list[str]:
        """Write report.html, report.json and report.md into a folder that is there; return these names."""
        texts = {"report.html": self.to_html(), "report.json": self.to_json(), "report.md": self.to_markdown()}
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return list(texts)

    def in_short(self) -> str:
        """Say in one sentence what was gained and what was lost; empty of a model that is not converted."""
        before, after = self.macs["original"], self.macs["converted"]
        if before is None or after is None:
            return ""
        said = [f"×{after / before:.2f} of the MACs"]
        said += [f"×{ratio[0]:.2f} of the time at batch {batch}" for batch, ratio in (self.latency_ratio or {}).items()]
        known = self.accuracy if self.answers is None else self.answers.right  # not what other arms of a run have
        ours = ("finetuned", "sliced_finetuned", "converted")
        version = next((key for key in ours if key in known and self.accuracy[key] is not None), None)
        if version and self.accuracy["original"] is not None:
            text = f"top-1 of {self.accuracy[version]:.2f} % where the original has {self.accuracy['original']:.2f} %"
            if self.answers is not None and version in self.answers.kl:
                text += " ({:+.2f} ± {:.2f} points".format(*self.answers.change(version))
                text += f" on {self.answers.images} images)"
            said.append(text)
        return f"In short: {', '.join(said)}."

    def _title(self) -> str:
        return f"{self.model} on {self.hardware}"

    def _notes(self) -> list[str]:
        """Return what is to be said beside the tables."""
        if self.answers is None:
            return self.left_out
        counted = f"accuracy of {self.answers.images} images: {self.answers.split}"
        return [*self.left_out, counted, *self.answers.sentences()]

    def _intervals(self) -> dict[str, tuple[float, float]]:
        """Return the interval of 95 % of each accuracy, where it is known of how many images they are."""
        if self.answers is None:
            return {}
        count = self.answers.images
        return {
            key: wilson(round(value * count / 100), count) for key, value in self.accuracy.items() if value is not None
        }

    def _tables(self) -> list[list[list[str]]]:
        """Return what was measured as tables of text, the first line of each its columns' names."""
        tables = [[["", "original", "converted", "ratio (quartiles)"], *self._costs()]]
        if accuracies := self._accuracies():
            more = [] if self.answers is None else ["95 % interval", "KL to the original"]
            tables.append([["accuracy", "top-1", "to the better original", *more], *accuracies])
        return tables

    def _plan_rows(self) -> list[list[str]]:
        if self.plan is None:
            return []
        rows = [
            [r["site"], r["scope"], f"{r['tokens_in']} → {r['tokens_out']}", r["action"]] for r in self.plan["rows"]
        ]
        return [["site", "scope", "tokens", "action"], *rows]

    def _classes(self) -> list[list[str]]:
        """Return how many images of each class are recognised, the class with the largest change first."""
        if self.answers is None:
            return []
        first, *others = versions = list(self.answers.right)
        ordered = sorted(
            self.answers.classes.items(),
            key=lambda item: -max((abs(item[1][v] - item[1][first]) for v in others), default=0),
        )
        rows = [
            [
                name,
                str(counts["images"]),
                str(counts[first]),
                *(f"{counts[v]} ({counts[v] - counts[first]:+d})" for v in others),
            ]
            for name, counts in ordered
        ]
        return [["class", "images", *(ACCURACIES[v] for v in versions)], *rows]

    def _changed(self) -> list[list[str]]:
        if self.answers is None or not self.answers.changed:
            return []
        names = [ACCURACIES.get(key, key) for key in self.answers.changed[0]]
        return [names, *(list(one.values()) for one in self.answers.changed)]

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
        if (before_mb := self.memory_mb["original"]) is not None:
            after_mb = self.memory_mb["converted"]
            ratio = "" if after_mb is None else f"×{after_mb / before_mb:.2f}"
            lines.append(["memory of a pass, MB", _shown(before_mb, 1), _shown(after_mb, 1), ratio])
        return lines

    def _accuracies(self) -> list[list[str]]:
        measured = {key: value for key, value in self.accuracy.items() if value is not None}
        # the fair comparison: fine-tuning alone may have made the original better, or worse
        best = max((measured[key] for key in ("original", "original_finetuned") if key in measured), default=None)
        lines, spans = [], self._intervals()
        for key, label in ACCURACIES.items():
            if key in measured:
                gap = "" if best is None or key.startswith("original") else f"{measured[key] - best:+.2f}"
                more = []
                if self.answers is not None:
                    kl = self.answers.kl.get(key)
                    more = ["{:.1f} to {:.1f} %".format(*spans[key]), "" if kl is None else f"{kl:.2g}"]
                lines.append([label, f"{measured[key]:.2f} %", gap, *more])
        return lines


def measure(
    model: nn.Module,
    example: Example | None = None,
    *,
    data: Data | None = None,
    original: nn.Module | None = None,
    split: str = "",
    batches: tuple[int, ...] = (1, 8, 32),
    rounds: int = 10,
    seconds: float = 60.0,
    say: Callable[[str], object] = str,
) -> Report:
    """Measure a model, converted or not: MACs (of one image), parameters, paired latency, memory, accuracy.

    Args:
        model: the model.
        example: as for `find_sites`.
        data: a data set or loader. The original, the converted and the tuned model answer side by side, as far as they
            are at hand: a model that was converted and not tuned holds the original too.
        original: of a tuned model what it was before: the original checkpoint, or converted and not tuned.
        split: what the data are called in the report; left out, what a data set says itself.
        batches: batch sizes to time, the smallest first; empty to leave latency and memory out.
        rounds: timed passes at each batch size, at most.
        seconds: for all timing. What would take longer is left out, and what does not fit into memory; the report says
            so.
        say: receives a line for each result, as it comes.

    Raises:
        CountError: where two counters disagree, or the counted MACs are not the planned ones.
        RecipeError: where ``original`` is given and the model was not tuned, or ``original`` was.
        BaseMismatch: where ``original`` is another architecture.

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
    versions = {} if data is None else versions_of(model, original)
    example = present_example(model) if example is None else prepare_example(model, example)
    converted = is_retrofitted(model)

    def both(call: Callable[[], T]) -> tuple[T, T | None]:
        """Call on the original path, then, of a converted model, on the other one."""
        with disabled(model) if converted else nullcontext():
            before = call()
        return before, call() if converted else None

    before, after = both(lambda: count_macs(model, example))
    if after is not None and after.total != get_plan(model).macs:
        raise CountError(
            f"the plan predicts {get_plan(model).macs:,} MACs and {after.total:,} were counted: measure at the plan's "
            f"size, {shapes_in_words(get_plan(model).input_size)}. Else macs or unmerge_macs of method "
            f"{get_plan(model).config.method!r} says something other than its mask does"
        )
    say(f"GMACs of one image: {before.total / 1e9:.4g}" + (f" → {after.total / 1e9:.4g}" if after else ""))
    counting = bool(batches) or data is not None
    bytes_before, bytes_after = both(lambda: peak_bytes(model, example)) if counting else (0, None)
    largest = max(bytes_before, bytes_after or 0)
    times, left_out = batch_latencies(model, example, batches, rounds=rounds, seconds=seconds, need=largest, say=say)
    accuracy: dict[str, float | None] = dict.fromkeys(ACCURACIES)
    answered = None
    if data is not None:
        # half of what is free: images are decoded meanwhile
        fitting = max(1, min(AT_ONCE, int(free_bytes(home(model)[0]) / 2 / max(largest, 1))))
        answered = compare(model, versions, data, split, fitting)
        accuracy |= {version: 100 * right / answered.images for version, right in answered.right.items()}
        say("top-1: " + ", ".join(f"{ACCURACIES[v]} {accuracy[v]:.2f} %" for v in versions))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    every = sum(sizes.values())
    ours = sum(size for name, size in sizes.items() if converted and CHILD in name.split("."))
    megabytes = {"original": bytes_before / 1e6, "converted": None if bytes_after is None else bytes_after / 1e6}
    return Report(
        model=describe(model),
        hardware=hardware(model),
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
        memory_mb=megabytes if batches else dict.fromkeys(megabytes),
        answers=answered,
        left_out=left_out,
    )


def _by_module(count: MacCount) -> dict[str, int]:
    return {name: macs for name, macs in count.by_module.items() if macs}


def describe(model: nn.Module) -> str:
    """Return the architecture that timm says, else the class."""
    declared = getattr(model, "pretrained_cfg", None) or {}
    return str(declared.get("architecture") or type(model).__name__)


def hardware(model: nn.Module) -> str:
    """Say on what a model runs."""
    device = home(model)[0]
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _shown(value: float | None, unit: float) -> str:
    return "—" if value is None else f"{value / unit:.4g}"


def columns(table: list[list[str]]) -> str:
    """Lay a table out in columns, the first one to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(table: list[list[str]]) -> str:
    """Write a table in Markdown."""
    names, *lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([names, "|" + "---|" * len(table[0]), *lines])
