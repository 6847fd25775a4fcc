"""Editing facts: the table of methods, what is said first, settings, a stream of commits."""

from __future__ import annotations

from .facts_rows import metric
from .rows import of, runs, summary
from .stats import Mean, mean, number, percent, size, table

HEAD = (
    "method", "facts in the model", "n", "efficacy", "paraphrase",
    "says it twice or more", "distinct-2", "KL, same relation", "KL, unrelated", "bytes per fact",
)  # fmt: skip
CELLS = ("stated", "reworded", "twice", "distinct", "KL near", "KL far")
Line = tuple[str, str, str]
"""What the table calls it, folder, run."""
COUNTERFACT: tuple[Line, ...] = (
    ("no edit", "facts-commit", "none"),
    ("fact in the prompt", "facts-commit", "fact_in_prompt"),
    ("`rome`, one at a time", "facts-single", "rome"),
    ("`r_rome`, one at a time", "facts-single", "r_rome"),
    ("`finetune` (FT-M), one at a time", "facts-single", "ft_m"),
    ("`finetune` with a norm limit (FT-L), one at a time", "facts-single", "ft_l"),
    ("`memit`, one commit", "facts-commit", "memit"),
    ("`memit`, `solver=alphaedit`, one commit", "facts-commit", "memit_alphaedit"),
    ("`finetune` (FT-M), one commit", "facts-commit", "ft_m"),
    ("`recipe`", "recipe-counterfact-1000", "recipe"),
    ("`recipe`", "recipe-counterfact-5000", "recipe"),
    ("`recipe`, `insert=text` (RAG)", "recipe-counterfact-5000", "recipe_text"),
)
ZSRE: tuple[Line, ...] = (
    ("no edit", "recipe-zsre-402", "none"),
    ("fact in the prompt", "recipe-zsre-402", "fact_in_prompt"),
    ("`recipe`", "recipe-zsre-402", "recipe"),
    ("`recipe`, `insert=text` (RAG)", "recipe-zsre-402", "recipe_text"),
)
WIKI: tuple[Line, ...] = (
    ("no edit", "recipe-wiki-500", "none"),
    ("fact in the prompt", "recipe-wiki-500", "fact_in_prompt"),
    ("`memit`, `solver=alphaedit`, one commit", "facts-commit-wiki", "memit_alphaedit"),
    ("`finetune` (FT-M), one commit", "facts-commit-wiki", "ft_m"),
    ("`recipe`", "recipe-wiki-500", "recipe"),
    ("`recipe`, `insert=text` (RAG)", "recipe-wiki-500", "recipe_text"),
)
SETS = {"CounterFact": COUNTERFACT, "zsRE": ZSRE, "wiki": WIKI}
BASELINES = ("none", "fact_in_prompt")


def facts_table() -> str:
    """Every method on three sets of facts."""
    lines = [[f"**{name}**", *[""] * (len(HEAD) - 1)] for name in SETS]
    whole = [row for head, rows in zip(lines, SETS.values(), strict=True) for row in (head, *map(_line, rows))]
    return table(HEAD, whole)


SHORT: dict[str, tuple[Line, ...]] = {
    "CounterFact": (
        ("no edit", "facts-commit", "none"),
        ("fact in the prompt", "facts-commit", "fact_in_prompt"),
        ("`rome`", "facts-single", "rome"),
        ("`memit` (AlphaEdit)", "facts-commit", "memit_alphaedit"),
        ("fine-tuning (FT-M)", "facts-commit", "ft_m"),
        ("`recipe`", "recipe-counterfact-1000", "recipe"),
    ),
    "zsRE, questions unlike the editor's training": (
        ("fact in the prompt", "recipe-zsre-402", "fact_in_prompt"),
        ("`recipe`", "recipe-zsre-402", "recipe"),
    ),
}


def facts_short() -> str:
    """The first page's table: few methods, few columns."""
    head = ("method", "facts in the model", "n", "efficacy", "paraphrase", "says it twice", "KL elsewhere")
    lines = []
    for name, rows in SHORT.items():
        lines.append([f"**{name}**", *[""] * (len(head) - 1)])
        for row in rows:
            label, facts, n, stated, reworded, twice, _, near, far, _ = _line(row)
            lines.append([label, facts, n, stated, reworded, twice, near or far])
    return table(head, lines)


def _line(line: Line) -> list[str]:
    label, folder, run = line
    found = {name: metric(folder, run, name) for name in CELLS}
    stated = _stated(folder, run)
    shares = [percent(found[name], n=stated.n) for name in ("reworded", "twice")]
    numbers = [number(found[name], digits, stated.n) for name, digits in (("distinct", 2), ("KL near", 2))]
    far = found["KL far"]
    numbers.append(number(far, 2 if far and far.value > 0.1 else 3, stated.n))
    if run == "none":
        numbers[1:] = ["0", "0"] if found["KL near"] or folder.startswith("facts") else ["", "0"]
    return [label, _facts(folder, run), str(stated.n), percent(stated), *shares, *numbers, _bytes(folder, run)]


def _stated(folder: str, run: str) -> Mean:
    found = metric(folder, run, "stated")
    if found is None:
        raise KeyError(f"{folder}, {run}: no edit prompt was asked")
    return found


def _facts(folder: str, run: str) -> str:
    count = runs(folder)[run]["n_edits"]
    return "" if run in BASELINES else f"{count:,}"


def _bytes(folder: str, run: str) -> str:
    if run in BASELINES:
        return ""
    if run.startswith("recipe"):
        return size(summary("recipe-speed.json")["results"]["bytes_per_edit"])
    return size(runs(folder)[run]["bytes_per_edit"])


def facts_verdict() -> str:
    """What speaks against the methods, before the table."""

    def share(name: str, folder: str, run: str) -> str:
        return percent(metric(folder, run, name))

    def kl(folder: str, run: str) -> str:
        return number(metric(folder, run, "KL near"))

    many, one, commit, zsre, wiki = "recipe-counterfact-1000", "facts-single", "facts-commit", ZSRE[0][1], WIKI[0][1]
    fires = summary("recipe-retrieval.json")["results"]
    fired = [f"{100 * fires[f'recipe/{n}']['neighbour_false_fire']:.1f} %" for n in (1000, 5000)]
    text, recipe = ([share("stated", folder, run) for folder in (zsre, wiki)] for run in ("fact_in_prompt", "recipe"))
    twice = [share("twice", *run) for run in ((many, "recipe"), (many, "fact_in_prompt"), (one, "rome"))]
    reworded = [share("reworded", *run) for run in ((one, "rome"), (commit, "memit"), (one, "ft_m"))]
    said = [
        f"**Plain text states rare names more often.** The fact in the prompt is stated in {text[0]} on zsRE and in "
        f"{text[1]} on wiki facts; with `recipe` it is {recipe[0]} and {recipe[1]}.",
        f"**Answers repeat themselves.** With `recipe` (1,000 facts) {twice[0]} of the answers say the target twice or "
        f"more, with the fact in the prompt {twice[1]}, with `rome` {twice[2]}.",
        f"**`recipe` fires on more neighbours the more facts it holds**: {fired[0]} of them with 1,000 facts, "
        f"{fired[1]} with 5,000.",
        f"**Fine-tuning does most harm to other facts**: the next-token distribution of neighbours moves by "
        f"{kl(one, 'ft_m')} nats, with `rome` by {kl(one, 'rome')}.",
        f"**Methods that write weights reach few paraphrases**: `rome` {reworded[0]}, `memit` {reworded[1]}, "
        f"FT-M {reworded[2]}.",
    ]
    return "\n".join(f"- {line}" for line in said)


def facts_settings() -> str:
    """The settings of every row, as the run recorded them."""
    seen: list[list[str]] = []
    for lines in SETS.values():
        for label, folder, run in lines:
            if run not in BASELINES:
                method = runs(folder)[run]["settings"]["method"]
                given = [f"`{key}={value}`" for key, value in method.items() if value not in (None, False, "", 0, 0.0)]
                given = [text[:16] + "…`" if text.startswith("`editor=") else text for text in given]
                seen.append([label, f"`{folder}`", runs(folder)[run]["dtype"], ", ".join(given)])
    return table(("method", "run", "dtype", "settings that are not off"), seen)


def facts_stream() -> str:
    """MEMIT in commits of 100 until the model has collapsed."""
    record = runs("facts-stream")["memit"]
    rows = [row for row in of("facts-stream", "memit") if row["kind"] == "edit" and row.get("em") is not None]
    before = {row["case_id"]: bool(row["em"]) for row in rows if row["when"] == "immediate"}
    after = {row["case_id"]: bool(row["em"]) for row in rows if row["when"] == "final"}
    right = [case for case, value in before.items() if value]
    lost = sum(not after[case] for case in right)
    health = record["health"]
    shares = [
        ("right after its own commit", mean([float(v) for v in before.values()])),
        ("the same facts at the end", mean([float(after[case]) for case in before])),
        ("the difference", mean([float(after[c]) - before[c] for c in before])),
        ("at the end, with the facts that were never written", mean([float(v) for v in after.values()])),
    ]
    lines = [[label, f"{100 * m.value:.1f} ± {100 * m.half:.1f}", str(m.n)] for label, m in shares]
    worse = health["perplexity_max"] / health["base_perplexity"]
    told = (
        f"`memit`, {record['n_edits']:,} facts in commits of {record['commit_size']}; a sample of the facts is asked "
        f"again later. "
        f"After {record['collapsed_at'][0]} facts the perplexity is {worse:.1f} times the unpatched model's and the "
        f"run stops. Of the {len(right)} facts that were right just after their commit {lost} are lost, "
        f"{100 * lost / len(right):.0f} %."
    )
    return told + "\n\n" + table(("efficacy", "% or points", "n"), lines)
