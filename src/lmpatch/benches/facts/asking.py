"""Asking a model: one batched call each for generations, teacher-forced scores and hidden states."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ... import tensor_file
from ...errors import BadRecord
from ...inference.generate import generate
from ...inference.score import Score, score
from ...inference.states import hidden, next_kl
from ...models.lm import LM
from ...progress import Progress
from ...provenance import hash_json
from ..core.asking import beyond_window
from . import pack
from .cases import Config
from .questions import PACK, PASSAGE, Question
from .rows import Row

BLOCK = 256  # prompts per cache file of the unpatched model, so an interrupted run keeps most of them


@dataclass
class Answers:
    """What one model answered; keys are the texts it read, of generations ``Question.key``."""

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
        """One sealed file: states as tensor, the rest in its head."""
        scores = [[*key, asdict(score)] for key, score in self.scores.items()]
        values = {"texts": self.texts, "long": self.long, "states": list(self.states), "scores": scores}
        states = torch.stack(list(self.states.values())) if self.states else torch.zeros(0, 0)
        tensor_file.write(path, {"answers": json.dumps(values)}, {"states": states.cpu()})

    @classmethod
    def load(cls, path: Path) -> Answers:
        """The inverse of ``save``.

        Raises:
            BadRecord: there is no such file, or it is not as it was written.
        """
        head, tensors = tensor_file.read(path, BadRecord)
        values = json.loads(head["answers"])
        scores = {(p, a): Score(**{k: tuple(v) for k, v in s.items()}) for p, a, s in values["scores"]}
        return cls(values["texts"], dict(zip(values["states"], tensors["states"], strict=True)), scores, values["long"])


def ask(lm: LM, questions: Iterable[Question], cfg: Config, progress: Progress | None = None) -> Answers:
    """Put the questions to the model as it is now, patches included. Equal prompts run once, too long ones never.
    What takes longest comes last, and ``progress`` hears of it."""
    asked = [q for q in questions if not q.flag]
    near = list(dict.fromkeys(q.text for q in asked if q.kind.startswith("loc/")))
    pairs = list(dict.fromkeys(pair for q in asked for pair in q.scores(cfg.teacher_forced)))
    lengths = {"": cfg.max_new_tokens, "passage": PASSAGE}  # the long ones come last
    generated = {form: {q.key: q.text for q in asked if q.form == form} for form in lengths}
    flags: dict[str, str] = {}
    for form, texts in generated.items():
        flags |= zip(texts, beyond_window(lm, list(texts.values()), new_tokens=lengths[form]), strict=True)
    over = beyond_window(lm, [text for text, _ in pairs], [answer for _, answer in pairs])
    flags |= {text: flag for (text, _), flag in zip(pairs, over, strict=True) if flag}
    answers, size = Answers(long={text: flag for text, flag in flags.items() if flag}), cfg.batch_size
    if near := [text for text in near if not flags[text]]:
        answers.states.update(zip(near, hidden(lm, near, batch_size=size).cpu(), strict=True))
    if pairs := [pair for pair in pairs if not flags.get(pair[0])]:
        scores = score(lm, [text for text, _ in pairs], [answer for _, answer in pairs], batch_size=size)
        answers.scores.update(zip(pairs, scores, strict=True))
    left = {form: {key: text for key, text in texts.items() if not flags[key]} for form, texts in generated.items()}
    total, done = sum(map(len, left.values())), 0
    for form, texts in left.items():
        if texts:
            told = progress and partial(_further, progress, done, total)
            said = generate(
                lm, list(texts.values()), max_new_tokens=lengths[form], stop=() if form else None, batch_size=size,
                progress=told,
            )  # fmt: skip
            answers.texts.update(zip(texts, said, strict=True))
            done += len(texts)
    return answers


def _further(progress: Progress, before: int, whole: int, done: int, total: int, what: str = "") -> None:
    progress(before + done, whole, what)


def ask_base(
    lm: LM,
    questions: Iterable[Question],
    cfg: Config,
    folder: Path | None,
    progress: Progress | None = None,
    on: Sequence[Sequence[str | None]] = (),
) -> Answers:
    """``ask`` on the unpatched model, kept in ``folder`` by (weights, dtype, prompts, protocol).

    Args:
        on: hash and mount of each patch that is on the model, where it is not the unpatched one that is asked.
    """

    def told(done: int, total: int, _: str = "") -> None:
        if progress:
            what = "asking the patched model" if on else "asking the unpatched model"
            progress(start + len(block) * done // total, len(queue), what)

    answers = Answers()
    unique = dict.fromkeys(replace(q, case=0, answers=q.answers[:1], old=q.old[:1]) for q in questions if not q.flag)
    queue = sorted(unique, key=lambda q: (q.kind.startswith(PACK), len(q.text), q.text, q.kind))
    border = sum(not q.kind.startswith(PACK) for q in queue)  # what is cached of the others is found without the pack
    how = [lm.fingerprint(), str(lm.dtype), lm.chat is not None, cfg.max_new_tokens, cfg.teacher_forced]
    how += [[list(each) for each in on]] if on else []
    for start in (*range(0, border, BLOCK), *range(border, len(queue), BLOCK)):
        block = queue[start : min(start + BLOCK, border if start < border else len(queue))]
        key = hash_json([*how, [q.identity() for q in block]])
        path = folder / ("patched" if on else "base") / f"{key[:24]}.safetensors" if folder else None
        part: Answers | None = None
        told(0, 1)
        if path and path.is_file():
            with suppress(BadRecord):  # a damaged file is asked again
                part = Answers.load(path)
        if part is None:
            part = ask(lm, block, cfg, told)
            if path:
                part.save(path)
        answers.update(part)
        told(1, 1)
    return answers


def rows(
    lm: LM, questions: Sequence[Question], base: Answers, now: Answers, cfg: Config, *, kl: bool = True
) -> list[Row]:
    """One row per question, without its place in the run: compares the answers now with the unpatched model's.

    Args:
        kl: measure ``kl``; False where the head itself was changed, which stored states do not show.
    """
    near = [q for q in questions if q.text in now.states and q.prompt in base.states and not q.flag] if kl else []
    moved: dict[str, float] = {}
    if near:
        before = torch.stack([base.states[q.prompt] for q in near]).to(lm.device)  # [n, d]
        after = torch.stack([now.states[q.text] for q in near]).to(lm.device)
        moved = dict(zip((q.text for q in near), next_kl(lm, before, after).tolist(), strict=True))
    return [_row(q, base, now, cfg, moved.get(q.text)) for q in questions]


def _row(q: Question, base: Answers, now: Answers, cfg: Config, kl: float | None) -> Row:
    long = now.long.get(q.key) or base.long.get(q.base_key) or now.long.get(q.against) or ""
    flag = q.flag or long
    row = Row(kind=q.kind, prompt=q.prompt, aliases=q.answers, old_aliases=q.old, flag=flag)
    if flag:
        return row
    if q.form == "scored":
        new, old = (now.scores[pair] for pair in q.scores(False))
        return replace(row, tf_new=_mean(new), tf_old=_mean(old))
    text, before = now.texts[q.key], base.texts[q.base_key]
    row = replace(row, text=text, base_text=before, kl=kl)
    if not q.answers:
        return row
    hit, was = (pack.judged(q.kind, answer, q.answers, q.old, cfg.em_rule) for answer in (text, before))
    row = replace(row, em=hit.em, contains=hit.contains, was_right=was.em, old_first=hit.old_first if q.old else None)
    if not q.scores(cfg.teacher_forced):
        return row
    new, base_new = now.scores[q.text, q.answers[0]], base.scores[q.prompt, q.answers[0]]
    tf_same = None  # the answer was tokenised differently
    if new.ids == base_new.ids:
        tf_same = sum(a == b for a, b in zip(new.argmax, base_new.argmax, strict=True)) / len(new.ids)
    tf_old = _mean(now.scores[q.text, q.old[0]]) if q.old else None
    return replace(row, tf_acc=new.accuracy, tf_same=tf_same, tf_new=_mean(new), tf_old=tf_old)


def _mean(score: Score) -> float:
    """Log probability per token, nats."""
    return score.total / len(score.logprobs)
