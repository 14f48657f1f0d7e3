"""What the coverage matrix says: coverage.json and docs/coverage.md."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from coverage_zoo import GROUPS, Row

JSON, PAGE = Path("coverage.json"), Path("docs/coverage.md")
COMMAND = "make coverage"
Record = dict[str, Any]


def verdict(record: Record, enough: float, proofs: dict[str, str]) -> str:
    """Return one word for a row; only ``yes`` counts."""
    if record["status"] != "converted":
        return str(record["status"])
    passed = [proof.split(":") for proof in record["proofs"]]
    bare = {scope for scope, *_ in passed} != set(record["scopes"])
    if bare or any(set(proofs[scope]) - set(letters) for scope, letters in passed):
        return "unproven"
    return "yes" if record["share"] <= enough else "too little"


def write(
    rows: dict[str, Row],
    checked: dict[str, Record],
    records: dict[str, Record],
    target: float,
    enough: float,
    proofs: dict[str, str],
) -> None:
    """Merge what was run with the list of rows: a row that never ran stays on it, and counts against the rate."""
    merged = []
    for name, row in rows.items():
        sizes = {key: checked.get(name, {}).get(key) for key in ("input", "params", "macs_before")}
        sizes = {key: size for key, size in sizes.items() if size is not None}  # for rows that were stopped early
        record = {"status": "not run", **row.facts(), **sizes, **records.get(name, {})}
        merged.append(record)
        record["verdict"] = verdict(record, enough, proofs)
    ran = [record for record in merged if "at" in record]
    header = {
        "command": COMMAND,
        "asked": f"flops={target:g}; counted where all proofs hold and at most {enough:.0%} of the MACs are left",
        "from": min((record["at"] for record in ran), default=None),
        "to": max((record["at"] for record in ran), default=None),
        "setups": sorted({record.pop("setup") for record in ran}),
        "hours": round(sum(record.get("seconds", 0) for record in ran) / 3600, 2),
        "cpu_hours": round(sum(record.get("cpu_seconds", 0) for record in ran) / 3600, 2),
        "cpu_rows": sum("cpu_seconds" in record for record in ran),
        "commits": sorted({record["commit"] for record in ran}),
        "totals": {group: _totals([record for record in merged if record["group"] == group]) for group in GROUPS},
    }
    lines = [json.dumps(record, ensure_ascii=False) for record in merged]
    top = json.dumps(header, ensure_ascii=False, indent=1)
    JSON.write_text(f'{{"header": {top},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(_page(header, merged, enough))
    for group, totals in header["totals"].items():
        print(f"{group}: {totals}")


def _totals(records: list[Record]) -> dict[str, int]:
    counted = Counter(record["verdict"] for record in records)
    order = ("yes", "too little", "unproven", "refused", "error", "not run")
    return {"rows": len(records), **{kind: counted[kind] for kind in order}}


def _page(header: Record, merged: list[Record], enough: float) -> str:
    parts = ["# Which architectures can be converted\n", _intro(header, enough)]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n\n{_table([r for r in merged if r['group'] == group])}")
    parts.append("## Not converted, or not enough\n\n" + _failures(merged))
    parts.append("## Attention left out of models that are converted\n\n" + _left_out(merged))
    return "\n".join(parts)


def _intro(header: Record, enough: float) -> str:
    lines = [
        "Written by `python benchmarks/coverage.py write`; do not edit. Every architecture is built at its native size "
        "without pretrained weights; its attention is found, the proofs are run on random numbers, and a plan is made. "
        "It counts as converted where every chosen block passed all proofs and the plan leaves at most "
        f"{enough:.0%} of the multiply-adds (asked for: 80 %). Nothing was trained: this says what can be converted, "
        "not what accuracy it keeps. Above 3 GMACs the proofs run on a twin at native width in which runs of equal "
        "blocks are a few blocks long, wherever such a twin computes what the full model does; MACs are always of the "
        "full model. The same numbers, and more: `coverage.json`.\n",
        "| of | converted, all proofs, MACs down ≥ 15 % | too little saved | unproven | refused | error | not run |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, totals in header["totals"].items():
        count, yes = totals["rows"], totals["yes"]
        rest = " | ".join(str(totals[kind]) for kind in ("too little", "unproven", "refused", "error", "not run"))
        lines.append(f"| {count} {GROUPS[group]} | **{yes}** ({yes / max(1, count):.1%}) | {rest} |")
    lines += [
        "",
        f"Command: `{header['command']}`. Run from {header['from']} to {header['to']}, commit "
        f"{', '.join(header['commits']) or '–'}. {'; '.join(header['setups'])}. The rows took "
        f"{header['hours']:.1f} hours one after the other, beside other work; {header['cpu_rows']} of them, "
        f"where that was measured, {header['cpu_hours']:.1f} hours of one core. `make coverage` runs two at a time.\n",
        "Blocks: converted / all attention that was found. Proofs, of the blocks that the plan converts: (a) a block "
        "that was cut computes what it did, bit for bit (GRID and LOCAL cut none); (b) what follows it treats each "
        "token alone; (c) the rest of the network takes fewer tokens, in any order; (d) what follows costs something; "
        "(e) with nothing merged the converted model is the original bit for bit, and with merging its outputs keep "
        "their shapes. Share: of the model's MACs, masks included, at the nearest plan where marked ≈.\n",
    ]
    return "\n".join(lines)


def _table(records: list[Record]) -> str:
    lines = [
        "| architecture | family | attention | input | M params | blocks | scope, proofs | GMACs | share | result |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        shapes = [size for size in record.get("input", {}).values() if len(size) > 2] or list(
            record.get("input", {}).values()
        )
        size = "×".join(map(str, shapes[0][1:])) if shapes else ""
        params = f"{record['params'] / 1e6:.1f}" if "params" in record else ""
        blocks = f"{record['converted']}/{record['found']}" if "found" in record else ""
        macs = f"{record['macs_before'] / 1e9:.2f}" if "macs_before" in record else ""
        if "macs_after" in record:
            macs += f" → {record['macs_after'] / 1e9:.2f}"
        share = f"{'≈' if record.get('nearest') else ''}{record['share']:.3f}" if "share" in record else ""
        result = record["verdict"] + (f": {record['error']}" if record.get("error") else "")
        cells = (record["name"], record["family"], ", ".join(record["kinds"]), size, params, blocks)
        scopes = ", ".join(proof.replace(":", " ") for proof in record.get("proofs", []) if "scopes" in record)
        lines.append("| " + " | ".join([*cells, scopes, macs, share, result]) + " |")
    return "\n".join(lines) + "\n"


def _failures(merged: list[Record]) -> str:
    alike: dict[tuple[str, str], list[str]] = {}
    for record in merged:
        if record["verdict"] != "yes":
            reason = record.get("message", "")
            if record["verdict"] == "too little" or record.get("excluded"):
                reason = "; ".join(left["reason"] for left in record["excluded"]) or "no plan saves more"
            if record.get("where"):
                reason += f" (at {record['where'][0]})"
            kind = f"{record['verdict']} {record.get('error', '')}".strip()
            names = alike.setdefault((kind, _plain(reason)), [])
            names.append(record["name"] + (f" ({record['note']})" if record["note"] and not names else ""))
    lines = [
        f"- **{kind}**{': ' * bool(reason)}{reason} — {len(names)}: {', '.join(names)}"
        for (kind, reason), names in sorted(alike.items(), key=lambda entry: (entry[0][0], -len(entry[1])))
    ]
    return "\n".join(lines or ["None."]) + "\n"


def _left_out(merged: list[Record]) -> str:
    alike: dict[str, list[tuple[str, int]]] = {}
    for record in merged:
        if record["status"] == "converted":
            for left in record["excluded"]:
                alike.setdefault(_plain(left["reason"]), []).append((record["name"], left["count"]))
    lines = []
    for reason, places in sorted(alike.items(), key=lambda entry: -len(entry[1])):
        names = ", ".join(f"{name} ({count})" for name, count in dict(places).items())
        lines.append(f"- {reason} — {sum(count for _, count in places)} places in {len(dict(places))}: {names}")
    return "\n".join(lines or ["None."]) + "\n"


def _plain(reason: str) -> str:
    """Take numbers out, so that the same reason in two models reads the same; keep Markdown from seeing markup."""
    text = re.sub(r"\d+(?:[.,]\d+)*(?:e-?\d+)?", "n", " ".join(reason.split()))[:300]
    return re.sub(r"([|*_<>\[\]`])", r"\\\1", text)
