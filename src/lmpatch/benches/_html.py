"""The report of the facts bench as one HTML page."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ._grid import NONE, grids, headline, kinds
from ._page import after, before, cards, examples, heading, plots, table
from ._rows import BINS, Row, label
from ._svg import curves, scatter
from ._text import same

if TYPE_CHECKING:
    from ._report import Report, Run

SHOWN = 25  # cases in each table of examples


def body(report: Report) -> list[str]:
    """The page, see ``_runs.Report``."""
    record = report.runs[0].record
    scope = f"n = {record['n_edits']}, {record['commit_size']} per commit"
    methods = [run for run in report.runs if not run.record["baseline"]]
    return [
        heading("Do the edits hold?", record, scope, record["protocol_id"]),
        *(cards(run.name, headline(run)) for run in methods),
        _plots(report),
        *(table(grid) for grid in grids(report)),
        *(part for run in methods for part in (_samples(run), _moved(run))),
    ]


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
    return examples(f"Edited facts: {run.name}", note, ("prompt", "wanted", "before", "after"), map(_sample, shown))


def _sample(row: Row) -> tuple[str, ...]:
    prompt = escape(row.prompt) if row.kind == "edit" else f'<span class="dim">&nbsp;&nbsp;{escape(row.prompt)}</span>'
    note = f"<small>{escape(row.flag)}</small>" if row.flag else ""
    return prompt, escape(row.aliases[0]) + note, before(row.base_text or ""), after(row.text or "", bool(row.em))


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
            before(row.base_text or ""),
            escape(row.text or ""),
            NONE if row.kl is None else f"{row.kl:.3f}",
        )
        for row in moved[:SHOWN]
    ]
    return examples(f"What moved: {run.name}", note, ("prompt", "before", "after", "KL"), rows)
