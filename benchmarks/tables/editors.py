"""Every editor side by side: as papers score them, by free generation, general ability, costs; who loses, and where.

Made of results/editors/, which benchmarks/editors.py fills. Figures of others stand below a line of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import exp
from pathlib import Path
from typing import Any

from .editors_rows import FOLDER, every, task_values, values
from .general import TASKS
from .latex import Grid
from .rows import Row
from .stats import Mean, mean, percent, size

MODELS = {"gemma-3-270m": "Gemma-3-270M", "smollm2-135m-instruct": "SmolLM2-135M-Instruct"}
SETS = {
    "counterfact": "CounterFact", "zsre": "zsRE", "wiki": "wiki_counterfact, in place of RIPE",
    "real-zsre": "zsRE, real questions", "real-wiki": "WikiBigEdit, real questions",
}  # fmt: skip
BASELINES = {"none": "no edit", "fact_in_prompt": "fact in the prompt"}
NOTHING = "Not measured yet: `benchmarks/editors.py` makes the rows."
BLANK = "not measured yet"
PACK = ("negation", "old_mentioned", "true", "false", "reversal", "long")
PERPLEXITY = "perplexity perplexity-v1"
NOTE = (
    "Mean over facts of all seeds, ± half of the 95 % interval. Locality of the papers: tokens of other answers whose "
    "first choice is the unpatched model's. *reported*: printed by others, of larger models under other protocols."
)
ENOUGH, GAP = 30, 0.1
"""Facts from which an editor is said to lose, and by how much at least."""
Line = tuple[str, int, int]
"""Editor, facts in the model, facts of a commit (0: all)."""


@lru_cache
def reported() -> dict[str, Any]:
    """What others printed, and what could not be read."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "reported.json").read_text(encoding="utf-8"))
    return found


def runs(folder: Path, model: str, chosen: str) -> dict[Line, list[Row]]:
    """Line -> its runs, one a seed."""
    found: dict[Line, list[Row]] = {}
    for line in every(folder):
        if line["model"] == model and line["set"] == chosen:
            found.setdefault((line["run"], line["n"], line["commit"]), []).append(line)
    return found


def pooled(seeds: Sequence[Row], kind: str, name: str) -> list[float]:
    """Of one kind of question, or with a stroke at the end of a family, the number of each fact of every seed."""
    found = []
    for run in seeds:
        kinds = [one for one in run["kinds"] if one == kind or (kind.endswith("/") and one.startswith(kind))]
        found += [value for one in kinds for value in values(run["kinds"], one, name) if value is not None]
    return found


def average(seeds: Sequence[Row], kind: str, name: str) -> Mean | None:
    found = pooled(seeds, kind, name)
    return mean(found) if found else None


def _name(run: str, commit: int) -> str:
    title = BASELINES.get(run, f"`{run}`")
    return f"{title}, one at a time" if commit and run not in BASELINES else title


def _order(found: dict[Line, list[Row]]) -> list[tuple[str, int]]:
    """Baselines, then editors by name, each once; a baseline of commits of one is that of the others."""
    names = {(run, commit) for run, _, commit in found}
    first = [(run, 0) for run in BASELINES if (run, 0) in names]
    return first + sorted(pair for pair in names if pair[0] not in BASELINES)


Cells = Callable[[Sequence[Row]], list[str]]
Below = Callable[[str, list[int]], list[list[str]]]


def _by_size(folder: Path, heads: Sequence[str], cells: Cells, below: Below) -> Grid:
    """A block of columns for each number of facts in the model, a heading for each model and set."""
    sizes = sorted({line["n"] for line in every(folder) if "kinds" in line})
    lines: list[list[str]] = []
    for model, title in {**MODELS, **{one: one for one in _models(folder) if one not in MODELS}}.items():
        for chosen, name in SETS.items():
            found = runs(folder, model, chosen)
            if not found:
                continue
            lines.append([f"**{title}, {name}**", *[""] * len(sizes) * len(heads)])
            for run, commit in _order(found):
                parts = [found.get((run, n, commit), []) for n in sizes]
                blocks = [cells(part) if part else [""] * len(heads) for part in parts]
                lines.append([_name(run, commit), *(cell for block in blocks for cell in block)])
            lines += below(chosen, sizes)
    head = ("editor", *(f"{n:,}: {one}" for n in sizes for one in heads))
    return Grid(head, lines, NOTE)


def _models(folder: Path) -> list[str]:
    return list(dict.fromkeys(line["model"] for line in every(folder)))


def forced(folder: Path = FOLDER) -> Grid:
    """As in the papers: tokens of the wanted answer that are the first choice, those before given."""
    heads = ("reliability", "generality", "locality", "average")

    def cells(seeds: Sequence[Row]) -> list[str]:
        found = [average(seeds, *of) for of in (("edit", "tf"), ("rephrase", "tf"), ("loc/", "tf_same"))]
        there = [one.value for one in found if one]
        return [*(percent(one) for one in found), f"{100 * sum(there) / len(there):.1f}" if len(there) == 3 else ""]

    def below(chosen: str, sizes: list[int]) -> list[list[str]]:
        lines = []
        for row in reported()["rows"]:
            if row["set"] == chosen and row["n"] in sizes:
                block = ["" if row[one] is None else f"{row[one]:.1f}" for one in heads[:3]]
                blocks = [[*block, ""] if n == row["n"] else [""] * len(heads) for n in sizes]
                label = f"{row['editor']}, {row['model']}, *reported*: {row['source']}"
                lines.append([label, *(cell for part in blocks for cell in part)])
        return lines

    return _by_size(folder, heads, cells, below)


def generated(folder: Path = FOLDER) -> Grid:
    """What is said without help: the fact, in other words, once, other answers as they were, the probe pack."""
    heads = ("states it", "in other words", "unchanged elsewhere", "says it twice", "follows", "probe pack")

    def cells(seeds: Sequence[Row]) -> list[str]:
        of = (("edit", "em"), ("rephrase", "em"), ("loc/", "same"), ("edit", "twice"), ("port/", "contains"))
        return [*(percent(average(seeds, *one)) for one in of), percent(pack(seeds))]

    return _by_size(folder, heads, cells, lambda chosen, sizes: [])


def pack(seeds: Sequence[Row]) -> Mean | None:
    """Share of the probe pack's questions that are passed, whatever they ask."""
    found: list[float] = []
    for probe in PACK:
        one = ("em", "likelier", "contains")
        name = one[0] if probe in ("negation", "old_mentioned") else one[2] if probe == "long" else one[1]
        found += pooled(seeds, f"pack/{probe}", name)
    return mean(found) if found else None


def axes(folder: Path = FOLDER) -> Grid:
    """What follows from a fact, axis by axis, and what must stay, kind by kind: none merged with another."""
    kinds = sorted({kind for line in every(folder) for kind in line.get("kinds", {}) if kind[:4] in ("port", "loc/")})
    names = {kind: ("contains" if kind.startswith("port/") else "same") for kind in kinds}
    lines = []
    for model in _models(folder):
        for chosen in SETS:
            found = runs(folder, model, chosen)
            for run, n, commit in sorted(found, key=str):
                cells = [percent(average(found[run, n, commit], kind, name)) for kind, name in names.items()]
                label = [MODELS.get(model, model), chosen, _name(run, commit), f"{n:,}"]
                lines.append([*label, *cells])
    return Grid(("model", "facts", "editor", "in the model", *(kind.replace("_", " ") for kind in kinds)), lines)


def general(folder: Path = FOLDER) -> Grid:
    """Tasks and plain text after 1,000 facts, in %; of the editors the difference, record by record."""
    lines = []
    for model in _models(folder):
        kept = {line["run"]: line["tasks"] for line in every(folder) if line["model"] == model and "tasks" in line}
        if "none" not in kept:
            continue
        for run, tasks in sorted(kept.items(), key=lambda pair: (pair[0] != "none", pair[0])):
            cells = [_task(kept["none"], tasks, f"{task} {protocol}", run) for _, task, protocol in TASKS]
            nats = mean(*task_values(tasks[PERPLEXITY])) if PERPLEXITY in tasks else None
            text = f"{exp(nats.value):.1f}" if nats else ""
            lines.append([MODELS.get(model, model), _name(run, 0), text, *cells])
    head = ("model", "editor of 1,000 facts", "perplexity of plain text", *(title for title, *_ in TASKS))
    return Grid(head, lines)


def _task(before: dict[str, Any], after: dict[str, Any], task: str, run: str) -> str:
    if task not in before or task not in after:
        return ""
    old, new = task_values(before[task])[0], task_values(after[task])[0]
    if run == "none":
        return f"{100 * mean(new).value:.1f}"
    moved = mean([b - a for a, b in zip(old, new, strict=True)])
    return f"{100 * moved.value:+.1f} ± {100 * moved.half:.1f}"


def costs(folder: Path = FOLDER) -> Grid:
    """Seconds an edit and an answer, bytes, and what was spent before the first edit, at the most facts measured."""
    lines = []
    for model in _models(folder):
        best: dict[tuple[str, int], Row] = {}
        for line in every(folder):
            if line["model"] == model and line.get("costs") and not line["baseline"]:
                key = (line["run"], line["commit"])
                best[key] = max(best.get(key, line), line, key=lambda one: one["n"])
        for (run, commit), line in sorted(best.items()):
            lines.append([MODELS.get(model, model), _name(run, commit), f"{line['n']:,}", *_spent(line)])
    head = (
        "model",
        "editor",
        "facts",
        "s an edit",
        "s an answer",
        "patch",
        "statistics, s",
        "training, s",
        "perplexity",
    )
    return Grid(head, lines, "An answer: 16 tokens, one prompt at a time. Statistics of 0 s were there already.")


def _spent(line: Row) -> list[str]:
    found, edit = line["costs"], line["made"].get("edit_s", line["costs"].get("edit_s"))
    times = [edit, found.get("answer_s")]
    cells = ["" if time is None else f"{time:.3g}" for time in times]
    cells.append(size(found["bytes"]) if found.get("bytes") else "")
    cells += ["" if found.get(name) is None else f"{found[name]:.3g}" for name in ("statistics_s", "training_s")]
    return [*cells, "" if found.get("perplexity") is None else f"{found['perplexity']:.2f} ×"]


def verdict(folder: Path = FOLDER) -> str:
    """Of each cell who states most, and where each of the others loses, from the rows."""
    said = []
    for model in _models(folder):
        for chosen, title in SETS.items():
            found = runs(folder, model, chosen)
            for n in sorted({line[1] for line in found}):
                said += _cell(found, n, f"{MODELS.get(model, model)}, {title}, {n:,} facts")
    return "\n".join(said) or NOTHING


def _cell(found: dict[Line, list[Row]], n: int, title: str) -> list[str]:
    names = {"stating it": ("edit", "em"), "other words": ("rephrase", "em"), "other answers": ("loc/", "same")}
    scores = {}
    for run, size_, commit in found:
        if size_ == n and run not in BASELINES:
            numbers = {word: average(found[run, n, commit], *of) for word, of in names.items()}
            if all(one and one.n >= ENOUGH for one in numbers.values()):
                scores[_name(run, commit)] = {word: one.value for word, one in numbers.items() if one}
    if len(scores) < 2:
        return []
    best = max(scores, key=lambda name: _harmonic(scores[name].values()))
    lost = []
    for name, own in scores.items():
        word, gap = max(((word, scores[best][word] - own[word]) for word in own), key=lambda pair: pair[1])
        if gap >= GAP:
            lost.append(f"{name} in {word} ({100 * gap:.0f} points)")
    rest = f" Behind it: {'; '.join(lost)}." if lost else ""
    return [f"- **{title}**: {best}.{rest}"]


def _harmonic(parts: Any) -> float:
    parts = list(parts)
    return len(parts) / sum(1 / part for part in parts) if min(parts) > 0 else 0.0


TABLES: dict[str, tuple[str, Callable[[Path], Grid]]] = {
    "forced": ("Teacher-forced, as in the papers, %", forced),
    "generated": ("By free generation, %", generated),
    "axes": ("Axes apart, by free generation, %", axes),
    "general": ("General ability after 1,000 facts", general),
    "costs": ("Costs", costs),
}


def block(name: str, folder: Path = FOLDER) -> str:
    """One table for a page."""
    grid = TABLES[name][1](folder)
    return grid.markdown() if grid.lines else NOTHING


def others() -> str:
    """What others reported, and what could not be read."""
    lines = [
        [row["editor"], row["model"], SETS[row["set"]], row["source"],
         *("" if row[one] is None else f"{row[one]:.1f}" for one in ("reliability", "generality", "locality"))]
        for row in reported()["rows"]
    ]  # fmt: skip
    head = ("editor", "model", "facts", "reported by", "reliability", "generality", "locality")
    return Grid(head, lines, f"{reported()['note']} {reported()['missing']}").markdown()


def markdown(folder: Path = FOLDER) -> str:
    """Every table, one below the other."""
    parts = [f"## {title}\n\n{block(name, folder)}" for name, (title, _) in TABLES.items()]
    return "\n\n".join([*parts, f"## Who loses, and where\n\n{verdict(folder)}"])


def latex(folder: Path = FOLDER) -> str:
    """The same tables for a paper; those without rows are left out."""
    grids = {name: (title, make(folder)) for name, (title, make) in TABLES.items()}
    parts = [grid.latex(f"{title}.", f"tab:{name}") for name, (title, grid) in grids.items() if grid.lines]
    return "\n\n".join(parts) + "\n"


BLOCKS: dict[str, Callable[[], str]] = {
    **{f"editors-{name}": partial(block, name) for name in TABLES},
    "editors-verdict": verdict, "editors-reported": others,
}  # fmt: skip
