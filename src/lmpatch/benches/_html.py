"""The report of the facts bench as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from ._grid import NONE, grids, headline, kinds
from ._page import cards, document, made, plots, table
from ._rows import BINS, Row, label
from ._svg import curves, scatter
from ._text import same

if TYPE_CHECKING:
    from ._report import Report, Run

SHOWN = 25  # cases in each table of examples


def page(report: Report) -> str:
    """The whole page."""
    record = report.runs[0].record
    about = f"{record['base_model']} · {record['dtype']} · n = {record['n_edits']}, {record['commit_size']} per commit"
    data = f" · {record['data_name']}" if record["data_name"] else ""
    body = [f"<h1>Do the edits hold?</h1><p>{escape(about + data)} · <code>{escape(record['protocol_id'])}</code></p>"]
    methods = [run for run in report.runs if not run.record["baseline"]]
    body += [cards(run.name, headline(run)) for run in methods]
    body.append(_plots(report))
    body += [table(grid) for grid in grids(report)]
    body += [part for run in methods for part in (_samples(run), _moved(run))]
    body.append(made((run.name, run.record) for run in report.runs))
    return document(f"facts: {record['base_model']}", body)


def _plots(report: Report) -> str:
    figures = []
    for kind in kinds(report, "loc_unchanged"):
        points = []
        for colour, run in enumerate(report.runs):
            held, kept = run.metric("reliability"), run.metric(f"loc_unchanged/{kind}")
            if held and kept:
                points.append((colour, run.name, held.value, kept.value))
        title = f"Locality against efficacy: {kind.replace('_', ' ')}"
        figures.append((title, scatter(points, "reliability, %", "unchanged, %")))
    figures += _retention(report)
    return plots([run.name for run in report.runs], figures)


def _retention(report: Report) -> list[tuple[str, str]]:
    curve = {i: {age: value for age, value, _ in run.retention()} for i, run in enumerate(report.runs)}
    ages = [label(ages) for ages in BINS if any(label(ages) in values for values in curve.values())]
    lines = [(i, report.runs[i].name, [values.get(age) for age in ages]) for i, values in curve.items() if values]
    return [("Retention", curves(lines, ages, "edits written since", "still answered as edited, %"))] if lines else []


def _samples(run: Run) -> str:
    rows = [
        row for row in run.rows if row.when == "final" and row.kind in ("edit", "rephrase") and row.text is not None
    ]
    cases = list(dict.fromkeys(row.case_id for row in rows))
    every = max(1, -(-len(cases) // SHOWN))
    chosen = set(cases[::every])
    shown = [row for row in rows if row.case_id in chosen]
    note = f"{len(chosen)} of {len(cases)} cases, evenly taken. Rephrasings are indented."
    return _examples(f"Edited facts: {run.name}", note, ("prompt", "wanted", "before", "after"), map(_sample, shown))


def _sample(row: Row) -> tuple[str, ...]:
    prompt = escape(row.prompt) if row.kind == "edit" else f'<span class="dim">&nbsp;&nbsp;{escape(row.prompt)}</span>'
    mark = f'<span class="{"yes" if row.em else "no"}">{"✓" if row.em else "✗"}</span> {escape(row.text or "")}'
    note = f"<small>{escape(row.flag)}</small>" if row.flag else ""
    return prompt, escape(row.aliases[0]) + note, f'<span class="dim">{escape(row.base_text or "")}</span>', mark


def _moved(run: Run) -> str:
    near = [row for row in run.rows if row.when == "final" and row.kind.startswith("loc/") and row.text is not None]
    moved = [row for row in near if not same(row.text or "", row.base_text or "")]
    moved.sort(key=lambda row: -(row.kl or 0.0))
    if not moved:
        return ""
    note = f"{len(moved)} of {len(near)} locality prompts got another text; those that moved most come first."
    rows = [
        (
            f"{escape(row.prompt)}<small>{escape(row.kind[4:].replace('_', ' '))}</small>",
            f'<span class="dim">{escape(row.base_text or "")}</span>',
            escape(row.text or ""),
            NONE if row.kl is None else f"{row.kl:.3f}",
        )
        for row in moved[:SHOWN]
    ]
    return _examples(f"What moved: {run.name}", note, ("prompt", "before", "after", "KL"), rows)


def _examples(title: str, note: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """``rows`` are HTML already; title, note and columns are escaped here."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    listed = f'<div class="scroll"><table class="text"><tr>{head}</tr>{body}</table></div>'
    return f"<h2>{escape(title)}</h2><p>{escape(note)}</p>{listed}"
