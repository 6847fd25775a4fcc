"""Following a context: MemoTrap and COSE_KRE, every method beside the unpatched model and its best wording."""

from __future__ import annotations

from collections import Counter

from .facts_rows import normalise
from .rows import Row, of, runs, summary
from .stats import Mean, mean, percent, points, table

Values = dict[int, float]
ROWS = (
    ("`ircan`", "ircan"), ("`cad`", "cad"), ("`ircan` and `cad`", "ircan + cad"), ("`adacad`", "adacad"),
    ("`coiecd`", "coiecd"), ("`power`", "power"), ("`grd`", "grd"), ("`arr`", "arr"), ("`param_mute`", "param_mute"),
    ("`iti`, probe", "iti probe"), ("`iti`, mass mean", "iti mass_mean"), ("`scone`", "scone"),
)  # fmt: skip
CHOSEN = {
    "ircan": "{0:g} neurons, factor {1:g}", "ircan + cad": "{0:g} neurons, factor {1:g}",
    "scone": "{0:g} neurons, factor {1:g}", "param_mute": "{0:g} layers, factor {1:g}",
    "iti probe": "{0:g} heads, strength {1:g}", "iti mass_mean": "{0:g} heads, strength {1:g}",
    "cad": "alpha = {1:g}", "coiecd": "alpha = {1:g}",
    "adacad": "floor {1:g}", "power": "tau = {1:g}", "grd": "lambda = {1:g}",
}  # fmt: skip
WORDINGS = {"memotrap": "instr+opin", "cose": "instr"}
"""The one with the highest ACC on test: the best a prompt can do, chosen in hindsight."""


def values(folder: str, run: str, name: str) -> Values:
    """Place -> value of every record that was asked. ``bcu`` is the mean of ``acc`` and ``kept`` of a record."""
    if name == "bcu":
        one, other = values(folder, run, "acc"), values(folder, run, "kept")
        return {place: (value + other[place]) / 2 for place, value in one.items() if place in other}
    when = "foreign" if name == "kept" else "context"
    rows = [row for row in of(folder, run) if row["when"] == when and row.get("said") is not None]
    return {row.get("place", 0): _value(row, name) for row in rows if name != "sr" or row.get("memory")}


def _value(row: Row, name: str) -> float:
    if name == "kept":
        return float(row["kept"])
    if name == "begins":
        return float(f"{normalise(row['said'])} ".startswith(f"{normalise(row['answer'])} "))
    return float(row["said"] == row["answer" if name == "acc" else "memory"])


def share(folder: str, run: str, name: str) -> Mean | None:
    """In which share of the records; None where the run was not asked."""
    found = list(values(folder, run, name).values())
    return mean(found) if found else None


def moved(folder: str, run: str, name: str, other: str = "none") -> Mean:
    """Minus the unpatched model, or another run, record by record."""
    before, after = values(folder, other, name), values(folder, run, name)
    return mean([after[place] - before[place] for place in after if place in before])


def _lines(task: str, kept: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """One line per run: column -> cell."""
    folder, best = f"ircan-{task}", f"none, {WORDINGS[task]}"
    chosen = summary(f"{folder}/chosen.json")["chosen"]
    named = [("unpatched", "none"), (f"unpatched, best wording (`{WORDINGS[task]}`)", best), *ROWS]
    lines = []
    for label, run in named:
        if run in runs(folder) and (not kept or run in kept):
            setting = CHOSEN[run].format(*chosen[run]) if run in CHOSEN else ""
            line = {"label": label, "setting": setting}
            line |= {name: percent(share(folder, run, name), 1) for name in ("acc", "begins", "sr", "kept", "bcu")}
            line["acc moved"] = "" if run == "none" else points(moved(folder, run, "acc"))
            line["bcu moved"] = "" if run == best else points(moved(folder, run, "bcu", best))
            lines.append(line)
    return lines


def _table(task: str, head: dict[str, str], kept: tuple[str, ...] = ()) -> str:
    """The columns that ``head`` names."""
    n = share(f"ircan-{task}", "none", "acc")
    lines = [[line[name] for name in head] for line in _lines(task, kept)]
    return table(tuple(head.values()), lines) + f"\n\nn = {n.n if n else 0} records each, bf16."


def memotrap_table() -> str:
    dev = summary("ircan-memotrap/chosen.json")["dev_records"]
    head = {
        "label": "method", "setting": f"chosen on {dev} dev records", "acc": "follows the instruction (ACC)",
        "acc moved": "ACC minus unpatched, points", "begins": "the same, begins with it", "sr": "the proverb (SR)",
        "kept": "ignores an irrelevant instruction", "bcu": "BCU", "bcu moved": "BCU minus best wording, points",
    }  # fmt: skip
    return _table("memotrap", head)


def cose_table() -> str:
    dev = summary("ircan-cose/chosen.json")["dev_records"]
    head = {
        "label": "method", "setting": f"chosen on {dev} dev records", "acc": "the passage's letter (ACC)",
        "acc moved": "ACC minus unpatched, points", "sr": "the right letter (SR)",
        "kept": "ignores an irrelevant passage", "bcu": "BCU", "bcu moved": "BCU minus best wording, points",
    }  # fmt: skip
    return _table("cose", head)


def context_table() -> str:
    """The rows of MemoTrap that are read first."""
    kept = ("none", "none, instr+opin", "ircan", "cad", "ircan + cad", "param_mute")
    head = {
        "label": "MemoTrap", "acc": "follows the instruction", "kept": "ignores an irrelevant instruction",
        "bcu": "mean of both (BCU)", "bcu moved": "BCU minus best wording, points",
    }  # fmt: skip
    return _table("memotrap", head, kept)


def memotrap_matching() -> str:
    """What the two columns' rules let through and keep out."""
    held = [row for row in of("ircan-memotrap", "none") if row["when"] == "foreign" and row.get("kept")]
    first = Counter(next(iter(row["said"].casefold().split()), "") for row in held)
    idle = sum(first[word] for word in ("the", "a", "an", ""))
    strict, begins = (share("ircan-memotrap", "none", name) for name in ("acc", "begins"))
    return (
        '**Matching.** ACC counts an answer only if it is the wanted word letter by letter. So "tense," or "edify '
        'them" count as wrong. If it is enough that the answer begins with the word, as in the bench `facts`, the '
        f"unpatched model has {percent(begins, 1)} instead of {percent(strict, 1)}. *Ignores* compares first words "
        f'only: of the unpatched model\'s {len(held)} hits {idle} are "the", "a", "an" or an empty answer.'
    )


def _controls(task: str) -> str:
    folder = f"ircan-{task}"
    lines = [["IRCAN's neurons erased", percent(share(folder, "ErCAN", "acc"), 1), "1"]]
    names = {
        "ERN": "as many random neurons, IRCAN's factor", "ErRN": "as many random neurons, erased",
        "iti random": "`iti`, random heads", "param_mute random": "`param_mute`, random layers",
    }  # fmt: skip
    for prefix, label in names.items():
        seeds = [run for run in runs(folder) if run.startswith(f"{prefix} ")]
        accs = [one.value for run in seeds if (one := share(folder, run, "acc"))]
        if accs:
            ends = f" ({100 * min(accs):.1f} to {100 * max(accs):.1f})"
            lines.append([label, f"{100 * sum(accs) / len(accs):.1f} %{ends}", str(len(accs))])
    return table(("control", "ACC (lowest to highest of the seeds)", "seeds"), lines)


def memotrap_controls() -> str:
    return _controls("memotrap")


def cose_controls() -> str:
    return _controls("cose")


def cose_letters() -> str:
    """Which letters the model answers, whatever the question is."""
    asked = (
        ("the question alone", "none", "bare"), ("with its passage", "none", "context"),
        ("with its passage, wording `instr`", "none, instr", "context"),
    )  # fmt: skip
    letters = "ABCDE"
    lines = []
    for label, run, when in asked:
        said = Counter(row.get("said") for row in of("ircan-cose", run) if row["when"] == when)
        lines.append([label, *(str(said[letter]) for letter in letters)])
    wanted = Counter(row["memory"] for row in of("ircan-cose", "none") if row["when"] == "bare")
    told = Counter(row["answer"] for row in of("ircan-cose", "none") if row["when"] == "bare")
    lines.append(["right answers", *(str(wanted[letter]) for letter in letters)])
    lines.append(["answers of the passages", *(str(told[letter]) for letter in letters)])
    return table(("answers of the unpatched model", *letters), lines)


def context_costs() -> str:
    """Seconds of finding neurons, and of answers under a decoding rule."""
    found, rules = summary("attribution.json"), summary("decoding.json")["1 at once"]
    lines = [
        [f"finding neurons, a record of {found[key]['tokens']} tokens", f"{found[key]['fast_s_per_record']:.1f} s"]
        for key in ("35", "256")
    ]
    for name, ratio in rules["ratio"].items():
        label = "`ircan`, 8 columns scaled" if name == "ircan" else f"`{name}`"
        lines.append(
            [f"{label}: an answer of {rules['new_tokens']} tokens", f"{ratio:.2f} × a plain generation of two rows"]
        )
    asked = f"The ratios are medians over repeats of n = {rules['questions']} question, without an error."
    return table(("what", "time, or ratio"), lines) + f"\n\n{asked}"
