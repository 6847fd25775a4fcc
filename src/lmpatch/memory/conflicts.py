"""Which facts of a memory a new one contradicts: the same question in other words, with another answer.

A fact in the memory is contradicted if its time overlaps, none of its answers is among the new one's, and

* the subject is the same: the subject of one stands in the prompt of the other, or both subjects are equal; where
  neither names one, every name (a word with a capital letter or a digit, but for the first) of one prompt stands in the
  other;
* the relation is the same: both have one relation id; or the prompt of one is among the other's rephrases; or the new
  prompt fires the old fact, and both prompts are alike once their subjects are taken out. The gate alone will not do:
  two in five questions about another relation of the subject pass it.

What this cannot see: a subject under another name ("the Iron Lady"), a relation that takes several answers at once,
facts that only together contradict, and whatever is not among the ``NEAR`` facts whose keys are nearest. Opposite
relations in like words ("the mother of", "the father of") pass for one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.dates import overlap
from ..data.edits import Edit, prompt_key
from ..data.matching import find, normalise, whole
from ..patches.memory.search import Finder, ListedFacts
from ..patches.patch import plain_edits
from ..retrieval import Retriever, Scope
from ..retrieval.encoder import mean_pooled
from .entry import Conflict, Entry
from .store import Store

if TYPE_CHECKING:
    from ..progress import Progress

NEAR = 8
"""Facts looked at for each new one, in the memory and among the new ones."""
ALIKE = 0.5
"""Cosine of two prompts without their subjects, by the encoder of the memory. Chosen on questions of zsRE and
KnowEdit's wiki set."""
CHUNK = 1024  # facts looked at between two reports of progress


def find_conflicts(
    store: Store, retriever: Retriever, scope: Scope, edits: Sequence[Edit], keys: Tensor, progress: Progress | None
) -> list[tuple[int, Conflict]]:
    """What new facts contradict, with the place of each new fact; nothing is superseded yet but facts of its prompt.

    Args:
        scope: when a fact fires; ``always`` is as good as no gate, so the retriever's own gate is asked then.
        keys: [n, w] fp16 of the new facts.
    """
    scope = replace(scope, gate="cosine" if retriever.unit else "sentinel", top_k=NEAR)
    known = Known(store, ListedFacts(plain_edits(edits), keys, retriever, scope), edits)
    finder = Finder(retriever, scope, known)
    pairs: list[tuple[int, Edit, int | None, bool]] = []
    for start in range(0, len(edits), CHUNK):
        part = range(start, min(start + CHUNK, len(edits)))
        hits = finder.search([edits[i].prompt for i in part])
        for i, found in zip(part, hits, strict=True):
            facts = [(*known.edit(hit.place), hit.fired) for hit in found if hit.place >= 0 or -1 - hit.place < i]
            pairs += [(i, old, version, fired) for old, version, fired in facts if _rival(edits[i], old, version)]
        if progress:
            progress(part.stop, len(edits), "looking for contradictions")
    same = _same_relation(retriever, [(edits[i], old, fired) for i, old, _, fired in pairs])
    near = [
        (i, Conflict(edits[i], old, version, superseded=prompt_key(old.prompt) == prompt_key(edits[i].prompt)))
        for (i, old, version, _), alike in zip(pairs, same, strict=True)
        if alike
    ]
    return sorted([*_same_prompt(store, edits), *near], key=lambda pair: pair[0])


def _same_prompt(store: Store, edits: Sequence[Edit]) -> Iterator[tuple[int, Conflict]]:
    """Facts of the memory that have the prompt of a new one and say otherwise; they need not be near to be found."""
    for i, (edit, held) in enumerate(zip(edits, store.beside([edit.prompt for edit in edits]), strict=True)):
        for entry in held:
            if _other_answer(edit, entry.edit):
                yield i, Conflict(edit, entry.edit, entry.version, superseded=True)


def _other_answer(new: Edit, old: Edit) -> bool:
    answers = {normalise(answer) for answer in new.answers} & {normalise(answer) for answer in old.answers}
    return not answers and overlap(new.span, old.span)


def _rival(new: Edit, old: Edit, version: int | None) -> bool:
    """Whether they might contradict each other, unless ``_same_prompt`` has said so."""
    told = version is not None and prompt_key(new.prompt) == prompt_key(old.prompt)
    return not told and _other_answer(new, old) and bare(new, old) is not None


def bare(new: Edit, old: Edit) -> tuple[str, str] | None:
    """Both prompts without the subject they share; None: they share none, or that cannot be told."""
    prompts = normalise(new.prompt), normalise(old.prompt)
    own = normalise(new.subject), normalise(old.subject)
    subjects = {subject for subject in own if subject}
    if subjects:
        shared = own[0] == own[1] or find(prompts[1], own[0]) >= 0 or find(prompts[0], own[1]) >= 0
    else:
        names = _names(new.prompt), _names(old.prompt)
        subjects = names[0] | names[1]
        shared = bool(subjects) and all(find(prompt, name) >= 0 for name in subjects for prompt in prompts)
    if not shared:
        return None
    pattern = "|".join(map(whole, sorted(subjects, key=len, reverse=True)))
    without = (re.sub(f"(?:{pattern})(?: (?:{pattern}))*", "it", prompt) for prompt in prompts)
    return next(without), next(without)


def _names(prompt: str) -> set[str]:
    words = (word for word in prompt.split()[1:] if any(c.isupper() or c.isdigit() for c in word))
    return {re.sub("['\u2019]s$", "", normalise(word)) for word in words} - {""}


def _same_relation(retriever: Retriever, pairs: Sequence[tuple[Edit, Edit, bool]]) -> list[bool]:
    """Of facts about one subject, whether they are about one relation of it: (new, old, the old one fired)."""
    verdicts = [_surely(new, old) for new, old, _ in pairs]
    open_ = [i for i, verdict in enumerate(verdicts) if verdict is None and pairs[i][2]]
    texts = [text for i in open_ for text in bare(*pairs[i][:2]) or ("", "")]
    if texts:
        states = torch.nn.functional.normalize(retriever.encoder.encode(texts, mean_pooled), dim=-1)  # [2n, w]
        for i, cosine in zip(open_, (states[::2] * states[1::2]).sum(-1).tolist(), strict=True):
            verdicts[i] = cosine >= ALIKE
    return [bool(verdict) for verdict in verdicts]


def _surely(new: Edit, old: Edit) -> bool | None:
    """What the facts themselves say; None: nothing."""
    if new.relation and old.relation:
        return new.relation == old.relation
    wordings = [{prompt_key(text) for text in (edit.prompt, *edit.rephrases)} for edit in (new, old)]
    return prompt_key(new.prompt) in wordings[1] or prompt_key(old.prompt) in wordings[0] or None


class Known:
    """The facts of a store, whatever their time, and new ones beside them, which have places below zero."""

    def __init__(self, store: Store, listed: ListedFacts, edits: Sequence[Edit]) -> None:
        self.store, self.listed, self.edits = store, listed, edits
        self._hits: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self.store) + len(self.listed)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As ``Facts.search``, the best ``k`` of each."""
        scores, hits = self.store.search(queries.numpy(), k, ever=True)
        self._hits = {entry.seq: entry for line in hits for entry in line}
        places = torch.tensor([[entry.seq for entry in line] for line in hits]).reshape(scores.shape).long()
        more, rows = self.listed.search(queries, k)
        return torch.cat([torch.from_numpy(scores).double(), more], 1), torch.cat([places, -1 - rows], 1)

    def edit(self, place: int) -> tuple[Edit, int | None]:
        """The fact, and the version that wrote it; None: it is new."""
        return (self.edits[-1 - place], None) if place < 0 else (self._hits[place].edit, self._hits[place].version)

    def fact(self, place: int) -> tuple[str, str]:
        """Prompt and target."""
        edit, _ = self.edit(place)
        return edit.prompt, edit.target

    def keys(self, places: Sequence[int]) -> Tensor:
        """Nothing is put before a question here."""
        raise NotImplementedError
