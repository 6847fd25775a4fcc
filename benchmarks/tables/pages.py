"""Pages with numbers: what stands between two markers is written from rows.

<!-- numbers: facts-table -->
anything here is replaced by what the block facts-table gives
<!-- /numbers -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import context, editors, edits, facts, facts_summary, general, memory, parenting, settings
from .rows import HERE, RESULTS

ROOT = HERE.parent
BLOCKS: dict[str, Callable[[], str]] = {
    "facts-verdict": facts.facts_verdict,
    "facts-short": facts.facts_short,
    "facts-table": facts.facts_table,
    "facts-elsewhere": facts.facts_elsewhere,
    "facts-blanks": facts.facts_blanks,
    "facts-settings": settings.facts_settings,
    "facts-stream": facts.facts_stream,
    "facts-summary": facts_summary.facts_summary,
    "facts-axes": facts_summary.facts_axes,
    **editors.BLOCKS,
    "harm-table": edits.harm_table,
    "sweep-weights": partial(edits.sweep_table, "weights"),
    "sweep-decoding": partial(edits.sweep_table, "decoding"),
    "general-table": general.general_table,
    "recipe-training": memory.recipe_training,
    "recipe-exposure": memory.recipe_exposure,
    "memory-answers": partial(memory.memory_answers, "gemma-3-270m"),
    "memory-answers-chat": partial(memory.memory_answers, "smollm2-135m-instruct"),
    "recipe-short": memory.recipe_short,
    "memory-follows": partial(memory.memory_follows, "gemma-3-270m"),
    "memory-follows-chat": partial(memory.memory_follows, "smollm2-135m-instruct"),
    "memory-quality": memory.memory_quality,
    "memory-teacher-forced": memory.memory_teacher_forced,
    "memory-retrieval": memory.memory_retrieval,
    "memory-scale": memory.memory_scale,
    "memory-names": memory.memory_names,
    "memory-costs": memory.memory_costs,
    "memory-bytes": memory.memory_bytes,
    "context-table": context.context_table,
    "context-costs": context.context_costs,
    "memotrap-table": context.memotrap_table,
    "memotrap-matching": context.memotrap_matching,
    "memotrap-controls": context.memotrap_controls,
    "memotrap-elsewhere": general.memotrap_elsewhere,
    "cose-table": context.cose_table,
    "cose-controls": context.cose_controls,
    "cose-letters": context.cose_letters,
    "parenting-verdict": parenting.parenting_verdict,
    **{f"parenting-{model}": partial(parenting.parenting_table, model) for model in parenting.MODELS},
    "parenting-elsewhere": general.parenting_elsewhere,
}
"""Name in a marker -> Markdown made of committed rows."""
MARKED = re.compile(r"(<!-- numbers: (?P<name>[^ ]+) -->\n).*?(<!-- /numbers -->)", re.S)
START, END = "<!-- numbers:", "<!-- /numbers -->"


def pages() -> list[Path]:
    """Every page that may hold a marker."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md"))]


def names(text: str) -> list[str]:
    """The blocks a page asks for."""
    return [found["name"] for found in MARKED.finditer(text)]


def render(text: str) -> str:
    """The page with every block made anew.

    Raises:
        ValueError: a marker names no block, or is not closed.
    """
    if not len(MARKED.findall(text)) == text.count(START) == text.count(END):
        raise ValueError(f"a marker is not closed: write {START} NAME --> and {END}, each on a line of its own.")
    if unknown := sorted(set(names(text)) - BLOCKS.keys()):
        raise ValueError(f"no block of numbers is called {', '.join(unknown)}. There are {', '.join(sorted(BLOCKS))}.")
    return MARKED.sub(lambda found: f"{found[1]}\n{BLOCKS[found['name']]()}\n\n{found[3]}", text)
