"""What patches do to everything else: tasks and the perplexity of plain text, patched minus unpatched."""

from __future__ import annotations

from math import exp

from .facts_rows import metric
from .rows import Row, of
from .stats import Mean, mean, percent, points, table

TASKS = (
    ("CSQA", "csqa", "cloze-v1"),
    ("ANLI", "anli", "cloze-v1"),
    ("MMLU", "mmlu", "cloze-v1"),
    ("SQuAD", "squad", "recipe-general-v1"),
)
LETTERS = (("CSQA", "csqa"), ("ANLI", "anli"), ("MMLU", "mmlu"))
FACTS = "general-facts"
"""What became of the facts themselves."""
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


def _level(folder: str, run: str, task: str, protocol: str) -> str:
    found = level(folder, run, task, protocol)
    return f"{100 * found.value:.1f} ± {100 * found.half:.1f}"


def perplexity(folder: str, run: str) -> Mean:
    """Of plain text; the interval is that of the mean nats, carried over."""
    rows = values(folder, run, "perplexity", "perplexity-v1").values()
    nats = mean([row["value"] for row in rows], [row["weight"] for row in rows])
    return Mean(exp(nats.value), exp(nats.value) * nats.half, nats.n)


def _perplexity(folder: str, run: str) -> str:
    found = perplexity(folder, run)
    return f"{found.value:.1f} ± {found.half:.1f}"


def general_table() -> str:
    """After 1,000 facts, and how many of them the patch states."""
    first = ["unpatched, %", percent(metric(FACTS, "none", "stated")), _perplexity("general", "none")]
    first += [_level("general", "none", task, protocol) for _, task, protocol in TASKS]
    lines = [first]
    for label, run in EDITORS:
        tasks = [points(moved("general", run, task, protocol)) for _, task, protocol in TASKS]
        lines.append([label, percent(metric(FACTS, run, "stated")), _perplexity("general", run), *tasks])
    n, asked = moved("general", "recipe", "csqa", "cloze-v1").n, metric(FACTS, "recipe", "stated")
    head = ("1,000 facts written by", "efficacy", "perplexity of plain text")
    told = f"n = {n} records per task, 64 windows of text, {asked.n if asked else 0} of the facts; bf16."
    return table((*head, *(f"{title}, points" for title, *_ in TASKS)), lines) + f"\n\n{told}"


def elsewhere(folder: str, run: str) -> str:
    """One patch, both protocols."""
    lines = [["perplexity of plain text", "", _perplexity(folder, "none"), _perplexity(folder, run), ""]]
    both = [(title, "option texts" if task != "squad" else "1/perplexity of the answer", task, protocol)
            for title, task, protocol in TASKS]  # fmt: skip
    both += [(title, "option letters", task, "recipe-general-v1") for title, task in LETTERS]
    for title, form, task, protocol in both:
        both_levels = [_level(folder, name, task, protocol) for name in ("none", run)]
        lines.append([title, form, *both_levels, points(moved(folder, run, task, protocol))])
    n = moved(folder, run, "csqa", "cloze-v1").n
    head = ("task", "scored by", "unpatched, %", f"with `{run}`, %", "difference, points")
    return table(head, lines) + f"\n\nn = {n} records per task, 64 windows of text."


def memotrap_elsewhere() -> str:
    return elsewhere("ircan-memotrap/general", "ircan")


def parenting_elsewhere() -> str:
    return elsewhere("parenting/general", "parenting")
