"""Rows that Parenting trains on: the three sets tokenised, and which rows each step takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...data.rag.reader import RagRecord, holds, known, refused
from ...errors import BadInput
from ...inference.closed_book import closed_book_answers
from ...inference.interventions import need_window
from ...inference.tokens import Row, encode_all
from ...models.lm import LM
from ...progress import Progress
from .config import Config

SETS = ("adherence", "robustness", "extraction")
WHOLE = ("mixed", "plain")
"""Modes that have no units: all that can be trained is one."""
UNKNOWN = "I do not know."
HELD = 12  # rows of each set that only validate, or a few more: whole questions; at most an eighth of it


@dataclass(frozen=True)
class Rows:
    """One set as token rows. ``sure`` marks rows whose answer the model knew without documents."""

    train: list[Row]
    validate: list[Row]
    sure: list[bool] = field(default_factory=list)


def prepare(
    lm: LM, records: Sequence[RagRecord], cfg: Config, units: int, progress: Progress | None
) -> tuple[dict[str, Rows], dict[str, Any]]:
    """The three sets as prompt, target and end token, and what happened to records on the way.

    Raises:
        BadInput: a set has fewer records than there are units, or none for a loss that is asked for; a record is longer
            than the model's window.
    """
    groups = {kind: [r for r in records if r.kind == kind] for kind in SETS}
    _enough({kind: len(group) for kind, group in groups.items()}, cfg, units)  # before the model is asked anything
    own, notes = _own_answers(lm, groups["robustness"], cfg, progress)
    targets = {kind: [(r, r.answer, False) for r in groups[kind]] for kind in SETS} | {"robustness": own}
    _enough({kind: len(group) for kind, group in targets.items()}, cfg, units)
    order = random.Random(f"{cfg.seed}/rows")
    sets, end = {}, lm.tokenizer.eos_token_id
    for kind, group in targets.items():
        order.shuffle(group)
        rows = encode_all(lm, [record.prompt for record, _, _ in group], [target for _, target, _ in group])
        rows = rows if end is None else [replace(row, ids=(*row.ids, int(end))) for row in rows]
        need_window(lm, [row.ids for row in rows])
        held = _held([record for record, _, _ in group])
        train, validate = ([i for i, flag in enumerate(held) if flag is side] for side in (False, True))
        sets[kind] = Rows([rows[i] for i in train], [rows[i] for i in validate], [group[i][2] for i in train])
    return sets, {"own_answers": notes, "rows": {kind: len(rows.train) for kind, rows in sets.items()}}


def _held(records: Sequence[RagRecord]) -> list[bool]:
    """Which of the shuffled records only validate: all of a question or none, since a pair differs by a word."""
    questions = [record.id.partition(":")[0] or record.question for record in records]
    held: set[str] = set()
    for question in questions:
        if sum(own in held for own in questions) >= min(HELD, len(records) // 8):
            break
        held.add(question)
    return [own in held for own in questions]


def _enough(found: dict[str, int], cfg: Config, units: int) -> None:
    for kind, count in found.items():
        wanted = getattr(cfg, f"rows_{kind}") > 0 and (kind != "extraction" or cfg.delta < 1)
        if wanted and count == 0:
            hint = " or set delta=1" if kind == "extraction" else ""
            raise BadInput(f"no {kind} records. Build sets with `lmpatch data rag`{hint}.")
        if kind != "extraction" and cfg.mode not in WHOLE and count < units:
            raise BadInput(
                f"{count} {kind} records for {units} units: scores would be noise with fewer records than units. Give "
                f"more records, or larger units (now {cfg.units}), or train without them: mode=mixed."
            )


def _own_answers(
    lm: LM, records: Sequence[RagRecord], cfg: Config, progress: Progress | None
) -> tuple[list[tuple[RagRecord, str, bool]], dict[str, int]]:
    """Robustness records with the model's own answers, and whether those are right. Refusals, answers that were cut
    off, and those the documents give are left out and counted."""
    answers = closed_book_answers(lm, [r.question for r in records], progress=progress)
    kept = []
    counts = dict.fromkeys(("known", "refused", "cut_off", "in_documents"), 0) | {"asked": len(records)}
    for record, own in zip(records, answers, strict=True):
        answer = own.text
        if refused(answer) or not own.ended:
            counts["refused" if refused(answer) else "cut_off"] += 1
            if not cfg.refusals or known(answer, record.gold):
                continue
            answer = UNKNOWN
        elif any(holds(document, [answer]) for document in record.documents):
            counts["in_documents"] += 1
            continue
        sure = known(answer, record.gold)
        counts["known"] += sure
        kept.append((record, answer, sure))
    return kept, counts


def draws(rows: Rows, count: int, step: int, seed: str, share: float = 0.0) -> list[Row]:
    """``count`` rows of one step, which depend on seed and step alone.

    Args:
        share: of the rows that are taken from the sure ones, where there are any. 0: all rows alike.
    """
    sure = [i for i, flag in enumerate(rows.sure) if flag and share]
    rest = sorted({*range(len(rows.train))} - {*sure}) or sure
    picked = []
    for place in range(step * count, (step + 1) * count):
        first = bool(sure) and int((place + 1) * share) > int(place * share)
        at = int(place * share) if first else place - (int(place * share) if sure else 0)
        pool = sure if first else rest
        turn, within = divmod(at, len(pool))
        picked.append(pool[random.Random(f"{seed}/{first}/{turn}").sample(range(len(pool)), len(pool))[within]])
    return [rows.train[i] for i in picked]
