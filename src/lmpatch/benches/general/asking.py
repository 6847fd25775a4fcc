"""Putting the general bench's samples to a model, through ``inference`` alone, so that every kind of patch acts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...inference.score import score
from ...models.lm import LM
from ..core.asking import beyond_window, mark_logits
from .rows import ACCURACY, TaskRow
from .tasks import Sample

Scored = tuple[tuple[float, ...], int]
"""One score per option, and the tokens of the first one."""


def ask(lm: LM, samples: Sequence[Sample], batch_size: int) -> list[TaskRow]:
    """One row per sample, in their order."""
    marks = [_marks(lm, sample) for sample in samples]
    flags = too_long(lm, samples)
    flags = [
        flag or ("the options begin with the same token" if len(set(ids)) < len(ids) else "")
        for flag, ids in zip(flags, marks, strict=True)
    ]
    letters = [i for i, flag in enumerate(flags) if not flag and samples[i].form == "letters"]
    texts = [i for i, flag in enumerate(flags) if not flag and samples[i].form != "letters"]
    scores = dict(zip(letters, _letters(lm, [(samples[i], marks[i]) for i in letters], batch_size), strict=True))
    scores |= zip(texts, _texts(lm, [samples[i] for i in texts], batch_size), strict=True)
    return [_row(sample, flags[i], scores.get(i)) for i, sample in enumerate(samples)]


def too_long(lm: LM, samples: Sequence[Sample]) -> list[str]:
    """Why each sample does not fit the model's window, with everything the patches put before it; "" where it does."""
    texts = [pair for sample in samples for pair in pairs(sample)]
    flags = iter(beyond_window(lm, [prompt for prompt, _ in texts], [option for _, option in texts]))
    return [max(next(flags) for _ in pairs(sample)) for sample in samples]


def pairs(sample: Sample) -> Iterable[tuple[str, str]]:
    """(prompt, what is scored behind it) of everything the model reads for a sample."""
    if sample.form == "letters":
        return [(sample.prompts[0], "")]
    return list(zip(sample.prompts, sample.options, strict=True))


def _letters(lm: LM, asked: Sequence[tuple[Sample, tuple[int, ...]]], batch_size: int) -> list[Scored]:
    """The logit of each option's mark behind the prompt."""
    prompts, marks = [sample.prompts[0] for sample, _ in asked], [ids for _, ids in asked]
    return [(scores, 1) for scores in mark_logits(lm, prompts, marks, batch_size)]


def _texts(lm: LM, samples: Sequence[Sample], batch_size: int) -> list[Scored]:
    """The mean log probability per token of each option's text behind its prompt."""
    texts = [pair for sample in samples for pair in pairs(sample)]
    scored = iter(score(lm, [p for p, _ in texts], [o for _, o in texts], batch_size=batch_size) if texts else [])
    means: list[Scored] = []
    for sample in samples:
        scores = [next(scored) for _ in sample.options]
        means.append((tuple(score.total / len(score.ids) for score in scores), len(scores[0].ids)))
    return means


def _marks(lm: LM, sample: Sample) -> tuple[int, ...]:
    """The token each mark begins with behind the prompt's last line; nothing for other forms.

    Where the tokenizer would merge a mark with what stands before it, the mark is tokenised alone: the prompt's own
    tokens are fixed by then.
    """
    if sample.form != "letters":
        return ()
    before = sample.prompts[0].rpartition("\n")[2]
    behind = lm.tokenizer([before + mark for mark in sample.options], return_offsets_mapping=True)
    alone = lm.tokenizer(list(sample.options), add_special_tokens=False)["input_ids"]
    tokens = []
    for ids, spans, own in zip(behind["input_ids"], behind["offset_mapping"], alone, strict=True):
        at = next(k for k, (_, end) in enumerate(spans) if end > len(before))
        tokens.append(ids[at] if spans[at][0] >= len(before) else own[0])
    return tuple(tokens)


def _row(sample: Sample, flag: str, scored: Scored | None) -> TaskRow:
    scores, tokens = scored or ((), 1)
    return TaskRow(
        task=sample.task,
        protocol=sample.protocol,
        form=sample.form,
        id=sample.id,
        source=sample.source,
        gold=sample.gold,
        scores=scores,
        value=_value(sample, scores) if scored else None,
        weight=tokens if sample.form == "text" and scored else 1,
        flag=flag,
    )


def _value(sample: Sample, scores: Sequence[float]) -> float:
    """A model that gives no finite number has the answer wrong; it is not left out."""
    if not all(map(math.isfinite, scores)):
        return math.inf if sample.form == "text" else 0.0
    if sample.form in ACCURACY:
        return float(max(range(len(scores)), key=scores.__getitem__) == sample.gold)
    return -scores[0] if sample.form == "text" else math.exp(scores[0])
