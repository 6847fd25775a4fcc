"""``run`` of the probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.context import ContextRecord
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK, frozen, logits
from ...inference.interventions import need_window
from ...inference.replay import Recording, record
from ...inference.tokens import encode_all
from ...models.hooks import Hook, hooked
from ...models.lm import LM
from ...patches.base import fingerprint
from ...patches.ledger import applied
from ...progress import Progress
from ...provenance import hash_json
from .scores import SCHEMA, Credit, Log, Scores

Record = ContextRecord

MIB = 1 << 20


@dataclass(frozen=True)
class Steps:
    """How credit is measured."""

    steps: int = 20
    """m, points on the way from the value without context to the value with it."""
    weighting: Literal["endpoint", "path"] = "endpoint"
    """``endpoint``: gradients with respect to the value with context, as published by IRCAN: each carries a factor k/m.
    ``path``: textbook; only its credits add up to the change of p(answer)."""
    grid: Literal["right", "left"] = "right"
    """Points 1/m .. 1, or 0 .. 1 - 1/m."""
    budget: int = 1024
    """MiB of activations kept for one backward pass. With more, more records travel together; no score moves."""


@dataclass(frozen=True)
class Config(Steps):
    """Integrated gradients. Defaults: IRCAN's."""

    threshold: float = 0.1
    """Neurons below this share of a record's highest score are dropped."""
    top: int = 20
    """Neurons kept per record at most."""


@dataclass(frozen=True)
class Case:
    """One record as token ids."""

    with_context: tuple[int, ...]
    """The prompt with context."""
    without_context: tuple[int, ...]
    """The prompt without."""
    label: int
    """First visible token of the answer. Where a tokenizer makes the blank before it a token of its own (numbers,
    often), both prompts end with that."""


@dataclass(frozen=True)
class Credits:
    """What a batch of n records found, before anything is dropped."""

    scores: Tensor
    """[n, layers, widest MLP] fp32, signed; -inf where a narrower block has no neuron."""
    gap: Tensor | None
    """[n, layers] p(answer) with the layer's values from the context, minus without, minus the layer's summed credits.
    ``path`` only: the other weighting does not promise a sum."""


def run(
    lm: LM, data: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None,
    out: str | Path | None = None,
) -> Scores:  # fmt: skip
    """Score the neurons of every block for each record.

    For layer l and point a, the down-projection's input at the last prompt token is v_q + a (v_cq - v_q), and the
    gradient of p(first answer token) with respect to it is taken, through everything above. All layers and points of
    a record travel side by side from one pass over its prompt (``Recording.fan``).

    Args:
        data: questions with contexts and answers.
        out: a file of JSON lines, one a record, written as the scores come. A run that is there already goes on
            where it stopped.
    Returns:
        per record the neurons with the highest scores, at most ``top``. A record whose highest score is not positive
        has none.
    Raises:
        BadInput: an answer that is no token of its own, a prompt longer than the model's window, or a file of another
            run.
    Source: Shi et al. 2024 (arXiv:2406.18406), eq. 1-3.
    """
    if cfg.top < 1:
        raise BadInput(f"top is {cfg.top}. Keep at least 1 neuron per record.")
    found = cases(lm, data)
    log = Log(Path(out) if out else None, asked(lm, data, cfg))
    done = len(log.credits)
    for part in attributions(lm, found[done:], cfg):
        log.add(kept(part, cfg))
        if progress:
            progress(len(log.credits), len(found), "crediting neurons")
    return Scores(log.header, tuple(log.credits))


def asked(lm: LM, data: Sequence[ContextRecord], cfg: Config) -> dict[str, Any]:
    """The header of scores: what they depend on. What a method adds to the settings, and the budget, moves none."""
    return {
        "schema": SCHEMA,
        "probe": "integrated_gradients",
        "config": {f.name: getattr(cfg, f.name) for f in fields(Config) if f.name != "budget"},
        "model": fingerprint(lm),
        "dtype": str(lm.dtype),
        "patches": [on.patch.hash() for on in applied(lm)],
        "records": hash_json([(r.prompt, r.without_context, r.answer) for r in data]),
        "count": len(data),
    }


def cases(lm: LM, records: Sequence[ContextRecord]) -> list[Case]:
    """The records as token ids, checked.

    Raises:
        BadInput: see ``run``.
    """
    texts = [r.prompt for r in records]
    told, alone = encode_all(lm, texts, [r.answer for r in records]), encode_all(lm, texts)
    without_context = encode_all(lm, [r.without_context for r in records])
    made = []
    for i, (row, prompt, short) in enumerate(zip(told, alone, without_context, strict=True), 1):
        if row.ids[: row.target] != prompt.ids or not prompt.ids or not short.ids:
            raise BadInput(
                f"record {i}: the answer {records[i - 1].answer!r} shares a token with the end of its prompt "
                f"{records[i - 1].prompt[-30:]!r}. Let the prompt end in a word, without a blank behind it."
            )
        seen = (at for at in range(row.target, len(row.ids)) if lm.tokenizer.decode([row.ids[at]]).strip())
        at = next(seen, None)
        if at is None:
            raise BadInput("an answer tokenises to nothing visible. Give a visible answer.")
        need_window(lm, [row.ids[:at]])
        made.append(Case(row.ids[:at], short.ids + row.ids[row.target : at], row.ids[at]))
    return made


def attributions(lm: LM, found: Sequence[Case], cfg: Steps) -> Iterator[Credits]:
    """Credits of all neurons, a batch of records at a time, in the order given."""
    return (credits for (credits,) in attributions_of(lm, found, [cfg]))


def attributions_of(lm: LM, found: Sequence[Case], cfgs: Sequence[Steps]) -> Iterator[list[Credits]]:
    """The same for several settings with as many steps each, which share their passes: one ``Credits`` for each.

    Raises:
        BadInput: their ``steps`` or ``budget`` differ.
    """
    if len({(cfg.steps, cfg.budget) for cfg in cfgs}) != 1:
        raise BadInput("settings that share their passes need the same steps and budget.")
    points = [_points(cfg) for cfg in cfgs]
    nodes = sorted({a for one in points for a in one})
    weights = torch.tensor([[one.get(a, 0.0) for a in nodes] for one in points])  # [settings, points]
    each = sum(_layer_bytes(lm, layer, len(nodes)) for layer in range(lm.layout.n_layers))
    size = max(1, cfgs[0].budget * MIB // each)
    with frozen(lm):
        for start in range(0, len(found), size):
            yield _credit(lm, found[start : start + size], cfgs, torch.tensor(nodes), weights)


def memory(lm: LM, cfg: Steps) -> int:
    """Bytes a run takes on top of the model, rounded up: a batch's activations and the logits of one head chunk."""
    least = _layer_bytes(lm, 0, cfg.steps + 1)
    return max(cfg.budget * MIB, least) + 4 * 2 * (HEAD_CHUNK // 2) * lm.layout.vocab


def _points(cfg: Steps) -> dict[float, float]:
    """Points on the way, and the weight of each one's gradient. Points of weight 0 serve the gap alone."""
    m = cfg.steps
    if m < 1 or cfg.budget < 1:
        raise BadInput(f"steps is {m} and budget {cfg.budget}. Both must be at least 1.")
    counted = range(1, m + 1) if cfg.grid == "right" else range(m)
    pairs = [(k / m, float(k in counted) * (k / m if cfg.weighting == "endpoint" else 1.0)) for k in range(m + 1)]
    if cfg.weighting == "endpoint":
        pairs = [pair for pair in pairs if pair[1]] or pairs[:1]  # a left grid of one step has the weight 0 alone
    return dict(pairs)


def _layer_bytes(lm: LM, layer: int, points: int) -> int:
    """What autograd keeps of one record's rows that join at a layer and run to the top."""
    layout = lm.layout
    above = layout.widths[layer:]
    return 4 * points * (len(above) * 12 * layout.d_model + 4 * sum(above))


def _credit(lm: LM, batch: Sequence[Case], cfgs: Sequence[Steps], nodes: Tensor, weights: Tensor) -> list[Credits]:
    sides = [case.with_context for case in batch], [case.without_context for case in batch]
    ends = [[len(row) - 1 for row in rows] for rows in sides]
    context, plain = (record(lm, rows, end, ends=end) for rows, end in zip(sides, ends, strict=True))
    labels = torch.tensor([case.label for case in batch], device=lm.device)
    scores: list[list[Tensor]] = [[] for _ in cfgs]
    moved = []  # by each layer, p(answer) from the first point to the last
    for layers in _groups(lm, len(batch) * len(nodes), cfgs[0].budget * MIB):
        p, grads = _wavefront(lm, context, plain, labels, layers, nodes.to(lm.device), weights.to(lm.device))
        for i, layer in enumerate(layers):
            step = (context.keys[layer] - plain.keys[layer]).float() / cfgs[0].steps  # [n, f]
            for found, grad in zip(scores, grads[i].unbind(1), strict=True):
                found.append(step * _pulled_back(lm, layer, context.keys[layer], grad))
            moved.append(p[:, i, -1] - p[:, i, 0])
    widest, made = max(lm.layout.widths), []
    for cfg, found in zip(cfgs, scores, strict=True):
        whole = torch.stack([F.pad(x, (0, widest - x.shape[1]), value=-torch.inf) for x in found], 1)  # [n, layers, f]
        total = whole.masked_fill(whole == -torch.inf, 0).sum(-1)  # [n, layers]
        made.append(Credits(whole, torch.stack(moved, 1) - total if cfg.weighting == "path" else None))
    return made


def _groups(lm: LM, points: int, budget: int) -> list[list[int]]:
    """All layers in as few wavefronts as the budget allows."""
    groups: list[list[int]] = []
    used = 0
    for layer in range(lm.layout.n_layers):
        need = _layer_bytes(lm, layer, points)
        if not groups or used + need > budget:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += need
    return groups


def _wavefront(
    lm: LM, context: Recording, plain: Recording, labels: Tensor, layers: list[int], nodes: Tensor, weights: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Send every point of these layers to the top, and p(answer)'s gradients back.

    Returns:
        p [n, layers, points], and per layer the weighted sums of the gradients at the down-projection's output, before
        any norm that follows it, [n, settings, d].
    """
    n, m = context.n, len(nodes)
    a, w = nodes[:, None], weights.T  # [m, 1], [m, settings]
    leaves: list[Tensor] = []
    hidden = context.hidden[layers[0]][:, :0]  # [n, 0, d]
    with torch.enable_grad():
        for layer in range(layers[0], lm.layout.n_layers):
            hooks = []
            if layer in layers:
                start, end = (r.values[layer].float()[:, None] for r in (plain, context))  # [n, 1, d]
                # a leaf that moves each point by its weight receives the weighted sum of their gradients
                leaves.append(start.new_zeros(n, w.shape[1], start.shape[-1]).requires_grad_())
                values = torch.lerp(start, end, a) + w @ leaves[-1]  # [n, m, d]
                hidden = torch.cat([hidden, context.hidden[layer].expand(-1, m, -1)], 1)
                hooks.append(Hook(lm.module(lm.layout.downs[layer]), partial(_newest, values)))
            with hooked(*hooks):
                hidden = context.fan(hidden, layer, end=layer + 1)
        top = hidden.reshape(-1, hidden.shape[-1])  # [n * layers * m, d]
        p, grad = _answer(lm, top.detach(), labels.repeat_interleave(len(top) // n))
        grads = torch.autograd.grad(top, leaves, grad)
    return p.reshape(n, len(layers), m), list(grads)


def _newest(values: Tensor, _: Any, __: Any, output: Tensor) -> Tensor:
    """The down-projection's output with the newest columns replaced by ``values`` [n, m, d]."""
    n, m, d = values.shape
    return torch.cat([output.reshape(n, -1, d)[:, :-m], values.to(output.dtype)], 1).reshape(output.shape)


def _answer(lm: LM, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """p(label) [r] at each state [r, d] after the last block, and its gradient [r, d].

    The softmax's part is written down, dp_y/dz = p_y (e_y - p), so that one chunk of logits is alive at a time and
    nothing of it is kept for a backward pass.
    """
    probabilities, grads = [], []
    for part, label in zip(hidden.split(HEAD_CHUNK // 2), labels.split(HEAD_CHUNK // 2), strict=True):
        leaf = part.requires_grad_()
        z = logits(lm, leaf)  # [c, V]
        p = z.detach().softmax(-1)
        p_y = p.gather(1, label[:, None])  # [c, 1]
        dz = p.mul_(-p_y).scatter_add_(1, label[:, None], p_y)
        grads.append(torch.autograd.grad(z, leaf, dz)[0])
        probabilities.append(p_y[:, 0])
    return torch.cat(probabilities), torch.cat(grads)


def _pulled_back(lm: LM, layer: int, key: Tensor, grad: Tensor) -> Tensor:
    """The down-projection's transpose times ``grad`` [n, d]; [n, f] fp32. Patches on the weight count."""
    with torch.enable_grad():
        leaf = key.detach().requires_grad_()
        value = lm.module(lm.layout.downs[layer])(leaf)
        return torch.autograd.grad(value, leaf, grad.to(value.dtype))[0].float()


def kept(found: Credits, cfg: Config) -> list[Credit]:
    """The neurons that pass the threshold, the highest first. One transfer a batch."""
    widest = found.scores.shape[-1]
    flat = found.scores.flatten(1)  # [n, layers * f]
    scores, places = (x.tolist() for x in flat.topk(min(cfg.top, flat.shape[1])))
    gaps = [None] * len(flat) if found.gap is None else found.gap.abs().amax(1).tolist()
    credits = []
    for row, at, gap in zip(scores, places, gaps, strict=True):
        pairs = [pair for pair in zip(at, row, strict=True) if row[0] > 0 and pair[1] >= cfg.threshold * row[0]]
        credits.append(Credit(tuple((*divmod(place, widest), score) for place, score in pairs), row[0], gap))
    return credits


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records and settings that run in milliseconds on a tiny model."""
    return examples(), Config(steps=4)


def examples() -> list[ContextRecord]:
    """Two records whose contexts contradict what is commonly known."""
    return [
        ContextRecord("The Eiffel Tower is in Rome.", "The Eiffel Tower is in", "Rome", "Paris"),
        ContextRecord("Steve Jobs founded the Louvre in Paris.", "Steve Jobs founded", "the Louvre", "Apple"),
    ]
