"""``kre``: does a model choose the option its context supports, or that of its own knowledge?

COSE_KRE and ECARE_KRE give a question, its options, and a context that argues for a wrong one. The option whose letter
has the highest logit is the answer. What is measured, and how, stands in docs/benches.md.

Source: Shi et al. 2024 (arXiv:2406.18406), sec. 4, on Ying et al. 2023 (arXiv:2309.17415).
Differs: the prompt ends without a blank and each letter has the token it gets behind it; where letters share that token
they are scored whole. ``official`` does as released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..data.context import ContextRecord
from ..errors import BadInput
from ..inference.multiple_choice import option_tokens
from ..inference.score import score
from ..inference.tokens import encode_all
from ..models.lm import LM
from .context import bench
from .context.bench import JUDGED_BY, METRICS, OWN, PLOTS, Reply, Row, Task, Wanted, identity, load, plan
from .context.prompts import Wording
from .core.asking import mark_logits
from .core.runner import bound

__all__ = [
    "CONTEXTS", "JUDGED_BY", "METRICS", "OWN", "PLOTS", "Config", "Row", "ask", "baselines", "identity", "load", "plan",
    "read_report", "run", "settle", "texts",
]  # fmt: skip

CONTEXTS = True
Letters = Literal["blank", "bare", "auto"]
"""Which token of a letter counts: the one it gets behind the prompt and a blank, that of the letter alone, or, for each
prompt, those of the two that hold more probability. Where the prompt ends in white space no blank is added."""
WHOLE = "options share a first token: each letter scored whole"


@dataclass(frozen=True)
class Config(bench.ContextSettings):
    """The kre bench. What each number means: docs/benches.md."""

    baselines: tuple[Wording, ...] = ("base", "attr", "instr", "opin", "instr+opin")
    """Wordings in which the unpatched model is asked as well, beside the plain one."""
    suffix: str | None = None
    """What the plain prompt ends in. IRCAN chooses by model: ``Answer: ``, ``Answer: \\n``, ``The correct answer is ``,
    ``Answer: \\nThe correct option is \\n**``. A blank at its end is dropped unless ``official``. None: ``Answer:``, or
    as released ``Answer: ``."""
    letters: Letters | None = None
    """Which token of a letter counts: behind the prompt and a ``blank``, ``bare``, or ``auto``, whichever of the two
    holds more probability behind that prompt. IRCAN chooses by model. None: ``blank``, or as released ``bare``."""


def settle(cfg: Config, records: Sequence[ContextRecord], fixed: bool) -> Config:
    """The settings with suffix and letters; refuses records without options."""
    for i, record in enumerate(records):
        if len(record.options) < 2:
            raise BadInput(
                f"record {record.id or i} has {len(record.options)} options, and kre asks for one of several."
            )
    letters: Letters = cfg.letters or ("bare" if cfg.official else "blank")
    suffix = ("Answer: " if cfg.official else "Answer:") if cfg.suffix is None else cfg.suffix
    return replace(cfg, suffix=suffix, letters=letters)


def choose(lm: LM, records: Sequence[ContextRecord], *, batch_size: int, letters: Letters = "blank") -> list[Reply]:
    """The option whose letter has the highest logit behind the prompt.

    Where letters begin with the same token there, each is scored as a whole, by its log probability.
    """
    marks = [_marks(lm, record, letters) for record in records]  # for each record one token a letter, or both variants
    single = [i for i, variants in enumerate(marks) if variants]
    flat = [[token for ids in marks[i] for token in ids] for i in single]
    logits = iter(mark_logits(lm, [records[i].asked for i in single], flat, batch_size))
    replies = []
    for record, variants in zip(records, marks, strict=True):
        names, flag = record.letters, "" if variants else WHOLE
        if variants:
            row = next(logits)
            parts = [row[start : start + len(names)] for start in range(0, len(row), len(names))]
            scores = max(parts, key=lambda part: float(torch.tensor(part).logsumexp(0)))  # the likelier variant
        else:
            scores = tuple(s.total for s in score(lm, [record.asked] * len(names), names, batch_size=batch_size))
        replies.append(Reply(names[max(range(len(scores)), key=scores.__getitem__)], scores, flag))
    return replies


def _marks(lm: LM, record: ContextRecord, letters: Letters) -> list[tuple[int, ...]]:
    """The token of each letter, in one variant or both. None where letters share it or it holds the prompt's end."""
    variants = []
    if letters != "blank":
        rows = lm.tokenizer(list(record.letters), add_special_tokens=False)["input_ids"]
        variants.append(tuple(row[0] for row in rows))
    if letters != "bare":
        (alone,) = encode_all(lm, [record.prompt])
        before, ids = option_tokens(lm, record.prompt, record.letters)
        variants += [ids] if before.ids == alone.ids else []
    return [ids for ids in variants if len(set(ids)) == len(record.options)]


def _task(cfg: Config) -> Task:
    def reply(lm: LM, records: Sequence[ContextRecord], wanted: Sequence[Wanted]) -> list[Reply]:
        return choose(lm, records, batch_size=cfg.batch_size, letters=cfg.letters or "blank")

    return Task(reply, suffix=cfg.suffix or "", official=cfg.official)


ask, baselines, texts = bench.asking(_task)
run, read_report = bound(__name__)
