"""``lmpatch demo``: the main job from end to end, on the packaged model and the project's own facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import new_path, open_model
from .screen import keep, progress, say, table

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.edits import Edit
    from ..models.lm import LM
    from ..progress import Progress

MODEL = "gemma-3-270m"
METHOD = "memit"
SETTINGS: dict[str, Any] = {"solver": "alphaedit", "long_prefixes": 2, "hits": 2, "moment_tokens": 8192}
TOKENS = 12  # new tokens per answer
PROMISED = 0.9  # share of the edited facts that must be stated afterwards
PROMISED_REPHRASED = 0.6  # the same in other words


@dataclass(frozen=True)
class Answers:
    """What the model says about each fact, in other words, and about things that must not move."""

    facts: list[str]
    rephrased: list[str]
    near: list[str]
    states: Tensor
    """[n, d] after the last block at the end of each locality prompt."""


def demo(
    context: typer.Context,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", help="Save the patch in this folder.")
    ] = None,
    count: Annotated[int, typer.Option(min=10, help="How many facts to edit.")] = 12,
) -> None:
    """Edit facts in Gemma-3-270M, show what changed and what else moved, take the patch off bit for bit.

    Exit code 1 if fewer than 9 in 10 facts change, fewer than 6 in 10 in other words, or a bit stays changed.

    \b
    Example:
      lmpatch demo
      lmpatch demo -o demo-patch --count 20
    """
    from ..api import fit
    from ..data.edits import read_edits
    from ..patches.ledger import apply
    from ..provenance import hash_tensors

    if out is not None:
        new_path(out)
    keep(context, "The model was not changed on disk.")
    lm = open_model(MODEL)
    clean = hash_tensors(lm.model.state_dict().items(), exact=True)
    with progress() as bar:
        edits, said = _unknown(lm, read_edits(own_facts()), count, bar)
        before = _ask(lm, edits, bar, said)
        patch = fit(lm, METHOD, edits, progress=bar, **SETTINGS)
        with apply(lm, patch):
            after = _ask(lm, edits, bar)
    restored = hash_tensors(lm.model.state_dict().items(), exact=True) == clean
    _show_facts(edits, before, after)
    _show_near(lm, edits, before, after)
    changed = _stated(edits, after.facts)
    rephrased = _stated(edits, after.rephrased)
    seconds = patch.made["seconds"] / len(edits)
    say(f"{changed} of {len(edits)} facts changed, {rephrased} also in other words")
    say(f"{seconds:.2f} s per edit with {METHOD}, {patch.nbytes:,} bytes of patch for {len(edits)} facts")
    say(f"patch removed: {'every bit is back' if restored else 'SOME BITS DIFFER'} (SHA-256 {clean[:16]})")
    if out is not None:
        patch.save(out)
        say(f"saved in {out}. A LoRA adapter of it: lmpatch export {MODEL} -p {out} --to peft -o adapter")
    if changed < PROMISED * len(edits) or rephrased < PROMISED_REPHRASED * len(edits) or not restored:
        raise typer.Exit(1)


def own_facts() -> Path:
    """The project's facts: packaged with a wheel, in ``examples/`` of a checkout."""
    packaged = Path(str(files("lmpatch.data"))) / "facts.jsonl"
    return packaged if packaged.is_file() else Path(__file__).parents[3] / "examples" / "facts.jsonl"


def _unknown(lm: LM, edits: Sequence[Edit], count: int, bar: Progress) -> tuple[list[Edit], list[str]]:
    """The first ``count`` facts that the model does not state by itself, and what it says instead."""
    from ..inference.generate import generate

    said = generate(lm, [edit.prompt for edit in edits], max_new_tokens=TOKENS, progress=bar)
    wrong = [(edit, text) for edit, text in zip(edits, said, strict=True) if not _states(edit, text)][:count]
    return [edit for edit, _ in wrong], [text for _, text in wrong]


def _ask(lm: LM, edits: Sequence[Edit], bar: Progress, said: Sequence[str] = ()) -> Answers:
    """Everything the demo asks; ``said`` are the answers to the facts where they are known already."""
    from ..inference.generate import generate
    from ..inference.states import hidden

    near = [prompt for _, prompt in _near(edits)]
    prompts = [edit.rephrases[0] for edit in edits] + near + ([] if said else [edit.prompt for edit in edits])
    texts = generate(lm, prompts, max_new_tokens=TOKENS, progress=bar)
    n, m = len(edits), len(edits) + len(near)
    return Answers(list(said) or texts[m:], texts[:n], texts[n:m], hidden(lm, near))


def _near(edits: Sequence[Edit]) -> list[tuple[str, str]]:
    """(kind, prompt) of what must not move, one of each kind a fact."""
    return [(kind, asks[0].prompt) for edit in edits for kind, asks in edit.locality]


def _states(edit: Edit, text: str) -> bool:
    """The new answer stands in the text, and the old one not before it."""
    from ..data.matching import match

    return match(text, edit.answers, edit.old).contains


def _stated(edits: Sequence[Edit], texts: Sequence[str]) -> int:
    return sum(_states(edit, text) for edit, text in zip(edits, texts, strict=True))


def _show_facts(edits: Sequence[Edit], before: Answers, after: Answers) -> None:
    rows = []
    for i, edit in enumerate(edits):
        marks = ["yes" if _states(edit, answers[i]) else "no" for answers in (after.facts, after.rephrased)]
        rows.append((edit.prompt, before.facts[i], after.facts[i], marks[0]))
        rows.append((f"  {edit.rephrases[0]}", before.rephrased[i], after.rephrased[i], marks[1]))
    table(["fact, and the same in other words", "before", "after", "new answer"], rows)


def _show_near(lm: LM, edits: Sequence[Edit], before: Answers, after: Answers) -> None:
    from ..data.matching import same
    from ..inference.states import next_kl

    moved = next_kl(lm, before.states, after.states).tolist()
    kinds: dict[str, list[tuple[bool, float]]] = {}
    for (kind, _), old, new, kl in zip(_near(edits), before.near, after.near, moved, strict=True):
        kinds.setdefault(kind, []).append((same(old, new), kl))
    rows = [
        (
            kind.replace("_", " "),
            len(found),
            sum(same for same, _ in found) / len(found),
            sum(kl for _, kl in found) / len(found),
        )
        for kind, found in kinds.items()
    ]
    table(["what else moved", "prompts", "same answer", "KL (nats)"], rows)
