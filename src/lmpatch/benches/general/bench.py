"""The general bench itself: settings, data, what is asked, its rows and the numbers made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...inference.score import score
from ...inference.tokens import join
from ...models.lm import LM
from ..core import contract
from ..core.asking import beyond_window, mark_logits
from ..core.contract import Example, Json, Measure, Settings
from . import tasks
from .tasks import CLOZE, LETTERS, TASKS, TEXT, Data, Form, Sample, choose

PROTOCOLS = (LETTERS, CLOZE, TEXT)
ACCURACY = ("letters", "cloze")
"""Forms whose value is right or wrong."""


@dataclass(frozen=True)
class Config(Settings):
    """The general bench. What each number means: docs/benches.md."""

    n: int = 200
    """Records of each task, chosen by hash: the same before and after, and on every model."""
    windows: int = 64
    """Windows of 256 words of held-out text; 64 are about 20,000 tokens."""
    tasks: tuple[str, ...] | None = None
    """Tasks to ask. None: all that have files."""
    protocols: tuple[str, ...] = PROTOCOLS
    """recipe-general-v1: letters of options; cloze-v1: likelihood of their texts; perplexity-v1: held-out text."""
    batch_size: int = 32
    """Texts in one forward."""


@dataclass(frozen=True, kw_only=True)
class Row(contract.Row):
    """One record under one protocol, scored on one model."""

    task: str
    protocol: str
    form: Form
    id: str
    """Hash of the record: equal on every model."""
    source: str
    """File and line."""
    gold: int
    """Index of the right option."""
    scores: tuple[float, ...] = ()
    """One per option: its logit (letters), else its mean log probability per token, nats."""
    value: float | None = None
    """1 or 0 (right, wrong), 1/perplexity, or nats per token; None: not asked."""
    weight: int = 1
    """Tokens behind the value of a text, whose mean is one over tokens; 1 elsewhere."""

    def key(self) -> Hashable:
        """Task, protocol and record."""
        return self.task, self.protocol, self.id

    def size(self) -> int:
        """Tokens of a text."""
        return self.weight

    def where(self) -> str:
        """Task and protocol."""
        return f"{self.task}, {self.protocol}"

    def example(self) -> Example | None:
        """Which option was chosen; the texts stand in the task's file."""
        if self.value is None or self.form not in ACCURACY:
            return None
        return Example(self.source, f"option {self.gold + 1}", f"option {_best(self.scores) + 1}", bool(self.value))


def load(path: str | Path, *, limit: int | None = None, seed: int | None = None) -> Data:
    """Everything a folder holds for this bench, sub-folders included. docs/benches.md lists the files.

    Args:
        limit: at most this many records of each task, chosen by hash, with the seed in it.
    Raises:
        BadInput: no folder, or nothing in it that a task reads.
        BadRecord: lines that cannot be read.
    """
    folder = Path(path)
    if limit is not None and limit < 1:
        raise BadInput(f"limit is {limit}; give 1 or more.")
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder. Give a folder with the tasks' files; docs/benches.md lists them.")
    data = tasks.read(folder)
    if not data.samples:
        raise BadInput(f"{folder} holds no file that a task reads. docs/benches.md lists them.")
    return data if limit is None else replace(data, samples=tuple(choose(data.samples, lambda _: limit, seed or 0)))


def settle(cfg: Config, data: Data, fixed: bool) -> Config:
    """The settings as they are; refuses names that are none."""
    for what, names, known in (("task", cfg.tasks or (), [*TASKS]), ("protocol", cfg.protocols, [*PROTOCOLS])):
        if odd := [name for name in names if name not in known]:
            raise BadInput(f"general has no {what} {odd[0]!r}. There are: {', '.join(known)}.")
    if cfg.n < 1 or cfg.windows < 1:
        raise BadInput(f"n is {cfg.n} and windows {cfg.windows}; both must be 1 or more.")
    return cfg


def plan(lm: LM, data: Data, cfg: Config, **how: Any) -> list[Sample]:
    """The samples the settings ask for."""
    wanted = [s for s in data.samples if s.protocol in cfg.protocols and (cfg.tasks is None or s.task in cfg.tasks)]
    if not wanted:
        reasons = "; ".join(f"{task}: {why}" for task, why in _skipped(data, cfg).items())
        raise BadInput(f"nothing is left to ask. {reasons or 'No task that was found knows these protocols.'}")
    return choose(wanted, lambda sample: cfg.windows if sample.form == "text" else cfg.n, cfg.seed)


def group(sample: Sample) -> Hashable:
    """Its protocol and task."""
    return sample.protocol, sample.task


def identity(sample: Sample) -> Any:
    """Its task, protocol and the hash of its record."""
    return [sample.task, sample.protocol, sample.id]


def texts(samples: Sequence[Sample], cfg: Config) -> tuple[list[str], int]:
    """Prompts with what is scored behind them."""
    return [join(prompt, behind) for sample in samples for prompt, behind in _pairs(sample)], 0


def record(samples: Sequence[Sample], data: Data, cfg: Config) -> Json:
    """What was read, and which tasks have no file."""
    return {"files": data.files, "skipped": _skipped(data, cfg)}


def _skipped(data: Data, cfg: Config) -> dict[str, str]:
    return {task: why for task, why in data.skipped.items() if cfg.tasks is None or task in cfg.tasks}


def ask(lm: LM, samples: Sequence[Sample], cfg: Config | None = None) -> list[Row]:
    """One row per sample, in their order, from the model as it is now.

    Prompts are read as they stand, also by a chat model: these are the protocols of base models.
    """
    lm, batch_size = lm.plain, (cfg or Config()).batch_size
    pairs = [(i, pair) for i, sample in enumerate(samples) for pair in _pairs(sample)]
    flags = [""] * len(samples)
    over = beyond_window(lm, [prompt for _, (prompt, _) in pairs], [behind for _, (_, behind) in pairs])
    for (i, _), flag in zip(pairs, over, strict=True):
        flags[i] = flags[i] or flag
    marks = {i: first_tokens(lm, sample) for i, sample in enumerate(samples) if sample.form == "letters"}
    for i, ids in marks.items():
        flags[i] = flags[i] or ("the options begin with the same token" if len(set(ids)) < len(ids) else "")
    chosen = [i for i in marks if not flags[i]]
    logits = mark_logits(lm, [samples[i].prompts[0] for i in chosen], [marks[i] for i in chosen], batch_size)
    scores = dict(zip(chosen, logits, strict=True))
    tokens: dict[int, int] = {}
    read = [(i, pair) for i, pair in pairs if i not in marks and not flags[i]]
    if read:
        scored = score(lm, [p for _, (p, _) in read], [behind for _, (_, behind) in read], batch_size=batch_size)
        for (i, _), one in zip(read, scored, strict=True):
            tokens.setdefault(i, len(one.ids))
            scores[i] = (*scores.get(i, ()), one.total / len(one.ids))
    return [_row(sample, flags[i], scores.get(i), tokens.get(i, 1)) for i, sample in enumerate(samples)]


def _pairs(sample: Sample) -> list[tuple[str, str]]:
    """(prompt, what is scored behind it) of everything the model reads for a sample."""
    if sample.form == "letters":
        return [(sample.prompts[0], "")]
    return list(zip(sample.prompts, sample.options, strict=True))


def first_tokens(lm: LM, sample: Sample) -> tuple[int, ...]:
    """The token each mark begins with behind the prompt's last line.

    Where the tokenizer would merge a mark with what stands before it, the mark is tokenised alone: the prompt's own
    tokens are fixed by then.
    """
    before = sample.prompts[0].rpartition("\n")[2]
    behind = lm.tokenizer([before + mark for mark in sample.options], return_offsets_mapping=True)
    alone = lm.tokenizer(list(sample.options), add_special_tokens=False)["input_ids"]
    tokens = []
    for ids, spans, own in zip(behind["input_ids"], behind["offset_mapping"], alone, strict=True):
        at = next(k for k, (_, end) in enumerate(spans) if end > len(before))
        tokens.append(ids[at] if spans[at][0] >= len(before) else own[0])
    return tuple(tokens)


def _row(sample: Sample, flag: str, scores: tuple[float, ...] | None, tokens: int) -> Row:
    """A model that gives no finite number has the answer wrong; it is not left out."""
    value = None
    if scores and not all(map(math.isfinite, scores)):
        value = math.inf if sample.form == "text" else 0.0
    elif scores and sample.form in ACCURACY:
        value = float(_best(scores) == sample.gold)
    elif scores:
        value = -scores[0] if sample.form == "text" else math.exp(scores[0])
    asked = {name: getattr(sample, name) for name in ("task", "protocol", "form", "id", "source", "gold")}
    return Row(**asked, scores=scores or (), value=value, weight=tokens if sample.form == "text" else 1, flag=flag)


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _of(form: Form) -> Callable[[Row], str | None]:
    return lambda row: row.task if row.form == form else None


def _chance(row: Row) -> float | None:
    return 1 / len(row.scores) if row.scores else None


VALUE = attrgetter("value")
MARKED, LIKELY = f"Letters of options [{LETTERS}]", f"Likelihood of texts [{CLOZE}]"
LETTER = "zero-shot: the options stand in the prompt; the one whose letter (anli: word) has the highest logit is right"
OPTION = "zero-shot: the option whose own text is likeliest behind the question, per token, is right"
NATS = "mean negative log probability per token of windows of 256 words, nats"
METRICS = {
    "letters": Measure(LETTER, VALUE, _of("letters"), MARKED, headline=True, chance=_chance),
    "answer": Measure("mean of 1/perplexity of the gold answer", VALUE, _of("answer"), MARKED, headline=True),
    "cloze": Measure(OPTION, VALUE, _of("cloze"), LIKELY, headline=True, chance=_chance),
    "nats": Measure(NATS, VALUE, _of("text"), f"Held-out text [{TEXT}]", unit="nats", better="less", headline=True),
}
