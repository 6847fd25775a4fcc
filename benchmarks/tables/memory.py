"""RECIPE's memory: how well it works as it grows, what it finds, what it costs, what its editor had seen."""

from __future__ import annotations

from .facts_rows import metric
from .rows import RESULTS, runs, summary
from .stats import NORMAL, Mean, number, percent, size, table

Line = tuple[str, str, str]
QUALITY: tuple[Line, ...] = (
    ("**baseline of 1, 10, 100**: fact in the prompt", "recipe-counterfact-100", "fact_in_prompt"),
    ("1", "recipe-counterfact-1", "recipe"),
    ("10", "recipe-counterfact-10", "recipe"),
    ("100", "recipe-counterfact-100", "recipe"),
    ("**baseline of 1,000**: fact in the prompt", "recipe-counterfact-1000", "fact_in_prompt"),
    ("1,000", "recipe-counterfact-1000", "recipe"),
    ("**baseline of 5,000**: fact in the prompt", "recipe-counterfact-5000", "fact_in_prompt"),
    ("5,000", "recipe-counterfact-5000", "recipe"),
    ("5,000, the fact as text (RAG)", "recipe-counterfact-5000", "recipe_text"),
    ("5,000, a cosine in place of the sentinel", "recipe-counterfact-5000", "recipe_cosine"),
)
NAMES: tuple[Line, ...] = tuple(
    (f"{title}, {label}", folder, run)
    for title, folder in (("zsRE, 402", "recipe-zsre-402"), ("wiki, 500", "recipe-wiki-500"))
    for label, run in (
        ("fact in the prompt", "fact_in_prompt"),
        ("`recipe` of 0.1.0", "recipe"),
        ("the fact as text (RAG)", "recipe_text"),
    )
)


def _shares(folder: str, run: str, names: tuple[str, ...]) -> list[str]:
    stated = metric(folder, run, "stated")
    n = stated.n if stated else 0
    return [str(n), *(percent(metric(folder, run, name), n=n) for name in names)]


def memory_quality() -> str:
    """CounterFact as the memory grows; generated, and teacher-forced beside it."""
    names = ("stated", "once", "reworded", "suggested", "kept near", "kept far", "twice")
    lines = []
    for label, folder, run in QUALITY:
        cells = _shares(folder, run, names)
        lines.append([label, *cells, number(metric(folder, run, "distinct"))])
    head = ("facts in the memory", "n", "efficacy", "states it once", "paraphrase", "suggested")
    kept = ("same relation unchanged", "unrelated unchanged")
    return table((*head, *kept, "says it twice or more", "distinct-2"), lines)


def memory_teacher_forced() -> str:
    """The same runs as papers give them, and over 1,000 cases."""
    names = ("tf stated", "tf reworded", "tf suggested", "tf near", "tf far")
    lines = [[label, *_shares(folder, run, names)] for label, folder, run in QUALITY]
    forced = summary("recipe-forced.json")["results"]
    for n in (1000, 5000):
        parts = [forced[f"{n}/{name}"] for name in ("tf_reliability", "tf_generality")]
        means = [Mean(part["value"], NORMAL * part["stderr"], part["n"]) for part in parts]
        stated, mixed = (percent(m, 1) for m in means)
        lines.append([f"{n:,}, more cases", str(means[0].n), stated, f"both parts: {mixed}", "", "", ""])
    head = ("facts in the memory", "n", "efficacy", "paraphrase", "suggested", "same relation unchanged")
    return table((*head, "unrelated unchanged"), lines)


def memory_retrieval() -> str:
    """Which questions retrieve a fact."""
    found = summary("recipe-retrieval.json")["results"]
    lines = []
    for gate, label in (("recipe", "sentinel"), ("recipe_cosine", "cosine")):
        for n in (100, 1000, 5000):
            row = found[f"{gate}/{n}"]
            keys = ("edit_used", "rephrase_used", "neighbour_false_fire", "unrelated_false_fire")
            lines.append([label, f"{n:,}", str(row["cases"]), *(f"{100 * row[key]:.1f} %" for key in keys)])
    head = (
        "gate",
        "facts in the memory",
        "facts asked",
        "edit prompts that retrieve their fact",
        "reworded prompts that do",
    )
    return table((*head, "neighbours that retrieve one", "unrelated that retrieve one"), lines)


GATES = {"1.0": "sentinel alone", "0.8": "with the verifier", "0.7": "with it, `doubt=0.7`"}


def memory_scale() -> str:
    """Which questions use a fact as the memory grows to a million."""
    if not (RESULTS / "recipe-scale.json").exists():
        return "Not measured yet: `benchmarks/recipe_scale.py` makes the figures."
    lines = []
    for facts, kinds in summary("recipe-scale.json")["results"].items():
        for doubt, gate in GATES.items():
            cells = [f"{100 * kinds[kind][f'{doubt}, its own']:.1f} %" for kind in ("told", "reworded")]
            cells += [f"{100 * kinds[kind][doubt]:.1f} %" for kind in ("same relation", "unrelated")]
            lines.append([f"{int(facts):,}", gate, *cells])
    kinds = summary("recipe-scale.json")["results"]["1000"]
    n = {kind: kinds[kind]["n"] for kind in ("told", "reworded", "same relation", "unrelated")}
    head = (
        "facts in the memory", "gate", f"its own wording finds the fact (n = {n['told']:,})",
        f"in other words (n = {n['reworded']:,})", f"same relation, another subject (n = {n['same relation']:,})",
        f"unrelated (n = {n['unrelated']:,})",
    )  # fmt: skip
    return table(head, lines)


def memory_names() -> str:
    """Facts of other sets, no training saw them; what follows from a fact."""
    lines = []
    for label, folder, run in NAMES:
        names = ("stated", "once", "reworded", "tf stated", "tf reworded", "twice", "kept subject", "kept far")
        lines.append([label, *_shares(folder, run, (*names, "alias", "composition"))])
    head = (
        "facts, method", "n", "efficacy", "states it once", "paraphrase", "efficacy, teacher-forced",
        "paraphrase, teacher-forced", "says it twice or more", "same subject unchanged", "unrelated unchanged",
        "alias of the subject", "composition",
    )  # fmt: skip
    return table(head, lines)


SETS_ASKED = {"counterfact": "CounterFact", "zsre": "zsRE", "wiki": "wiki"}


SETS_ASKED_NOW = {
    "counterfact": "CounterFact, 1,000 facts",
    "zsre": "zsRE, 402",
    "wiki": "wiki, 500",
    "real-zsre": "real questions, zsRE, 1,000",
    "real-wiki": "real questions, WikiBigEdit, 1,000",
}
ASKED_MODELS = {"gemma-3-270m": "Gemma-3-270M", "smollm2-135m-instruct": "SmolLM2-135M-Instruct"}
ASKED_FORMS = {
    "none": "unpatched",
    "fact_before": "fact before the question",
    "recipe": "`recipe`",
    "vectors": "`recipe`, vectors alone",
}


def _asked(model: str) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = summary(f"recipe-answers-{model}.json")["results"]
    return found


def _share(row: dict[str, float] | None, name: str, digits: int = 0) -> str:
    if row is None or name not in row:
        return ""
    value, n = row[name], int(row["n"])
    half = NORMAL * (value * (1 - value) / (n - 1)) ** 0.5 if n > 1 else 0.0
    return percent(Mean(value, half, n), digits)


def memory_answers(model: str) -> str:
    """What the packaged editor's memory answers, by generation, set by set."""
    lines = []
    for name, title in SETS_ASKED_NOW.items():
        rows = _asked(model).get(name, {})
        for form, label in ASKED_FORMS.items():
            edit, again = rows.get(f"{form}/edit"), rows.get(f"{form}/rephrase")
            if edit is None:
                continue
            beside = rows.get(f"{form}/same_subject") or rows.get(f"{form}/same_relation")
            cells = [_share(edit, key) for key in ("stated", "contained", "again", "empty")]
            cells += [f"{edit['distinct_2']:.2f}", _share(again, "stated"), _share(again, "contained")]
            unrelated = _share(rows.get(f"{form}/unrelated"), "unchanged")
            lines.append([title, label, str(int(edit["n"])), *cells, _share(beside, "unchanged"), unrelated])
    head = (
        "facts in the memory", "method", "n", "states the fact", "contains it", "says it twice or more", "empty",
        "distinct-2", "in other words: states it", "contains it", "beside the fact unchanged", "unrelated unchanged",
    )  # fmt: skip
    return table(head, lines)


def recipe_short() -> str:
    """The same of both models, in a few columns. Most of the chat model's answers behind the text were cut off before
    they came to the point, so that row stays where the page says so."""
    lines = []
    for model, label in ASKED_MODELS.items():
        for name, title in SETS_ASKED_NOW.items():
            rows = _asked(model).get(name, {})
            for form in ("fact_before", "recipe") if model == "gemma-3-270m" else ("recipe",):
                edit, again = rows.get(f"{form}/edit"), rows.get(f"{form}/rephrase")
                if edit is not None:
                    cells = [_share(edit, "contained"), _share(edit, "alone"), _share(again, "contained")]
                    cells += [_share(edit, "again"), f"{edit['distinct_2']:.2f}"]
                    lines.append([label, title, ASKED_FORMS[form], *cells])
    head = (
        "model", "facts in the memory", "method", "says the fact", "and nothing else", "in other words: says it",
        "says it twice or more", "distinct-2",
    )  # fmt: skip
    return table(head, lines)


def memory_follows(model: str) -> str:
    """Questions that a fact answers in another way: an alias, a consequence."""
    kinds = {"subject_aliasing": "alias of the subject", "reasoning": "composition", "logical_generalization": "logic"}
    lines = []
    for name, title in SETS_ASKED_NOW.items():
        rows = _asked(model).get(name, {})
        for form in ("none", "fact_before", "recipe"):
            own = [rows.get(f"{form}/{kind}") for kind in kinds]
            if any(own):
                cells = [f"{_share(row, 'contained')} (n = {int(row['n'])})" if row else "" for row in own]
                lines.append([title, ASKED_FORMS[form], *cells])
    return table(("facts in the memory", "method", *kinds.values()), lines)


def recipe_verdict() -> list[str]:
    """What speaks against the packaged editor, from its answers."""
    wiki = _asked("gemma-3-270m")["wiki"]
    follows = [_share(wiki[f"{form}/reasoning"], "contained") for form in ("recipe", "fact_before", "none")]
    return [
        "**`recipe` hardly thinks further than its facts**: of questions that follow from a fact of wiki "
        f"{follows[0]} are answered, with the fact before the question {follows[1]}, without it {follows[2]}.",
        "**`recipe` answers some questions about the same subject with the fact**: "
        f"{_share(wiki['recipe/same_subject'], 'unchanged')} of those of wiki stay as they were.",
    ]


def recipe_training() -> str:
    """What the packaged editor had seen of what it is asked, in two sentences."""
    seen = summary("recipe-exposure.json")
    shares = [f"{100 * seen[name]['template_seen']:.1f} % of {title}'s" for name, title in SETS_ASKED.items()]
    return (
        f"The editor of 0.1.0 was trained on {seen['training_facts']:,} other facts of the same three sets. No prompt "
        "that is asked was among them. But most templates were (the prompt without its subject): those of "
        f"{', '.join(shares[:2])} and {shares[2]} evaluation facts."
    )


def recipe_exposure() -> str:
    """The same, set by set."""
    seen = summary("recipe-exposure.json")
    parts = {"template": "template", "rewording": "reworded template", "target": "target", "subject": "subject"}
    lines = []
    for name, title in SETS_ASKED.items():
        shares = [f"{100 * seen[name][f'{part}_seen']:.1f} %" for part in parts]
        lines.append([title, f"{seen[name]['evaluation_facts']:,}", *shares])
    head = ("evaluation facts of", "n", *(f"{part} seen in training" for part in parts.values()))
    return table(head, lines)


def memory_costs() -> str:
    """Seconds and bytes, the memory alone on the machine."""
    made, speed = summary("memory.json"), summary("recipe-speed.json")["results"]
    search = {row["facts"]: row for row in made["search"]}
    exact = [f"{search[10**k]['median_ms']:.1f}" for k in (3, 4, 5)]
    million, single = search[10**6], made["add"]
    disk = million["disk_bytes_per_fact"], million["disk_bytes_per_fact_compacted"]
    ram = {k: search[10**k]["ram_bytes_per_fact"] / 1e3 for k in (3, 4, 5, 6)}
    extra, noise = (1e3 * (speed[f"answer_s_{name}"] - speed["answer_s_unpatched"]) for name in ("memory", "patch"))
    lines = [
        [
            "one edit: encoder pass and key",
            f"{1e3 * speed['edit_s']:.0f} ms; in bulk {1e3 * speed['bulk_s_per_edit']:.1f} ms",
        ],
        [
            f"the same, with its commit to a store of {speed['facts']:,} facts",
            f"{1e3 * speed['edit_on_disk_s']:.0f} ms",
        ],
        [
            f"an answer of 32 tokens with {speed['facts']:,} facts on disk",
            f"{speed['answer_s_memory']:.2f} s, {extra:+.0f} ms against unpatched; the same facts as a patch in RAM "
            f"{noise:+.0f} ms, so the difference is about as large as the noise",
        ],
        ["exact search among 10³, 10⁴, 10⁵ random keys", f"{', '.join(exact)} ms"],
        [
            "search with the index among 10⁶ random keys",
            f"{million['median_ms']:.0f} ms; of {million['queries']} planted facts "
            f"{million['queries'] * million['recall_at_1']:.0f} are found",
        ],
        [
            "adding facts with known keys: 10⁵ in one commit; one per commit",
            f"{single['bulk_facts_per_s']:,.0f} and {single['single_facts_per_s']:.0f} facts a second",
        ],
        [
            f"one commit of one fact: the first and the last tenth of {single['single_facts']:,}",
            f"{single['first_tenth_median_ms']:.1f} and {single['last_tenth_median_ms']:.1f} ms",
        ],
        [
            "disk per fact, 10⁶ facts",
            f"{disk[0] / 1e3:.1f} kB, {disk[1] / 1e3:.1f} kB with the index",
        ],
        [
            "RAM per fact, after the first search",
            f"{', '.join(f'{ram[k]:.1f}' for k in (3, 4, 5))} kB at 10³, 10⁴, 10⁵; {ram[6]:.1f} kB at 10⁶ (index on "
            "disk)",
        ],
        ["building the index of 10⁶ facts", f"{million['compact_s']:.0f} s"],
    ]
    return table(("what", "median"), lines)


def memory_bytes() -> str:
    """What a fact takes. Seconds an edit of the editors of weights were taken beside other work and are not here."""
    rows = (
        ("`rome`, `r_rome`, one by one", "facts-single", "rome"),
        ("FT-M, FT-L, one by one", "facts-single", "ft_m"),
        ("`memit`, commits of 100", "facts-commit", "memit"),
        ("FT-M, commits of 100", "facts-commit", "ft_m"),
    )
    own = size(summary("recipe-speed.json")["results"]["bytes_per_edit"])
    lines = [["`recipe`: the retrieval key alone; plus its text, and an editor of 13.7 MiB", own]]
    lines += [[label, size(runs(folder)[run]["bytes_per_edit"])] for label, folder, run in rows]
    return table(("method", "per fact"), lines)
