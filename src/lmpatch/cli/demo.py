"""``lmpatch demo``: the main job from end to end, on the packaged model and the project's own facts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .example import own_facts
from .options import new_path, open_model
from .screen import keep, note, progress, say

if TYPE_CHECKING:
    from ..data.edits import Edit
    from ..models.lm import LM
    from ..progress import Progress

MODEL = "gemma-3-270m"
MEMORY, WEIGHTS = "recipe", "rome"
TOKENS = 12  # new tokens per answer
PROMISED = {"changed": 1.0, "reworded": 10 / 12, "neighbours": 11 / 12}
"""Shares that a memory must reach."""
ASKED = ("fact", "reworded", "neighbour")
NEXT = f"""What to do next:
  lmpatch example -o facts.jsonl                       these facts as a file
  lmpatch fit {MODEL} recipe facts.jsonl -o facts   keep your own facts in a memory
  lmpatch ask {MODEL} -p facts "PROMPT"             ask with it and without
  lmpatch bench {MODEL} facts facts.jsonl -p facts  measure it
  lmpatch methods                                      the other methods, by what they are for"""


@dataclass(frozen=True)
class Outcome:
    """One fact: the answers to ``ASKED`` without and with the patch, and what they mean."""

    edit: Edit
    prompts: list[str]
    before: list[str]
    after: list[str]

    def verdicts(self) -> dict[str, bool]:
        """Does it state the new answer, also when asked in other words? Is the neighbour's answer as it was?"""
        from ..data.matching import same

        return {
            "changed": states(self.edit, self.after[0]),
            "reworded": states(self.edit, self.after[1]),
            "neighbours": same(self.before[2], self.after[2]),
            "repeats": repeats(self.edit, self.after[0]),
        }


def demo(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", help="Save the memory of the facts in this folder.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many facts to change.")] = 12,
) -> None:
    """Change facts of Gemma-3-270M with a memory, write one into its weights, and take everything off bit for bit.

    Exit code 1 if the memory does not change every fact, 10 in 12 in other words, and leave 11 in 12 neighbours as they
    were, or if a bit of the model stays changed.

    \b
    Examples:
      lmpatch demo
      lmpatch demo -o facts --count 20
    """
    begun = monotonic()
    if out is not None:
        new_path(out)
    keep(context, "The model was not changed on disk.")
    lm = open_model(MODEL, "float32", "cpu")
    from ..api import fit
    from ..provenance import hash_tensors

    _machine()
    clean = hash_tensors(lm.model.state_dict().items(), exact=True)
    with progress("asking the model") as bar:
        edits, known = _unknown(lm, _facts(), count, bar)
    say(f"\n1. {len(edits)} facts in a memory beside the model (`{MEMORY}`). No weight changes.")
    say(f"   Answers are greedy, {TOKENS} tokens at most, and shown up to their first line break or full stop.")
    memory = fit(lm, MEMORY, edits)
    outcomes = [_show(lm, memory, edit, text) for edit, text in zip(edits, known, strict=True)]
    kept = _verdict(outcomes)
    say(f"   {memory.nbytes:,} bytes, made in {memory.made['seconds']:.1f} s", seconds=memory.made["seconds"])
    say(f"\n2. One fact in the weights (`{WEIGHTS}`). It reaches fewer wordings than a memory.")
    with progress(f"{WEIGHTS} at work") as bar:
        patch = fit(lm, WEIGHTS, edits[:1], progress=bar)
    _show(lm, patch, edits[0], known[0])
    say(f"   {patch.nbytes:,} bytes, made in {patch.made['seconds']:.1f} s")
    restored = hash_tensors(lm.model.state_dict().items(), exact=True) == clean
    say("\n3. Both patches are off again.")
    say(f"   {'Every bit is back' if restored else 'SOME BITS DIFFER'} (SHA-256 of all weights: {clean[:16]}).")
    say(f"\n{NEXT}")
    if out is not None:
        memory.save(out)
        say(f"The memory of these facts is saved in {out}.", path=out)
    say(f"({monotonic() - begun:.0f} s in all)", restored=restored, total_seconds=round(monotonic() - begun, 1))
    if not (kept and restored):
        raise typer.Exit(1)


def _machine() -> None:
    from ..models.number_format import processor_name, rates

    speed = ", ".join(f"{rate:,.0f} GFLOP/s in {name}" for name, rate in rates().items())
    note(f"{processor_name()}: products of matrices at {speed}")


def _facts() -> list[Edit]:
    """Invented facts, which no model has read anywhere, before real ones that changed."""
    from ..data.edits import read_edits

    edits = [edit for name in ("facts.jsonl", "demo.jsonl") for edit in read_edits(own_facts(name))]
    return sorted(edits, key=lambda edit: not edit.id.startswith("made-up"))


def _unknown(lm: LM, edits: Sequence[Edit], count: int, bar: Progress) -> tuple[list[Edit], list[str]]:
    """The first ``count`` facts that the model does not state by itself, and what it says instead."""
    wrong: list[tuple[Edit, str]] = []
    for start in range(0, len(edits), count):
        some = edits[start : start + count]
        texts = _answers(lm, [edit.prompt for edit in some], bar)
        wrong += [(edit, text) for edit, text in zip(some, texts, strict=True) if not states(edit, text)]
        if len(wrong) >= count:
            break
    return [edit for edit, _ in wrong[:count]], [text for _, text in wrong[:count]]


def _neighbour(edit: Edit) -> str:
    """A question whose answer must not move."""
    return next(asks[0].prompt for _, asks in edit.locality)


def _answers(lm: LM, prompts: Sequence[str], bar: Progress | None = None) -> list[str]:
    from ..inference.generate import generate

    texts: list[str] = generate(lm, prompts, max_new_tokens=TOKENS, progress=bar)
    return texts


def _show(lm: LM, patch: Any, edit: Edit, known: str) -> Outcome:
    """Ask about a fact without and with the patch, and show the answers.

    Args:
        known: the answer to the fact without the patch.
    """
    from ..patches.ledger import apply

    prompts = [edit.prompt, edit.rephrases[0], _neighbour(edit)]
    before = [known, *_answers(lm, prompts[1:])]
    with apply(lm, patch):
        outcome = Outcome(edit, prompts, before, _answers(lm, prompts))
    verdicts = list(outcome.verdicts().values())
    marks = [
        "new answer" if verdicts[0] else "NOT the new answer",
        "new answer" if verdicts[1] else "NOT the new answer",
        "as before" if verdicts[2] else "MOVED",
    ]
    say(f"\n   {outcome.edit.subject or outcome.edit.prompt} -> {outcome.edit.target}")
    for asked, prompt, old, new, mark in zip(ASKED, outcome.prompts, outcome.before, outcome.after, marks, strict=True):
        say(f"   {asked:>9}  {prompt} …")
        say(f"     without  {sentence(old)}")
        say(f"        with  {sentence(new)}  [{mark}]")
    return outcome


def _verdict(outcomes: Sequence[Outcome]) -> bool:
    """The counts on the screen. True: all that was promised was kept."""
    verdicts, n = [outcome.verdicts() for outcome in outcomes], len(outcomes)
    counts = {name: sum(verdict[name] for verdict in verdicts) for name in verdicts[0]}
    say(
        f"\n   changed: {counts['changed']} of {n}. In other words: {counts['reworded']} of {n}. "
        f"Neighbours as they were: {counts['neighbours']} of {n}.\n"
        f"   Says the target twice or more: {counts['repeats']} of {n}.",
        facts=[
            {"prompts": o.prompts, "before": o.before, "after": o.after, "target": o.edit.target} | verdict
            for o, verdict in zip(outcomes, verdicts, strict=True)
        ],
        **counts,
    )
    return all(counts[name] >= share * n for name, share in PROMISED.items())


def states(edit: Edit, text: str) -> bool:
    """The new answer stands in the text, and the old one not before it."""
    from ..data.matching import match

    return match(text, edit.answers, edit.old).contains


def repeats(edit: Edit, text: str) -> bool:
    """Does the text say the target twice or more?"""
    return len(re.findall(rf"(?<!\w){re.escape(edit.target)}(?!\w)", text, re.IGNORECASE)) > 1


def sentence(text: str) -> str:
    """An answer up to its first line break or full stop."""
    return re.split(r"\n|(?<=[.!?])\s", text.strip(), maxsplit=1)[0]
