"""What patches do to everything else: tasks and the perplexity of plain text, patched minus unpatched."""

from __future__ import annotations

from math import exp

from .rows import Row, of
from .stats import Mean, mean, points, table

TASKS = (
    ("CSQA", "csqa", "cloze-v1"),
    ("ANLI", "anli", "cloze-v1"),
    ("MMLU", "mmlu", "cloze-v1"),
    ("SQuAD", "squad", "recipe-general-v1"),
)
LETTERS = (("CSQA", "csqa"), ("ANLI", "anli"), ("MMLU", "mmlu"))
EDITORS = (
    ("`recipe`", "recipe"),
    ("`memit`", "memit"),
    ("`memit`, `solver=alphaedit`", "memit_alphaedit"),
    ("`finetune` (FT-M)", "ft_m"),
)


def values(folder: str, run: str, task: str, protocol: str) -> dict[str, Row]:
    """Record -> its row, of the records that were asked."""
    rows = (row for row in of(folder, run) if row["task"] == task and row["protocol"] == protocol)
    return {row["id"]: row for row in rows if row.get("value") is not None}


def moved(folder: str, run: str, task: str, protocol: str) -> Mean:
    """Patched minus unpatched, record by record."""
    before, after = (values(folder, name, task, protocol) for name in ("none", run))
    both = [id for id in before if id in after]
    return mean([after[id]["value"] - before[id]["value"] for id in both])


def level(folder: str, run: str, task: str, protocol: str) -> Mean:
    """The mean of one run."""
    return mean([row["value"] for row in values(folder, run, task, protocol).values()])


def perplexity(folder: str, run: str) -> Mean:
    """Of plain text; the interval is that of the mean nats, carried over."""
    rows = values(folder, run, "perplexity", "perplexity-v1").values()
    nats = mean([row["value"] for row in rows], [row["weight"] for row in rows])
    return Mean(exp(nats.value), exp(nats.value) * nats.half, nats.n)


def _perplexity(folder: str, run: str) -> str:
    found = perplexity(folder, run)
    return f"{found.value:.1f} ± {found.half:.1f}"


def general_table() -> str:
    """After 1,000 facts."""
    first = ["unpatched, %", _perplexity("general", "none")]
    first += [f"{100 * level('general', 'none', task, protocol).value:.1f}" for _, task, protocol in TASKS]
    lines = [first]
    for label, run in EDITORS:
        tasks = [points(moved("general", run, task, protocol)) for _, task, protocol in TASKS]
        lines.append([label, _perplexity("general", run), *tasks])
    n = moved("general", "recipe", "csqa", "cloze-v1").n
    head = ("1,000 facts written by", "perplexity of plain text", *(f"{title}, points" for title, *_ in TASKS))
    return table(head, lines) + f"\n\nn = {n} records per task, 64 windows of text; bf16."


def elsewhere(folder: str, run: str) -> str:
    """One patch, both protocols."""
    lines = [["perplexity of plain text", "", _perplexity(folder, "none"), _perplexity(folder, run), ""]]
    both = [(title, "option texts" if task != "squad" else "1/perplexity of the answer", task, protocol)
            for title, task, protocol in TASKS]  # fmt: skip
    both += [(title, "option letters", task, "recipe-general-v1") for title, task in LETTERS]
    for title, form, task, protocol in both:
        before, after = (100 * level(folder, name, task, protocol).value for name in ("none", run))
        lines.append([title, form, f"{before:.1f}", f"{after:.1f}", points(moved(folder, run, task, protocol))])
    n = moved(folder, run, "csqa", "cloze-v1").n
    head = ("task", "scored by", "unpatched, %", f"with `{run}`, %", "difference, points")
    return table(head, lines) + f"\n\nn = {n} records per task, 64 windows of text."


def memotrap_elsewhere() -> str:
    return elsewhere("ircan-memotrap/general", "ircan")


def parenting_elsewhere() -> str:
    return elsewhere("parenting/general", "parenting")
