"""The coverage matrix: every timm and Hugging Face architecture with attention, converted and proven, or why not.

python benchmarks/coverage.py check                  # every row builds and runs on the meta device
python benchmarks/coverage.py run --shard 1/2        # walk the rows of one shard; goes on where it was stopped
python benchmarks/coverage.py compare                # which rows found other scopes, proofs or MACs than is committed
python benchmarks/coverage.py write                  # coverage.json and docs/coverage.md from what was run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from coverage_page import write
from coverage_rehearsal import rehearse
from coverage_runner import KEPT, RUNS, latest, read, run
from coverage_zoo import Row, zoo
from torch import Tensor

TARGET = 0.8  # asked of make_plan
ENOUGH = 0.85  # at most this share of the MACs counts as "down by at least 15 %"
PROOFS = {"FLOW": "abcde", "GRID": "cde", "LOCAL": "bde"}  # what a block of that scope must have passed, at least


def walk(row: Row, record: dict[str, Any]) -> None:
    """Find, prove and plan; put what is learnt into ``record`` as it is learnt. Whatever it raises is recorded."""
    import ltm_retrofit as ltm

    model = row.build()
    example = row.example(model)
    record.update(input=shapes(example), params=sum(parameter.numel() for parameter in model.parameters()))
    sites = ltm.find_sites(model, example)
    record.update(
        found=sites.attentions,
        converted=sites.covered,
        excluded=shorten(sites.excluded),
        macs_before=sites.total_macs,
    )
    try:
        plan = ltm.make_plan(sites, ltm.LTMConfig(flops=TARGET))
    except ltm.BudgetError as error:
        record["nearest"] = True
        plan = ltm.make_plan(sites, ltm.LTMConfig(flops=error.nearest))
    # the twin converted as planned, proof (e), and the full model converted on the meta device: counts must agree
    rehearse(model, example, sites, plan)
    planned = {(row.site, row.scope) for row in plan.rows}
    proven = [site for site in (*sites.found, *sites.alternatives) if (site.block, site.scope) in planned]
    record.update(
        proofs=sorted({f"{site.scope}:{''.join(site.proofs)}e" for site in proven}),
        scopes=sorted({planned.scope for planned in plan.rows}),
        macs_before=plan.macs_original,
        macs_after=plan.macs,
        share=plan.share,
        status="converted",
    )


def check(row: Row, record: dict[str, Any]) -> None:
    """Build the row and run it on the meta device: shapes and multiply-adds, no numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    model = row.build()
    example = row.example(model)
    record.update(input=shapes(example), params=sum(parameter.numel() for parameter in model.parameters()))
    record["stray"] = [name for name, value in model.named_parameters() if not value.is_meta][:3]
    record["hollow"] = [name for name, value in model.named_buffers() if value.is_meta][:3]
    model.to("meta").requires_grad_(False)  # FlopCounterMode trips over Perceiver's latents where they want gradients
    values = example if isinstance(example, dict) else {"": example}
    values = {key: value if key == "spatial_shapes" else value.to("meta") for key, value in values.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _yes():
        model(**values) if isinstance(example, dict) else model(values[""])
    record.update(macs_before=counter.get_total_flops() // 2, status="ok")


@contextlib.contextmanager
def _yes() -> Iterator[None]:
    """Answer a model that looks at values (are all of these valid?), which the meta device has none of, with yes."""
    whole = torch.Tensor.__bool__, torch.Tensor.item
    torch.Tensor.__bool__ = lambda self: True if self.is_meta else whole[0](self)  # type: ignore[method-assign]
    torch.Tensor.item = lambda self: True if self.is_meta else whole[1](self)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.__bool__, torch.Tensor.item = whole  # type: ignore[method-assign]


def shapes(example: Tensor | dict[str, Tensor]) -> dict[str, list[int]]:
    values = example if isinstance(example, dict) else {"": example}
    return {key: list(value.shape) for key, value in values.items()}


def shorten(excluded: dict[str, str]) -> list[dict[str, Any]]:
    """Put together what was left out for the same reason, numbers aside."""
    alike: dict[str, list[str]] = {}
    for name, reason in excluded.items():
        alike.setdefault(re.sub(r"\.\d+", ".*", reason)[:300], []).append(name)
    return [{"reason": reason, "count": len(names), "first": names[0]} for reason, names in alike.items()]


def compare() -> None:
    """Print in which of the rows that were run here the house finds other than what is committed."""
    said = ("status", "scopes", "proofs", "macs_before", "macs_after", "found", "converted")
    kept = {record["name"]: record for record in read(KEPT)}
    ran = {record["name"]: record for path in RUNS.glob("shard*.jsonl") for record in read(path)}
    other = {name: [key for key in said if record.get(key) != kept[name].get(key)] for name, record in ran.items()}
    for name, keys in other.items():
        for key in keys:
            print(f"{name}: {key} {kept[name].get(key)} → {ran[name].get(key)}")
    print(f"{len(ran)} rows, {sum(map(bool, other.values()))} of them found otherwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "run", "compare", "write"))
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th row, from the i-th on")
    parser.add_argument("--only", help="rows whose name matches this pattern, or of this family or group")
    parser.add_argument("--redo-errors", action="store_true", help="walk the rows again that raised, hung or died")
    parser.add_argument("--fresh", action="store_true", help="walk the rows again that another commit walked")
    parser.add_argument("--limit", type=float, default=1500, help="seconds for one row")
    parser.add_argument("--memory", type=float, default=12, help="GB for one worker")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers
    if args.command == "compare":
        return compare()
    if args.command == "write":
        checked = {record["name"]: record for record in read(RUNS / "check.jsonl")}
        KEPT.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in latest().values()))
        return write(zoo(), checked, latest(), target=TARGET, enough=ENOUGH, proofs=PROOFS)
    began = time.perf_counter()
    if args.command == "run":
        tally = run(args, walk, RUNS / f"shard{args.shard.replace('/', 'of')}.jsonl", latest())
    else:
        tally = run(args, check, RUNS / "check.jsonl", {})
        for record in read(RUNS / "check.jsonl")[-tally.total() :]:
            if record["status"] != "ok" or record["stray"] or record["hollow"]:
                print({key: record.get(key) for key in ("name", "error", "message", "where", "stray", "hollow")})
    print(f"{tally.total()} rows in {time.perf_counter() - began:.0f} s: {dict(tally)}")


if __name__ == "__main__":
    main()
