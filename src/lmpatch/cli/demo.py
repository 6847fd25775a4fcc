"""``lmpatch demo``: the main job from end to end, on the packaged model and the project's own facts, which
``lmpatch example`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import replacing
from .options import Source, opt, out_option
from .screen import keep, note, progress, say

if TYPE_CHECKING:
    from ..data.edits import Edit
    from ..models.lm import LM

MODEL = "gemma-3-270m"
MEMORY, WEIGHTS = "recipe", "rome"
TOKENS = 12  # new tokens per answer
PROMISED = {"changed": 1.0, "reworded": 10 / 12, "neighbours": 11 / 12}
"""Shares that a memory must reach."""
ASKED = ("fact", "reworded", "neighbour")
VERDICTS = ("changed", "reworded", "neighbours", "repeats")
"""States it the new answer, also in other words? Is the neighbour's answer as it was? Is the target said twice?"""
NEXT = f"""What to do next:
  lmpatch example -o facts.jsonl                       these facts as a file
  lmpatch fit {MODEL} recipe facts.jsonl -o facts   keep your own facts in a memory
  lmpatch ask {MODEL} -p facts "PROMPT"             ask with it and without
  lmpatch bench {MODEL} facts facts.jsonl -p facts  measure it
  lmpatch methods                                      the other methods, by what they are for"""


def demo(
    context: typer.Context,
    out: Annotated[Path | None, out_option("OUT", "Save the memory of the facts in this folder.")] = None,
    count: Annotated[int, opt("How many facts to change.", min=1)] = 12,
) -> None:
    """Change facts of Gemma-3-270M with a memory, write one into its weights, and take everything off bit for bit.

    Exit code 1 if the memory does not change every fact, 10 in 12 in other words, and leave 11 in 12 neighbours as they
    were, or if a bit of the model stays changed.

    lmpatch demo
    lmpatch demo -o facts --count 20
    """
    begun = monotonic()
    keep(context, "The model was not changed on disk.")
    lm = Source(MODEL, "float32", "cpu").open()
    from ..api import fit
    from ..models.number_format import processor_name, rates
    from ..provenance import hash_tensors

    speed = ", ".join(f"{rate:,.0f} GFLOP/s in {name}" for name, rate in rates().items())
    note(f"{processor_name()}: products of matrices at {speed}")
    clean = hash_tensors(lm.model.state_dict().items(), exact=True)
    with progress("asking the model"):
        edits, known = _unknown(lm, _facts(), count)
    say(f"\n1. {len(edits)} facts in a memory beside the model (`{MEMORY}`). No weight changes.")
    say("   A fact that a question finds goes before it as prompt vectors; the verifier is not asked.")
    say(f"   Answers are greedy, {TOKENS} tokens at most, and shown up to their first line break or full stop;")
    say("   said 2×: the whole answer says the target twice.")
    memory = fit(lm, MEMORY, edits, insert="vectors", doubt=1.0)
    facts = _show(lm, memory, edits[:1], known[:1])  # alone, so that something is seen soon
    with progress("asking about the other facts"):
        facts += _show(lm, memory, edits[1:], known[1:])
    counts, n = {name: sum(fact[name] for fact in facts) for name in VERDICTS}, len(facts)
    say(
        f"\n   changed: {counts['changed']} of {n}. In other words: {counts['reworded']} of {n}. "
        f"Neighbours as they were: {counts['neighbours']} of {n}.\n"
        f"   Says the target twice or more: {counts['repeats']} of {n}.",
        facts=facts,
        **counts,
    )
    say(f"   {memory.nbytes:,} bytes, made in {memory.made['seconds']:.1f} s", seconds=memory.made["seconds"])
    say(f"\n2. One fact in the weights (`{WEIGHTS}`). It reaches fewer wordings than a memory.")
    with progress(f"{WEIGHTS} at work") as bar:
        patch = fit(lm, WEIGHTS, edits[:1], progress=bar)
    _show(lm, patch, edits[:1], known[:1])
    say(f"   {patch.nbytes:,} bytes, made in {patch.made['seconds']:.1f} s")
    restored = hash_tensors(lm.model.state_dict().items(), exact=True) == clean
    say("\n3. Both patches are off again.")
    say(f"   {'Every bit is back' if restored else 'SOME BITS DIFFER'} (SHA-256 of all weights: {clean[:16]}).")
    say(f"\n{NEXT}")
    if out is not None:
        memory.save(out)
        say(f"The memory of these facts is saved in {out}.", path=out)
    say(f"({monotonic() - begun:.0f} s in all)", restored=restored, total_seconds=round(monotonic() - begun, 1))
    if not restored or any(counts[name] < share * n for name, share in PROMISED.items()):
        raise typer.Exit(1)


def example(
    out: Annotated[Path, out_option("FILE", "The file to write. It must not exist yet.")] = Path("facts.jsonl"),
) -> None:
    """Write a small file of facts, the one the demo and the first page use.

    lmpatch example
    lmpatch example -o my-facts.jsonl
    """
    text = own_facts().read_text(encoding="utf-8")
    with replacing(out) as work:
        work.write_text(text, encoding="utf-8")
    facts = text.count("\n")
    say(f"{facts} facts written to {out}", facts=facts, path=out)


def own_facts(name: str = "facts.jsonl") -> Path:
    """A file of the project's facts: packaged with a wheel, in ``examples/`` of a checkout."""
    packaged = Path(str(resources.files("lmpatch.data"))) / name
    return packaged if packaged.is_file() else Path(__file__).parents[3] / "examples" / name


def _facts() -> list[Edit]:
    """Invented facts, which no model has read anywhere, before real ones that changed."""
    from ..data.edits import read_edits

    edits = [edit for name in ("facts.jsonl", "demo.jsonl") for edit in read_edits(own_facts(name))]
    return sorted(edits, key=lambda edit: not edit.id.startswith("made-up"))


def _unknown(lm: LM, edits: Sequence[Edit], count: int) -> tuple[list[Edit], list[str]]:
    """The first ``count`` facts that the model does not state by itself, and what it says instead."""
    wrong: list[tuple[Edit, str]] = []
    for start in range(0, len(edits), count):
        some = edits[start : start + count]
        texts = _answers(lm, [edit.prompt for edit in some])
        wrong += [(edit, text) for edit, text in zip(some, texts, strict=True) if not states(edit, text)]
        if len(wrong) >= count:
            break
    return [edit for edit, _ in wrong[:count]], [text for _, text in wrong[:count]]


def _answers(lm: LM, prompts: Sequence[str]) -> list[str]:
    from ..inference.generate import generate

    return list(generate(lm, prompts, max_new_tokens=TOKENS))


def _show(lm: LM, patch: Any, edits: Sequence[Edit], known: Sequence[str]) -> list[dict[str, Any]]:
    """Ask about facts without and with the patch, each time all in one batch, and show the answers.

    Args:
        known: the answers to the facts themselves without the patch.
    Returns:
        for each fact its prompts, the answers without and with the patch, and the ``VERDICTS``.
    """
    from ..data.matching import same
    from ..patches.ledger import apply

    prompts = [[e.prompt, e.rephrases[0], next(asks[0].prompt for _, asks in e.locality)] for e in edits]
    without = iter(_answers(lm, [prompt for own in prompts for prompt in own[1:]]))
    with apply(lm, patch):
        answers = iter(_answers(lm, [prompt for own in prompts for prompt in own]))
    facts = []
    for edit, asked, text in zip(edits, prompts, known, strict=True):
        before, after = [text, next(without), next(without)], [next(answers) for _ in asked]
        times = said(edit, after[0])
        found = [*(states(edit, each) for each in after[:2]), same(before[2], after[2]), times > 1]
        fact = {"prompts": asked, "before": before, "after": after, "target": edit.target}
        facts.append(fact | dict(zip(VERDICTS, found, strict=True)))
        say(f"\n   {edit.subject or edit.prompt} -> {edit.target}")
        marks = ["new answer" if right else "NOT the new answer" for right in found[:2]]
        marks[0] += f", said {times}×" if times > 1 else ""
        marks.append("as before" if found[2] else "MOVED")
        for what, prompt, old, new, mark in zip(ASKED, asked, before, after, marks, strict=True):
            say(f"   {what:>9}  {prompt} …")
            say(f"     without  {sentence(old)}")
            say(f"        with  {sentence(new)}  [{mark}]")
    return facts


def states(edit: Edit, text: str) -> bool:
    """The new answer stands in the text, and the old one not before it."""
    from ..data.matching import match

    return match(text, edit.answers, edit.old).contains


def said(edit: Edit, text: str) -> int:
    """How often the text says the target, behind what is shown of it too."""
    return len(re.findall(rf"(?<!\w){re.escape(edit.target)}(?!\w)", text, re.IGNORECASE))


def sentence(text: str) -> str:
    """An answer up to its first line break or full stop."""
    return re.split(r"\n|(?<=[.!?])\s", text.strip(), maxsplit=1)[0]
