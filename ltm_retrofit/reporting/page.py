"""A report as one HTML file: no script, and nothing that a browser would have to fetch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

#: the longest table that is shown whole; of a longer one the rest stands in the JSON
MOST = 500
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #2a6fbb; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.lead { font-size: 1.15rem; } .note { opacity: .75; margin: .3rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
svg { display: block; margin: .5rem 0; max-width: 100%; height: auto; }
svg text { fill: currentColor; font: 13px system-ui, sans-serif; }
svg line, svg circle { stroke: var(--mark); fill: var(--mark); }
svg .axis { stroke: var(--line); }
"""


@dataclass(frozen=True)
class Part:
    """A part of the page: a heading, sentences, a drawing, and a table whose first line names its columns."""

    heading: str
    table: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    drawing: str = ""
    words: bool = False  # whether the table's cells are words, which begin at the left


def page(title: str, lead: str, parts: Iterable[Part], below: str) -> str:
    """Return the page; all text is escaped here."""
    body = "\n".join(_part(part) for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{body}
<p class="note">{escape(below)}</p>
</body>
</html>
"""


def _part(part: Part) -> str:
    lines = [f"<h2>{escape(part.heading)}</h2>", *(f'<p class="note">{escape(note)}</p>' for note in part.notes)]
    lines += [part.drawing] if part.drawing else []
    if part.table:
        names, *rows = part.table
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[:MOST])
        kind = ' class="words"' if part.words else ""
        lines.append(f'<div class="wide"><table{kind}>\n<tr>{head}</tr>\n{body}\n</table></div>')
        if len(rows) > MOST:
            lines.append(f'<p class="note">{len(rows) - MOST} more stand in report.json.</p>')
    return "\n".join(lines)


def intervals(values: Sequence[tuple[str, float, float, float]]) -> str:
    """Draw percentages with their intervals, one line each: name, value, lower end, upper end."""
    low, high = min(value[2] for value in values), max(value[3] for value in values)
    # round numbers at the ends, and some room
    low, high = max(0.0, 5 * (low // 5)), min(100.0, 5 * (high // 5 + 1))

    def x(value: float) -> float:
        return round(320 + 430 * (value - low) / (high - low), 1)

    rows, bottom = [], 26 * len(values) + 8
    for place, (name, value, least, most) in enumerate(values):
        y = 20 + 26 * place
        rows.append(
            f'<text x="310" y="{y + 4}" text-anchor="end">{escape(name)}</text>'
            f'<line x1="{x(least)}" x2="{x(most)}" y1="{y}" y2="{y}" stroke-width="2"/>'
            f'<circle cx="{x(value)}" cy="{y}" r="4"/>'
        )
    axis = f'<line class="axis" x1="{x(low)}" x2="{x(high)}" y1="{bottom}" y2="{bottom}"/>' + "".join(
        f'<text x="{x(end)}" y="{bottom + 16}" text-anchor="middle">{end:g} %</text>' for end in (low, high)
    )
    return (
        f'<svg viewBox="0 0 780 {bottom + 22}" width="780" role="img" '
        f'aria-label="accuracies and their intervals">{"".join(rows)}{axis}</svg>'
    )
