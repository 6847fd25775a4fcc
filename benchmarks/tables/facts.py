"""Editing facts: the tables of methods, what is said first, a stream of commits."""

from __future__ import annotations

from .facts_rows import empty, metric, still_right
from .memory import recipe_verdict
from .rows import of, runs
from .stats import Mean, mean, number, percent, table

HEAD = (
    "method", "facts in the model", "n", "efficacy", "states it once", "paraphrase", "suggested",
    "says it twice or more", "distinct-2",
)  # fmt: skip
CELLS = ("once", "reworded", "suggested", "twice")
ELSEWHERE = ("method", "facts in the model", "KL, same relation", "KL, unrelated", "same relation, still right")
Line = tuple[str, str, str]
"""What the table calls it, folder, run."""
SETS: dict[str, tuple[Line, ...]] = {
    "CounterFact, the same 100 facts in each row": (
        ("no edit", "facts-commit", "none"),
        ("fact in the prompt", "facts-commit", "fact_in_prompt"),
        ("`rome`, one at a time", "facts-single", "rome"),
        ("`r_rome`, one at a time", "facts-single", "r_rome"),
        ("`finetune` (FT-M), one at a time", "facts-single", "ft_m"),
        ("`finetune` with a norm limit (FT-L), one at a time", "facts-single", "ft_l"),
        ("`memit`, one commit", "facts-commit", "memit"),
        ("`memit`, `solver=alphaedit`, one commit", "facts-commit", "memit_alphaedit"),
        ("`finetune` (FT-M), one commit", "facts-commit", "ft_m"),
        ("`recipe` of 0.1.0", "recipe-counterfact-100", "recipe"),
    ),
    "CounterFact, 100 of 1,000 facts": (
        ("fact in the prompt", "recipe-counterfact-1000", "fact_in_prompt"),
        ("`recipe` of 0.1.0", "recipe-counterfact-1000", "recipe"),
    ),
    "CounterFact, 100 of 5,000 facts": (
        ("fact in the prompt", "recipe-counterfact-5000", "fact_in_prompt"),
        ("`recipe` of 0.1.0", "recipe-counterfact-5000", "recipe"),
        ("`recipe` of 0.1.0, `insert=text` (RAG)", "recipe-counterfact-5000", "recipe_text"),
    ),
    "zsRE, 100 of 402 facts": (
        ("no edit", "recipe-zsre-402", "none"),
        ("fact in the prompt", "recipe-zsre-402", "fact_in_prompt"),
        ("`recipe` of 0.1.0", "recipe-zsre-402", "recipe"),
        ("`recipe` of 0.1.0, `insert=text` (RAG)", "recipe-zsre-402", "recipe_text"),
    ),
    "wiki, the same 100 facts in each row": (
        ("no edit", "facts-commit-wiki", "none"),
        ("fact in the prompt", "facts-commit-wiki", "fact_in_prompt"),
        ("`memit`, `solver=alphaedit`, one commit", "facts-commit-wiki", "memit_alphaedit"),
        ("`finetune` (FT-M), one commit", "facts-commit-wiki", "ft_m"),
        ("`recipe` of 0.1.0", "recipe-wiki-100", "recipe"),
    ),
    "wiki, 100 of 500 facts": (
        ("fact in the prompt", "recipe-wiki-500", "fact_in_prompt"),
        ("`recipe` of 0.1.0", "recipe-wiki-500", "recipe"),
        ("`recipe` of 0.1.0, `insert=text` (RAG)", "recipe-wiki-500", "recipe_text"),
    ),
}
"""The rows of one set were asked the same facts, the baseline among them."""
SHORT: dict[str, tuple[Line, ...]] = {
    "CounterFact": (
        ("no edit", "facts-commit", "none"),
        ("fact in the prompt", "facts-commit", "fact_in_prompt"),
        ("`rome`", "facts-single", "rome"),
        ("`memit` (AlphaEdit)", "facts-commit", "memit_alphaedit"),
        ("fine-tuning (FT-M)", "facts-commit", "ft_m"),
        ("`recipe` of 0.1.0", "recipe-counterfact-100", "recipe"),
    ),
    "zsRE, held-out facts": (
        ("fact in the prompt", "recipe-zsre-402", "fact_in_prompt"),
        ("`recipe` of 0.1.0", "recipe-zsre-402", "recipe"),
    ),
}
BASELINES = ("none", "fact_in_prompt")


def facts_table() -> str:
    """What is stated: every method on three sets of facts."""
    lines = []
    for name, rows in SETS.items():
        lines.append([f"**{name}**", *[""] * (len(HEAD) - 1)])
        lines += [_line(row) for row in rows]
    return table(HEAD, lines)


def facts_elsewhere() -> str:
    """What else moves. The unpatched model moves nothing and has no row."""
    lines = []
    for name, rows in SETS.items():
        lines.append([f"**{name}**", *[""] * (len(ELSEWHERE) - 1)])
        lines += [_elsewhere(row) for row in rows if row[2] != "none"]
    return table(ELSEWHERE, lines)


def facts_short() -> str:
    """The first page's table: few methods, few columns, no n in the cells."""
    head = (
        "method", "facts in the model", "efficacy", "states it once", "paraphrase", "suggested",
        "KL, same relation", "KL, unrelated",
    )  # fmt: skip
    lines = []
    for name, rows in SHORT.items():
        lines.append([f"**{name}**", *[""] * (len(head) - 1)])
        for label, folder, run in rows:
            shares = [percent(metric(folder, run, cell)) for cell in ("stated", "once", "reworded", "suggested")]
            lines.append([label, _facts(folder, run), *shares, *_moved(folder, run)])
    folder, zsre = (rows[0][1] for rows in SHORT.values())
    n, same, suggested = (_n(folder, name) for name in ("stated", "reworded", "suggested"))
    told = (
        f"n = {n} facts in each row. Of the {same + suggested} reworded prompts of CounterFact {same} ask the same and "
        f"{suggested} only suggest the fact; all {_n(zsre, 'reworded')} of zsRE ask the same. (≥ 96) and (≤ 4) are "
        "bounds where all answers agree."
    )
    return table(head, lines) + "\n\n" + told


def facts_blanks() -> str:
    """Where the unpatched model says nothing, which some columns cannot see."""
    zsre = "recipe-zsre-402"
    said = {
        "zsRE": empty(zsre, "none", "edit"),
        "reworded": empty(zsre, "none", "rephrase"),
        "prompt": empty(zsre, "fact_in_prompt", "edit"),
        "unrelated": empty("facts-commit", "none", "loc/unrelated"),
    }
    part = {name: f"{few} of {all_}" for name, (few, all_) in said.items()}
    return (
        f"**Empty answers.** The unpatched model answers {part['zsRE']} zsRE questions with no word at all, and "
        f"{part['reworded']} of their rewordings. Its 0 % there and its distinct-2 of 1 say nothing. With the fact in "
        f"the prompt {part['prompt']} are empty. The unrelated questions stand without a question mark, and "
        f"{part['unrelated']} unpatched answers to them are a mark or a special token without a word, so that "
        "*unchanged* is easy there."
    )


def _n(folder: str, name: str) -> int:
    found = metric(folder, "fact_in_prompt", name)
    return found.n if found else 0


def _line(line: Line) -> list[str]:
    label, folder, run = line
    stated = _stated(folder, run)
    shares = [percent(metric(folder, run, name), n=stated.n) for name in CELLS]
    distinct = number(metric(folder, run, "distinct"), 2, stated.n)
    return [label, _facts(folder, run), str(stated.n), percent(stated), *shares, distinct]


def _elsewhere(line: Line) -> list[str]:
    label, folder, run = line
    right, of_ = still_right(folder, run, "loc/same_relation")
    moved = _moved(folder, run, _stated(folder, run).n)
    return [label, _facts(folder, run), *moved, f"{right} of {of_}" if of_ else ""]


def _moved(folder: str, run: str, n: int | None = None) -> list[str]:
    """KL of the same relation and of unrelated prompts."""
    near, far = (metric(folder, run, name) for name in ("KL near", "KL far"))
    if run == "none":
        return ["0" if near else "", "0"]
    return [number(near, 2, n), number(far, 2 if far and far.value > 0.1 else 3, n)]


def _stated(folder: str, run: str) -> Mean:
    found = metric(folder, run, "stated")
    if found is None:
        raise KeyError(f"{folder}, {run}: no edit prompt was asked")
    return found


def _facts(folder: str, run: str) -> str:
    count = runs(folder)[run]["n_edits"]
    return "" if run in BASELINES else f"{count:,}"


def facts_verdict() -> str:
    """What speaks against the methods, before the table and from its rows."""
    prompt, rome, ft_m, recipe = (SHORT["CounterFact"][i][1:] for i in (1, 2, 4, 5))

    def share(name: str, where: tuple[str, str]) -> str:
        return percent(metric(*where, name))

    lost = [share("stated", ("general-facts", run)) for run in ("memit", "memit_alphaedit")]
    said = [
        *recipe_verdict(),
        "**`recipe` of 0.1.0 repeats itself.** "
        f"{share('once', recipe)} of its answers state the fact once; with the fact in the prompt "
        f"{share('once', prompt)} do, with `rome` {share('once', rome)}.",
        "**Fine-tuning does most harm to other facts**: it moves the next-token distribution of neighbours by "
        f"{number(metric(*ft_m, 'KL near'))} nats, one `rome` by {number(metric(*rome, 'KL near'))}.",
        f"**At 1,000 facts `memit` loses the facts, too**: it states {lost[0]} of them, with AlphaEdit {lost[1]} "
        "(100 asked, bf16).",
    ]
    return "\n".join(f"- {line}" for line in said)


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
