"""Accuracy and robustness of many (count, factor) settings at once, without editing a weight.

Multiplying a down-projection's column is multiplying its input. So settings travel as rows of one batch, each with its
own factor, and those of one count start at its lowest scaled block, from states that were computed once. The edit acts
on every token, so every token above that block is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ...data.context import ContextRecord, completion, one_line, others, swapped
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK
from ...inference.generate import StopTokens, generate
from ...inference.interventions import Rule, combined, in_context, initial_states, streams
from ...inference.multiple_choice import combined_options, option_tokens
from ...inference.replay import Recording, record
from ...inference.score import score
from ...inference.tokens import Row, batches_of_tokens
from ...models.hooks import Hook, hooked
from ...models.lm import LM
from ...models.units import Neuron
from ...patches.ledger import suspended
from ...patches.weight.delta import When
from ...progress import Progress

TOKENS = 4096  # per forward; more gains nothing on a CPU


@dataclass(frozen=True)
class _Case:
    """A record as token ids."""

    rows: tuple[Row, ...]
    """With context; with a rule on the model also without. Both end in ``answer``."""
    answer: tuple[int, ...]
    """Empty where there are options: then the row ends where their letters part."""
    letters: tuple[int, ...]
    """Each letter's token there."""
    right: int
    """Which letter is the answer."""
    line: bool = False
    """A new line ends the answer."""
    word: bool = False
    """The answer is a first word, behind which more may follow."""

    def last(self, stream: int) -> int:
        """Where the first token of the answer, or the letter, is decided."""
        return len(self.rows[stream].ids) - len(self.answer) - 1


@torch.no_grad()
def accuracies(
    lm: LM, records: Sequence[ContextRecord], neurons: Sequence[Neuron], settings: Sequence[tuple[int, float]], *,
    words: Sequence[str] | None = None, when: When = "always", progress: Progress | None = None,
) -> Tensor:  # fmt: skip
    """Share of records answered as their context says, for each setting, under the rules that are on the model.

    With options: the letter with the highest logit is the answer's. Without: each token of the answer is the argmax
    behind the right ones, and behind the last one comes an end, a period, or behind a question a new line. Then the
    greedy text up to there is the answer, as the bench ``memotrap`` asks. An answer said with other tokens counts there
    and not here.

    Args:
        neurons: ranked; a setting (h, factor) scales the first h of them.
        words: the first words, or the letters, that are right in place of the records' answers.
        when: as ``Delta.when``.
    Returns:
        [settings], in 0..1.
    Raises:
        BadInput: a record longer than the model's window, letters that begin alike, or a patch on the model that puts
            vectors before prompts.
    """
    rules, cases = _cases(lm, records, words)
    ends = StopTokens(lm, ())
    right, done = torch.zeros(len(settings)), 0
    for count_right, found in (
        (partial(_chosen, lm, rules), [case for case in cases if case.letters]),
        (partial(_said, lm, rules, ends), [case for case in cases if not case.letters]),
    ):
        for batch in batches_of_tokens(
            [sum(len(row.ids) for row in case.rows) for case in found], TOKENS // 4
        ):  # 4 settings a forward
            part = [found[i] for i in batch]
            width = len(part[0].rows)
            rows = [case.rows[s] for s in range(width) for case in part]  # stream after stream
            last = [case.last(s) for s in range(width) for case in part]
            recording = record(
                lm, [row.ids for row in rows], [0] * len(rows), ends=last, in_context=in_context(lm, rows),
                lowest=_lowest(lm, neurons),
            )  # fmt: skip
            each = max(1, TOKENS // (len(rows) * recording.suffix))
            for count, group in groupby(range(len(settings)), lambda i: settings[i][0]):
                same = list(group)
                for some in (same[start : start + each] for start in range(0, len(same), each)):
                    states = scaled_states(recording, neurons[:count], [settings[i][1] for i in some], when)
                    right[some] += count_right(states.unflatten(1, (width, len(part))), part)
            done += len(part)
            if progress:
                progress(done, len(records), "trying settings")
    return right / len(records)


def foreign(records: Sequence[ContextRecord], seed: int = 0) -> list[ContextRecord]:
    """The records with another's context in place of their own, as the context benches ask them for robustness.

    Raises:
        BadInput: no record has another one's context, unrelated and in a prompt that holds its own.
    """
    partners = zip(records, others(records, seed), strict=True)
    if asked := [each for r, j in partners if j is not None and (each := swapped(r, records[j].context))]:
        return asked
    raise BadInput(
        "robustness needs records with unrelated contexts that stand in their prompts, and these have none. Give "
        "other records, or choose by accuracy alone: objective='accuracy'."
    )


@torch.no_grad()
def own_answers(lm: LM, records: Sequence[ContextRecord]) -> list[str]:
    """What the model without any patch answers without a context: the first word, or the letter."""
    free = [r for r in records if not r.options]
    each = [(r.without_context, letter) for r in records for letter in r.letters]
    with suspended(lm):
        texts = generate(
            lm, [r.without_context for r in free], max_new_tokens=10, stop=(), enough=lambda _, t: len(t.split()) > 1
        )
        scores = iter(score(lm, [prompt for prompt, _ in each], [letter for _, letter in each]))
    words = iter([next(iter(completion(t, one_line(r.prompt)).split()), "") for r, t in zip(free, texts, strict=True)])
    answers = []
    for r in records:
        totals = {letter: next(scores).total for letter in r.letters}
        answers.append(max(totals, key=lambda letter: totals[letter]) if totals else next(words))
    return answers


def _cases(
    lm: LM, records: Sequence[ContextRecord], words: Sequence[str] | None
) -> tuple[tuple[Rule, ...], list[_Case]]:
    answers = [r.answer for r in records] if words is None else words
    told = streams(lm, [r.asked for r in records], answers)
    if told.vectors is not None:
        raise BadInput("a patch on the model puts vectors before prompts, and settings are not tried behind them.")
    cases: list[_Case] = []
    for r, wanted, pair in zip(records, answers, told.rows, strict=True):
        if r.options:
            before, letters = option_tokens(lm, r.prompt, r.letters)
            if len(set(letters)) < len(letters):
                raise BadInput(
                    f"letters of {r.prompt[-60:]!r} begin with the same token, so one logit cannot tell them."
                )
            shared = len(before.ids) - before.target
            rows = tuple(replace(row, ids=row.ids[: row.target + shared]) for row in pair)
            cases.append(_Case(rows, (), letters, r.letters.index(wanted)))
        else:
            answer = pair[0].ids[pair[0].target :]
            cases.append(_Case(pair, answer, (), 0, one_line(r.prompt), words is not None))
    return told.rules, cases


def _lowest(lm: LM, neurons: Sequence[Neuron]) -> int:
    return min((n.layer for n in neurons), default=lm.layout.n_layers)


def scaled_states(
    recording: Recording, neurons: Sequence[Neuron], factors: Sequence[float], when: When = "always"
) -> Tensor:
    """States after the last block with these neurons scaled by each factor, [factors, n, S, d]; with
    ``when="context"`` in those rows alone that carry one."""
    lm, n, c = recording.lm, recording.n, len(factors)
    lowest = _lowest(lm, neurons)
    hidden = recording.hidden[lowest].repeat(c, 1, 1)  # [c * n, S, d], factor after factor
    rows = torch.arange(n, device=hidden.device).repeat(c)
    hooks = []
    for layer in sorted({neuron.layer for neuron in neurons}):
        scale = torch.ones(c, lm.layout.widths[layer])
        scale[:, [neuron.index for neuron in neurons if neuron.layer == layer]] = torch.tensor(factors)[:, None]
        by_row = scale.to(hidden).repeat_interleave(n, 0)[:, None]  # [c * n, 1, f]
        if when == "context":
            has = recording.in_context
            by_row = torch.ones_like(by_row) if has is None else torch.where(has.repeat(c)[:, None, None], by_row, 1.0)
        hooks.append(Hook(lm.module(lm.layout.downs[layer]), partial(_times, by_row), before=True))
    with hooked(*hooks):
        return recording.forward(hidden, lowest, rows=rows).reshape(c, n, *hidden.shape[1:])


def _times(factors: Tensor, _: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    whole = args[0].reshape(len(factors), -1, args[0].shape[-1]) * factors  # some models flatten rows and tokens
    return whole.reshape(args[0].shape), *args[1:]


def _at(states: Tensor, cases: Sequence[_Case], setting: Tensor, row: Tensor, k: int) -> Tensor:
    """The states that say token k of the answers, [streams, r, d], for r pairs of a setting and a row."""
    place = torch.tensor([[case.last(s) for case in cases] for s in range(states.shape[1])])[:, row] + k
    stream = torch.arange(states.shape[1])[:, None]
    where = (x.to(states.device) for x in (setting, stream, row, place))
    return states[tuple(where)]


def _chosen(lm: LM, rules: Sequence[Rule], states: Tensor, cases: Sequence[_Case]) -> Tensor:
    """How many records have the highest logit at the right letter, [settings]; ``states`` [c, streams, n, S, d]."""
    c, n = len(states), len(cases)
    setting, row = (x.flatten() for x in torch.meshgrid(torch.arange(c), torch.arange(n), indexing="ij"))
    columns = sorted({token for case in cases for token in case.letters})
    z = combined_options(lm, _at(states, cases, setting, row, 0), rules, columns)  # [c * n, k]
    right = torch.zeros(c)
    for case, own in zip(cases, z.cpu().unflatten(0, (c, n)).unbind(1), strict=True):
        right += own[:, [columns.index(token) for token in case.letters]].argmax(-1) == case.right
    return right


def _said(lm: LM, rules: Sequence[Rule], ends: StopTokens, states: Tensor, cases: Sequence[_Case]) -> Tensor:
    """How many records are answered with the answer and nothing more, [settings]; ``states`` as in ``_chosen``.

    Token after token: what missed one needs no more of the head, and a rule may remember.
    """
    c, n = len(states), len(cases)
    right = torch.ones(c, n, dtype=torch.bool)
    memory = initial_states(lm, rules, c * n)
    for k in range(max(len(case.answer) for case in cases) + 1):
        going = torch.tensor([k <= len(case.answer) for case in cases])
        setting, row = (right & going).nonzero(as_tuple=True)
        if not len(row):
            break
        at = (setting * n + row).to(states.device)
        known = memory[:, at]
        best = torch.cat([z.argmax(-1) for _, z in combined(lm, _at(states, cases, setting, row, k), rules, known)])
        memory[:, at] = known
        for s, i, token in zip(setting.tolist(), row.tolist(), best.tolist(), strict=True):
            case = cases[i]
            right[s, i] = token == case.answer[k] if k < len(case.answer) else _closes(lm, token, ends, case)
    return right.sum(1).float()


def _closes(lm: LM, token: int, ends: StopTokens, case: _Case) -> bool:
    """Nothing that follows this token belongs to the answer."""
    if token in ends:
        return True
    text: str = lm.tokenizer.decode([token])
    if case.word and case.answer:  # a blank of the first token is lost where it is decoded alone
        last = list(case.answer[-1:])
        text = lm.tokenizer.decode([*last, token]).removeprefix(lm.tokenizer.decode(last))
        return text[:1] == "." or text[:1].isspace()
    return text.strip().startswith(".") or (case.line and text.strip(" ").startswith("\n"))


def memory(lm: LM) -> int:
    """Bytes one batch takes, rounded up."""
    layout = lm.layout
    return 4 * (TOKENS * (12 * layout.d_model + 4 * max(layout.widths)) + 2 * HEAD_CHUNK * layout.vocab)
