"""Asking a model: one batched call each for generations, teacher-forced scores and hidden states."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...data.matching import match
from ...inference.generate import generate
from ...inference.score import Score, score
from ...inference.states import hidden, next_kl
from ...models.lm import LM
from ...progress import Progress
from ...provenance import hash_json
from ..core.asking import beyond_window
from .cases import Question
from .rows import FactRow

BLOCK = 256  # prompts per cache file of the unpatched model, so an interrupted run keeps most of them


@dataclass(frozen=True)
class Protocol:
    """What decides an answer besides the weights."""

    max_new_tokens: int = 32
    em_rule: str = "prefix"
    teacher_forced: bool = True
    batch_size: int = 64


@dataclass
class Answers:
    """What one model answered; keys are the texts it read."""

    texts: dict[str, str] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    """[d] fp32 after the last block at the last token, for locality prompts."""
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    """(text, answer) → teacher-forced score."""
    long: dict[str, str] = field(default_factory=dict)
    """Texts that were not read, and why."""

    def update(self, other: Answers) -> None:
        """Take in what another call answered."""
        self.texts |= other.texts
        self.states |= other.states
        self.scores |= other.scores
        self.long |= other.long

    def save(self, path: Path) -> None:
        """One safetensors file: states as tensor, the rest as its metadata."""
        values = {
            "texts": self.texts,
            "long": self.long,
            "states": list(self.states),
            "scores": [[*key, asdict(score)] for key, score in self.scores.items()],
        }
        states = torch.stack(list(self.states.values())) if self.states else torch.zeros(0, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"states": states.cpu().contiguous()}, partial, metadata={"answers": json.dumps(values)})
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Answers:
        """The inverse of ``save``."""
        with safe_open(path, framework="pt") as file:
            states, values = file.get_tensor("states"), json.loads(file.metadata()["answers"])
        scores = {(p, a): Score(**{k: tuple(v) for k, v in s.items()}) for p, a, s in values["scores"]}
        return cls(values["texts"], dict(zip(values["states"], states, strict=True)), scores, values.get("long", {}))


def ask(lm: LM, questions: Iterable[Question], how: Protocol, progress: Progress | None = None) -> Answers:
    """Put the questions to the model as it is now, patches included. Equal prompts run once, too long ones never."""
    open_ones = [q for q in questions if not q.flag]
    asked = list(dict.fromkeys(q.text for q in open_ones))
    pairs = list(dict.fromkeys(pair for q in open_ones for pair in _pairs(q))) if how.teacher_forced else []
    flags = dict(zip(asked, beyond_window(lm, asked, new_tokens=how.max_new_tokens), strict=True))
    over = beyond_window(lm, [text for text, _ in pairs], [answer for _, answer in pairs])
    flags |= {text: flag for (text, _), flag in zip(pairs, over, strict=True) if flag}
    answers = Answers(long={text: flag for text, flag in flags.items() if flag})
    texts = [text for text in asked if not flags[text]]
    near = list(dict.fromkeys(q.text for q in open_ones if q.kind.startswith("loc/") and not flags[q.text]))
    pairs = [pair for pair in pairs if not flags[pair[0]]]
    size = how.batch_size
    if texts:
        generated = generate(lm, texts, max_new_tokens=how.max_new_tokens, batch_size=size, progress=progress)
        answers.texts.update(zip(texts, generated, strict=True))
    if near:
        states = hidden(lm, near, batch_size=size, progress=progress).cpu()
        answers.states.update(zip(near, states, strict=True))
    if pairs:
        scores = score(lm, [p for p, _ in pairs], [a for _, a in pairs], batch_size=size, progress=progress)
        answers.scores.update(zip(pairs, scores, strict=True))
    return answers


def ask_base(
    lm: LM, questions: Iterable[Question], how: Protocol, folder: Path | None, progress: Progress | None = None
) -> Answers:
    """``ask`` on the unpatched model, kept in ``folder`` by (weights, dtype, prompts, protocol).

    Raises:
        BadInput: the model carries patches.
    """
    answers = Answers()
    unique = list(
        dict.fromkeys(replace(q, case=0, answers=q.answers[:1], old=q.old[:1]) for q in questions if not q.flag)
    )
    rest = iter(sorted(unique, key=lambda q: (len(q.text), q.text, q.kind)))
    done = 0
    while block := list(islice(rest, BLOCK)):
        key = hash_json(
            [
                lm.fingerprint(),
                str(lm.dtype),
                lm.chat is not None,
                asdict(replace(how, batch_size=0)),
                [asdict(q) for q in block],
            ]
        )
        path = folder / "base" / f"{key[:24]}.safetensors" if folder else None
        if path and path.is_file():
            answers.update(Answers.load(path))
        else:
            part = ask(lm, block, how)
            if path:
                part.save(path)
            answers.update(part)
        done += len(block)
        if progress:
            progress(done, len(unique), "asking the unpatched model")
    return answers


def _pairs(q: Question) -> list[tuple[str, str]]:
    """(text, answer) to score teacher-forced: the wanted answer, and the old one where there is one."""
    return [(q.text, answers[0]) for answers in (q.answers, q.old) if answers]


def rows(
    lm: LM, questions: Sequence[Question], base: Answers, now: Answers, how: Protocol, *, kl: bool = True
) -> list[FactRow]:
    """One row per question, without its place in the run: compares the answers now with the unpatched model's.

    Args:
        kl: measure ``kl``; False where the head itself was changed, which stored states do not show.
    """
    near = [q.text for q in questions if q.text in now.states and q.prompt in base.states and not q.flag] if kl else []
    moved: dict[str, float] = {}
    if near:
        before = {q.text: base.states[q.prompt] for q in questions if q.text in now.states and not q.flag}
        was, is_ = (torch.stack([s[text] for text in near]).to(lm.device) for s in (before, now.states))
        moved = dict(zip(near, next_kl(lm, was, is_).tolist(), strict=True))
    return [_row(q, base, now, how, moved.get(q.text)) for q in questions]


def _row(q: Question, base: Answers, now: Answers, how: Protocol, kl: float | None) -> FactRow:
    flag = q.flag or now.long.get(q.text) or base.long.get(q.prompt) or ""
    row = FactRow(kind=q.kind, prompt=q.prompt, aliases=q.answers, old_aliases=q.old, flag=flag)
    if flag:
        return row
    text, before = now.texts[q.text], base.texts[q.prompt]
    row = replace(row, text=text, base_text=before, kl=kl)
    if q.answers:
        hit = match(text, q.answers, q.old, how.em_rule)
        right = match(before, q.answers, q.old, how.em_rule).em
        row = replace(row, em=hit.em, contains=hit.contains, was_right=right)
        row = replace(row, old_first=hit.old_first if q.old else None)
    if q.answers and how.teacher_forced:
        new, was = now.scores[q.text, q.answers[0]], base.scores[q.prompt, q.answers[0]]
        old = now.scores[q.text, q.old[0]] if q.old else None
        row = replace(row, tf_acc=new.accuracy, tf_same=_agreement(new, was), tf_new=_mean(new))
        row = replace(row, tf_old=_mean(old) if old else None)
    return row


def _agreement(now: Score, base: Score) -> float | None:
    """Share of positions with the same first choice; None if the answer was tokenised differently."""
    if now.ids != base.ids:
        return None
    return sum(a == b for a, b in zip(now.argmax, base.argmax, strict=True)) / len(now.ids)


def _mean(score: Score) -> float:
    return score.total / len(score.logprobs)
