"""The tables of a report as plain values; the terminal and the HTML page draw the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..resources import format_bytes
from ._rows import Metric

if TYPE_CHECKING:
    from ._report import Report, Run


NONE = "-"


@dataclass(frozen=True)
class Cell:
    """A value with what it rests on."""

    text: str
    sub: str = ""
    """Interval and number of cases."""
    share: float | None = None
    """The value as a part of 1, for drawing."""


@dataclass(frozen=True)
class Grid:
    """One table."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False
    """Of second interest: a page shows it on request."""


def grids(report: Report) -> list[Grid]:
    """Answers, locality, cost, teacher-forced numbers: those that have anything to show."""
    return [grid for grid in (_answers(report), _locality(report), _cost(report), _forced(report)) if grid.rows]


def kinds(report: Report, prefix: str) -> list[str]:
    """What follows ``prefix/`` in the metric names, in the order of first appearance."""
    names = [m.name for run in report.runs for m in run.metrics() if m.name.startswith(prefix + "/")]
    return list(dict.fromkeys(name.partition("/")[2] for name in names))


def _answers(report: Report) -> Grid:
    wanted = [
        ("reliability", "reliability", "all"),
        ("reliability, base wrong", "reliability", "was_wrong"),
        ("generality", "generality", "all"),
        ("generality, base wrong", "generality", "was_wrong"),
        ("old answer first", "old_answer_rate", "all"),
        *((f"portability: {_words(axis)}", f"portability/{axis}", "all") for axis in kinds(report, "portability")),
    ]
    immediate = any(run.metric("reliability", when="immediate") for run in report.runs)
    columns = ["run", *(label for label, _, _ in wanted), *(["right after", "forgetting"] if immediate else [])]
    rows = []
    for run in report.runs:
        cells = [_percent(run.metric(name, split)) for _, name, split in wanted]
        if immediate:
            cells += [_percent(run.metric("reliability", when="immediate")), _percent(run.metric("forgetting"))]
        rows.append((Cell(_name(run)), *cells))
    note = f"Generated answers, %, {_protocol(report)}. ± is half a 95 % bootstrap interval over cases, n counts cases."
    return trimmed("Answers", note, columns, rows)


def _locality(report: Report) -> Grid:
    rows = []
    for kind in kinds(report, "loc_unchanged"):
        for run in report.runs:
            found = [run.metric(f"{name}/{kind}") for name in ("loc_unchanged", "loc_correct", "loc_kl", "loc_kl_p95")]
            if any(found):
                cells = [_percent(m) for m in found[:2]] + [_number(m) for m in found[2:]]
                rows.append((Cell(f"{_words(kind)}: {_name(run)}"), *cells))
    note = (
        "What should not move. Unchanged: the same text as the unpatched model, %. Still right: of the prompts it had "
        "right, %. KL: from the unpatched model's next-token distribution, nats."
    )
    return trimmed("Locality", note, ["prompts: run", "unchanged", "still right", "KL mean", "KL p95"], rows)


def _forced(report: Report) -> Grid:
    names = list(dict.fromkeys(m.name for run in report.runs for m in run.metrics() if m.name.startswith("tf_")))
    rows = []
    for name in names:
        show = _number if name.startswith("tf_margin") else _percent
        rows.append((Cell(_words(name)), *(show(run.metric(name)) for run in report.runs)))
    ids = sorted({m.protocol for run in report.runs for m in run.metrics() if m.name.startswith("tf_")})
    note = (
        f"{next((id for id in ids if 'immediate' not in id), '')}, %. The answer's own tokens are given while it is "
        "scored, so these are easier. Only to compare with papers."
    )
    return replace(trimmed("Teacher-forced", note, ["number", *map(_name, report.runs)], rows), folded=True)


def _cost(report: Report) -> Grid:
    columns = [
        "run",
        "s per edit",
        "p95",
        "bytes per edit",
        "ms per token",
        "perplexity",
        "‖ΔW‖/‖W‖",
        "refused",
        "collapsed",
    ]
    rows = []
    for run in report.runs:
        record = run.record
        if "edit_s" in record:
            health, times = record["health"], record["edit_s"]
            cells = [f"{times['median']:.3g}", f"{times['p95']:.3g}", format_bytes(round(record["bytes_per_edit"]))]
            cells += [_speed(record["infer_ms"]), _ratio(health), _short(health["change_max"])]
            cells += [str(record["refused"]), f"{len(record['collapsed_at'])} of {record['chunks']}"]
            rows.append((Cell(_name(run)), *map(Cell, cells)))
    note = (
        "Fitting only, evaluation left out. Per token: patched, and unpatched in brackets. Perplexity: the highest "
        "after any commit, as a multiple of the unpatched model's. ‖ΔW‖/‖W‖: the largest of any commit and weight."
    )
    return trimmed("Cost and health", note, columns, rows)


def trimmed(title: str, note: str, columns: Sequence[str], rows: Sequence[tuple[Cell, ...]]) -> Grid:
    """A grid without the columns in which nothing stands."""
    keep = [i for i in range(len(columns)) if any(row[i].text != NONE for row in rows)]
    return Grid(title, note, tuple(columns[i] for i in keep), tuple(tuple(row[i] for i in keep) for row in rows))


def flagged(found: Iterable[tuple[str, str, str]]) -> Grid:
    """Records that were not asked, and those that were asked differently.

    Args:
        found: (run, asked with, why) of each.
    """
    counts = Counter(found).items()
    rows = [(Cell(run), Cell(asked), Cell(f"{n} records"), Cell(why)) for (run, asked, why), n in counts]
    note = "Nothing is cut to fit, and nothing is left out without a word."
    return Grid("Flagged", note, ("run", "asked with", "what", "why"), tuple(rows))


def _percent(metric: Metric | None) -> Cell:
    if metric is None:
        return Cell(NONE)
    return Cell(f"{100 * metric.value:.1f}", _sub(metric, 100, 1), metric.value)


def _number(metric: Metric | None) -> Cell:
    return Cell(f"{metric.value:.3f}", _sub(metric, 1, 3)) if metric else Cell(NONE)


def _sub(metric: Metric, scale: float, digits: int) -> str:
    dropped = f" ({metric.dropped} dropped)" if metric.dropped else ""
    if metric.low is None or metric.high is None:
        return f"n={metric.n}{dropped}"
    return f"±{scale * (metric.high - metric.low) / 2:.{digits}f} n={metric.n}{dropped}"


def _speed(times: dict[str, Any] | None) -> str:
    return f"{times['patched']['token_b1']:.1f} ({times['base']['token_b1']:.1f})" if times else NONE


def _ratio(health: dict[str, Any]) -> str:
    seen, base = health["perplexity_max"], health["base_perplexity"]
    return f"{seen / base:.2f}" if seen is not None and base else NONE


def _short(value: float | None) -> str:
    return NONE if value is None else f"{value:.2g}"


def _name(run: Run) -> str:
    done, planned = len(run.chunks), run.record["planned"]
    return run.name if done == planned else f"{run.name} ({done} of {planned} chunks)"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("/", ": ")


def _protocol(report: Report) -> str:
    return str(report.runs[0].record["protocol_id"])


def headline(run: Run) -> Iterable[tuple[str, str]]:
    """(label, value) of the few numbers a run is remembered by."""
    for label, name in (("reliability", "reliability"), ("generality", "generality")):
        if metric := run.metric(name):
            yield label, f"{100 * metric.value:.0f} %"
    for metric in run.metrics():
        if metric.name.startswith("loc_unchanged/") and metric.split == "all" and "distractor" not in metric.name:
            yield f"unchanged: {_words(metric.name.partition('/')[2])}", f"{100 * metric.value:.0f} %"
    if "edit_s" in run.record:
        yield "per edit", f"{run.record['edit_s']['median']:.3g} s"
