"""What the HTML pages of all benches share: one file, no script, nothing loaded, light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from ._grid import Cell, Grid
from ._svg import HUES

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c1e21; --soft: #667085; --line: #e4e7ec; --card: #f7f8fa;
  --good: #0a7d4b; --bad: #b4232a; --bar: #3b6fd422;
  --c0: #8a94a6; --c1: #d08700; --c2: #2f6fe0; --c3: #0a8f5b; --c4: #a13bd1; --c5: #c8385a; --c6: #0f8f9c;
  --c7: #7a5230; --c8: #e27fb5; --c9: #7d8b00; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --fg: #e6e8eb; --soft: #98a2b3; --line: #2b2f36;
  --card: #1b1e24; --good: #4cc38a; --bad: #ff8589; --bar: #6b9bff2e;
  --c0: #8a94a6; --c1: #f0b429; --c2: #6b9bff; --c3: #4cc38a; --c4: #c98bf0; --c5: #ff7d9c; --c6: #4fc9d6;
  --c7: #c39a72; --c8: #f4a9d0; --c9: #c2d04a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 24px 80px; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0; letter-spacing: -.01em; } h2 { font-size: 18px; margin: 44px 0 4px; }
p { margin: 4px 0 14px; color: var(--soft); max-width: 75ch; }
code, .mono { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  min-width: 120px; }
.card b { display: block; font-size: 22px; font-weight: 600; letter-spacing: -.01em; }
.card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { font-weight: 500; color: var(--soft); font-size: 12.5px; background: var(--card); vertical-align: bottom; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } td { vertical-align: top; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
td small { display: block; color: var(--soft); font-size: 11.5px; white-space: nowrap; }
.text td { max-width: 300px; overflow-wrap: anywhere; } .text small { white-space: normal; }
.yes { color: var(--good); } .no { color: var(--bad); } .dim { color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 13px; margin-top: 8px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; margin-top: 10px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; }
figcaption { font-size: 13px; color: var(--soft); margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11px; fill: var(--fg); }
svg .tick, svg .axis { fill: var(--soft); font-size: 10.5px; } svg .grid { stroke: var(--line); }
svg .error { stroke: var(--fg); } svg .mark { stroke: var(--soft); stroke-dasharray: 3 2; }
svg polyline { fill: none; stroke-width: 2; } svg circle { fill-opacity: .85; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; overflow-x: auto; }
""" + "\n".join(
    f".b{i} {{ background: var(--c{i}) }} .s{i} {{ fill: var(--c{i}) }} .l{i} {{ stroke: var(--c{i}) }}"
    for i in range(HUES)
)


def document(title: str, body: Iterable[str]) -> str:
    """The whole page; parts of ``body`` are HTML, empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(filter(None, body))}\n</body></html>\n"
    )


def heading(question: str, record: Mapping[str, Any], scope: str, protocol: str = "") -> str:
    """What the bench asks, and of which model, on what."""
    about = [record["base_model"], record["dtype"], scope, *filter(None, [record["data_name"]])]
    code = f" · <code>{escape(protocol)}</code>" if protocol else ""
    return f"<h1>{question}</h1><p>{escape(' · '.join(about))}{code}</p>"


def cards(title: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The few (label, value) a run is remembered by."""
    made = "".join(f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in pairs)
    return f'<h2>{escape(title)}</h2><div class="cards">{made}</div>'


def plots(names: Iterable[str], figures: Iterable[tuple[str, str]]) -> str:
    """(title, SVG) side by side under a legend of the runs' names, in the order of the colours; "" without any."""
    legend = "".join(f'<span><i class="b{i % HUES}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    drawn = "".join(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in figures)
    return f'<h2>At a glance</h2><div class="legend">{legend}</div><div class="plots">{drawn}</div>' if drawn else ""


def table(grid: Grid) -> str:
    """One table under its title, folded away if it is of second interest."""
    head = "".join(f"<th>{escape(column)}</th>" for column in grid.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in grid.rows)
    table = f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
    if grid.folded:
        return f"<details><summary>{escape(grid.title)}</summary><p>{escape(grid.note)}</p>{table}</details>"
    return f"<h2>{escape(grid.title)}</h2><p>{escape(grid.note)}</p>{table}"


def examples(title: str, note: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts. ``rows`` are HTML already; title, note and columns are escaped here."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    listed = f'<div class="scroll"><table class="text"><tr>{head}</tr>{body}</table></div>'
    return f"<h2>{escape(title)}</h2><p>{escape(note)}</p>{listed}"


def before(text: str) -> str:
    """What the unpatched model said."""
    return f'<span class="dim">{escape(text)}</span>'


def after(text: str, right: bool) -> str:
    """What the patched one said, behind its verdict."""
    return f'<span class="{"yes" if right else "no"}">{"✓" if right else "✗"}</span> {escape(text)}'


def _cell(cell: Cell) -> str:
    sub = f"<small>{escape(cell.sub)}</small>" if cell.sub else ""
    if cell.share is None:
        return f"<td>{escape(cell.text)}{sub}</td>"
    filled = f"{100 * min(1.0, max(0.0, cell.share)):.0f}%"
    bar = f"background: linear-gradient(90deg, var(--bar) {filled}, transparent {filled})"
    return f'<td style="{bar}">{escape(cell.text)}{sub}</td>'


def made(runs: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """(name, record) of every run, folded; the numbers themselves are left out."""
    parts = []
    for name, record in runs:
        text = json.dumps({k: v for k, v in record.items() if k != "metrics"}, indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>{escape(name)}</summary><pre><code>{escape(text)}</code></pre></details>")
    note = "Everything that decides these numbers. The rows they are made of lie in rows.jsonl of the run's folder."
    return f"<h2>How it was made</h2><p>{note}</p>{''.join(parts)}"
