"""The value search that ROME, MEMIT and their relatives share.

For each fact: find δ, added at the subject's last token, that makes the model state the target. Only δ is
optimised, so everything before that token and below that block is run once (``inference.replay``), and the head
sees the answer positions alone, and the tokens that matter there. Facts travel in one batch: Adam works entry by
entry, so a batch of searches equals the searches one by one, and a finished fact leaves the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.edits import Edit
from ..errors import Diverged
from ..inference.forward import HEAD_CHUNK, ShortHead, head_loss, logits, short_head
from ..inference.replay import Recording, record
from ..inference.tokens import Row, batches_of_tokens, encode_all
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..progress import Progress
from .prefixes import Wordings, prefixes, sampled, wordings
from .products import products
from .values import Settings, Values

BATCH_TOKENS = 1536  # suffix tokens per batch; more gains nothing on a CPU and costs about 1 MB each
TOKENS_PER_ROW = 12  # suffix columns of a long row, for the estimate of memory
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's usual constants


def search(
    lm: LM, edits: Sequence[Edit], layers: Sequence[int], cfg: Settings, *, site: Literal["down", "block"] = "down",
    hits: int | None = None, texts: Wordings | None = None, progress: Progress | None = None,
) -> Values:  # fmt: skip
    """Optimise one δ per fact (and per layer).

    loss = mean over prefixes of the target's mean token NLL + kl * KL(p_δ || p_0) at the end of "{subject} is a"
    + decay * |δ|²/|v|², with Adam, projected to |δ| <= clamp * |v| after each step.

    Args:
        layers: where δ acts; several layers are optimised jointly, in one forward.
        site: δ is added to the down-projection's output, or to the output of the whole block (one layer only).
        hits: stop a fact once every target token has been the argmax under every prefix this many times
            (ENCORE's most-probable early stopping); None: off.
        texts: the words under which the facts must hold; None: ``texts_of``.
    Source: Meng et al. 2022 (arXiv:2202.05262) eq. 4; Meng et al. 2023 (arXiv:2210.07229) eq. 16.
    """
    texts = texts or texts_of(lm, edits, cfg, progress)
    told = iter(texts.rows(lm, edits, targets=True, end=cfg.end))
    essence = encode_all(lm, [f"{e.subject} is a" for e in edits], None, [e.subject for e in edits])
    rows = [[*islice(told, texts.count), last] for last in essence]  # of each fact; the last is its essence row
    suffixes = [len(group) * max(len(r.ids) - _at(r) for r in group) for group in rows]  # tokens of each fact
    batches = batches_of_tokens(suffixes, BATCH_TOKENS)
    found: list[Values] = []
    done = 0
    for batch in batches:
        run = _Search(lm, [rows[e] for e in batch], sorted(layers), cfg, site, hits)

        def tell(step: int, before: int = done, count: int = len(batch)) -> None:
            if progress:
                progress(before + count * step // max(cfg.steps, 1), len(edits), "searching values")

        with products(lm, cfg.products):
            found.append(run.values(tell))
        done += len(batch)
    if progress:
        progress(len(edits), len(edits), "searching values")
    return replace(_joined(found, [e for batch in batches for e in batch]), reworded=texts.reworded)


def texts_of(lm: LM, edits: Sequence[Edit], cfg: Settings, progress: Progress | None = None) -> Wordings:
    """The words under which values must hold, by the settings.

    Raises:
        SubjectNotFound: a prompt does not contain its subject.
    """
    for edit in edits:
        edit.need_subject()
    own = sampled(lm, cfg.sampled_prefixes, cfg.seed) if cfg.sampled_prefixes else ()
    heads = (*prefixes(cfg.short_prefixes, cfg.long_prefixes), *own)
    return wordings(lm, edits, heads, rewordings=cfg.rewordings, seed=cfg.seed, progress=progress)


def memory(lm: LM, facts: int, cfg: Settings) -> int:
    """Bytes a search takes on top of the model, rounded up: activations of one batch, logits of one head chunk, the
    base distributions of the batch's facts."""
    layout = lm.layout
    rows = 2 + cfg.short_prefixes + cfg.long_prefixes + cfg.sampled_prefixes + cfg.rewordings
    tokens = min(BATCH_TOKENS, facts * rows * TOKENS_PER_ROW)
    kept = tokens * (layout.n_layers * 12 * layout.d_model + 4 * sum(layout.widths))  # what autograd keeps of blocks
    batch = -(-tokens // (rows * 2))  # facts of a batch, at two columns a row
    short = min(cfg.head_tokens or 0, layout.vocab) * layout.d_model
    return 4 * (kept + short + (3 * HEAD_CHUNK + min(batch, facts)) * layout.vocab)


def _at(row: Row) -> int:
    assert row.subject_last is not None
    return row.subject_last


class _Search:
    """One batch of facts. Rows of fact e are e*R .. e*R+R-1, the last of them its essence row."""

    def __init__(
        self, lm: LM, groups: list[list[Row]], layers: list[int], cfg: Settings, site: str, hits: int | None
    ) -> None:
        self.lm, self.cfg, self.site, self.layers, self.hits = lm, cfg, site, layers, hits
        self.facts, self.per_fact = len(groups), len(groups[0])
        flat = [row for group in groups for row in group]
        is_essence = [i % self.per_fact == self.per_fact - 1 for i in range(len(flat))]
        ids = [row.ids if last else row.ids[:-1] for row, last in zip(flat, is_essence, strict=True)]
        ends = [row.target - 1 for row in flat]
        self.full = record(lm, ids, [_at(row) for row in flat], ends=ends, lowest=layers[0])
        spots = [  # (row, suffix column, label, weight) of every position that predicts a target token
            (i, t - 1 - _at(row), row.ids[t], 1 / ((self.per_fact - 1) * (len(row.ids) - row.target)))
            for i, row in enumerate(flat)
            if not is_essence[i]
            for t in range(row.target, len(row.ids))
        ]
        device = lm.device
        self.row, self.column, self.label = (torch.tensor(c, device=device) for c in list(zip(*spots, strict=True))[:3])
        self.weight = torch.tensor([s[3] for s in spots], device=device)
        essence = range(self.per_fact - 1, len(flat), self.per_fact)
        ends = [0 if cfg.faithful else len(flat[i].ids) - 1 - _at(flat[i]) for i in essence]
        self.essence_column = torch.tensor(ends, device=device)
        bare = torch.arange(0, len(flat), self.per_fact, device=device)
        if site == "block":
            self.clean = self.full.hidden[layers[0] + 1][bare, :1].float()  # [u, 1, d]
        else:
            self.clean = torch.stack([self.full.values[layer][bare].float() for layer in layers], 1)  # [u, n, d]
        with torch.no_grad():
            rows = torch.tensor(list(essence), device=device)
            base = self.full.hidden[lm.layout.n_layers][rows, self.essence_column]
            self.base_logp = logits(lm, base).log_softmax(-1)  # [u, V]
            self.short, self.short_logp = self._short(base)

    def _short(self, base: Tensor) -> tuple[ShortHead | None, Tensor]:
        """The head for the tokens that matter, and log probabilities [u, k+1] of it at the ends of essence rows."""
        count, hidden = self.cfg.head_tokens, self.full.hidden[self.lm.layout.n_layers]
        states = torch.cat([hidden[self.row, self.column], base])
        if count is None or self.cfg.faithful:
            return None, self.base_logp
        short = short_head(self.lm, states, count, self.label.unique())
        if short is None:
            return None, self.base_logp
        z = torch.cat([short.logits(base), short.others[len(self.row) :, None]], 1)
        return short, z.log_softmax(-1)

    def values(self, tell: Callable[[int], None]) -> Values:
        cfg, device = self.cfg, self.lm.device
        norm = self.clean.norm(dim=-1, keepdim=True)  # [u, n, 1]
        rate = cfg.lr * norm / self.clean.shape[-1] ** 0.5
        delta, m, v = (torch.zeros_like(self.clean) for _ in range(3))
        steps, losses, streak = [0] * self.facts, [0.0] * self.facts, [0] * self.facts
        live = list(range(self.facts))
        state = self.full
        for step in range(1, cfg.steps + 1):
            at = torch.tensor(live, device=device)
            with torch.enable_grad():
                leaf = delta[at].requires_grad_()
                out = self._forward(leaf, state)  # [rows, S, d]
                loss, hit = self._loss(leaf, out, at, self.short)
                (grad,) = torch.autograd.grad(loss.sum(), leaf)
            if self.short and (step == cfg.steps or any(hit) or bool((loss < cfg.stop).any())):
                with torch.no_grad():  # the whole head has the last word
                    loss, hit = self._loss(leaf, out, at, None)
            seen = loss.tolist()
            if not all(map(math.isfinite, seen)):
                raise Diverged(f"the value search left the finite numbers at step {step}. Lower lr, now {cfg.lr}.")
            streak = [s + 1 if h else s for s, h in zip(streak, hit, strict=True)]
            most = math.inf if self.hits is None else self.hits
            keep = [i for i, (x, s) in enumerate(zip(seen, streak, strict=True)) if x >= cfg.stop and s < most]
            for i, fact in enumerate(live):
                losses[fact] = seen[i]
            if cfg.faithful and step == cfg.steps:
                break  # released code leaves its loop before the last update
            if keep:
                pick = torch.tensor(keep, device=device)
                go, grad = at[pick], grad[pick]
                m[go] = BETA1 * m[go] + (1 - BETA1) * grad
                v[go] = BETA2 * v[go] + (1 - BETA2) * grad**2
                moved = delta[go] - rate[go] * (m[go] / (1 - BETA1**step)) / ((v[go] / (1 - BETA2**step)).sqrt() + EPS)
                limit = cfg.clamp * norm[go]
                delta[go] = moved * (limit / moved.norm(dim=-1, keepdim=True).clamp(min=EPS)).clamp(max=1)
                for i in keep:
                    steps[live[i]] = step
            tell(step)
            if not keep:
                break
            if len(keep) < len(live):
                live, streak = [live[i] for i in keep], [streak[i] for i in keep]
                rows = pick[:, None] * self.per_fact + torch.arange(self.per_fact, device=device)
                state = state.select(rows.reshape(-1))
        return Values(delta, self.clean, *self._final_keys(delta), steps, losses)

    def _loss(self, delta: Tensor, out: Tensor, facts: Tensor, short: ShortHead | None) -> tuple[Tensor, list[bool]]:
        """Loss [u] of the facts still there, whose states behind the last block are ``out`` [rows, S, d], and which of
        them have every target token as argmax."""
        cfg, u = self.cfg, len(facts)
        place = torch.full((self.facts,), -1, device=facts.device)
        place[facts] = torch.arange(u, device=facts.device)
        fact = place[self.row // self.per_fact]  # [answer positions] place of each position's fact, -1: gone
        here = fact >= 0
        fact, row = fact[here], fact[here] * self.per_fact + self.row[here] % self.per_fact
        last = torch.arange(self.per_fact - 1, len(out), self.per_fact, device=facts.device)
        labels, n, found = self.label[here], len(row), list[Tensor]()
        base, others = (self.short_logp if short else self.base_logp)[facts], torch.zeros(0)
        if short:
            labels = torch.searchsorted(short.tokens, labels)
            others = torch.cat([short.others[: len(here)][here], short.others[len(here) :][facts]])

        def term(z: Tensor, part: slice) -> Tensor:
            """-log p(label) at answers; behind them KL(p || p_base) at the ends of essence rows."""
            own = labels[part]
            if short:
                z = torch.cat([z, others[part, None]], 1)  # [c, k+1]
            told, logp = z[: len(own)], z[len(own) :].log_softmax(-1)
            found.append(told.detach().argmax(-1) == own)
            drift = (logp.exp() * (logp - base[max(0, part.start - n) : max(0, part.stop - n)])).sum(-1)
            return torch.cat([F.cross_entropy(told, own, reduction="none"), drift])

        states = torch.cat([out[row, self.column[here]], out[last, self.essence_column[facts]]])
        per_token, drift = head_loss(self.lm, states, term, short=short).split([n, u])  # the head is read once
        loss = torch.zeros(u, device=facts.device).index_add(0, fact, per_token * self.weight[here])
        loss = loss + cfg.kl * drift
        size, scale = delta.norm(dim=-1), self.clean[facts].norm(dim=-1)
        loss = loss + cfg.decay * ((size if cfg.faithful else size**2) / scale**2).mean(-1)
        missed = torch.zeros(u, device=facts.device).index_add(0, fact, (~torch.cat(found)).float())
        return loss, (missed == 0).tolist()

    def _forward(self, delta: Tensor, state: Recording, see: dict[int, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """States after the last block [rows, S, d] with ``delta`` [u, n, d] added at column 0 of every row."""
        delta = delta.repeat_interleave(self.per_fact, 0).to(self.lm.dtype)  # [rows, n, d]
        low = self.layers[0]
        if self.site == "block":
            changed = state.hidden[low + 1][:, :1] + delta
        else:  # within block `low` only column 0 changes: its attention sees nothing of δ
            changed = self._with_delta(state, state.hidden[low][:, :1], low, delta[:, 0], see)
        hidden = torch.cat([changed, state.hidden[low + 1][:, 1:]], 1)
        for place, layer in enumerate(self.layers[1:], start=1):
            hidden = state.forward(hidden, self.layers[place - 1] + 1, end=layer)
            hidden = self._with_delta(state, hidden, layer, delta[:, place], see)
        return state.forward(hidden, self.layers[-1] + 1)

    def _with_delta(
        self, state: Recording, hidden: Tensor, layer: int, delta: Tensor, see: dict[int, tuple[Tensor, Tensor]] | None
    ) -> Tensor:
        """Run one block with ``delta`` [rows, d] added to its down-projection's output at column 0."""
        n, s = hidden.shape[:2]
        add = torch.cat([delta[:, None], delta.new_zeros(n, s - 1, delta.shape[-1])], 1)  # [rows, s, d]

        def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if see is not None:
                key, value = (x.reshape(n, s, x.shape[-1])[:, 0] for x in (args[0], output))
                see[layer] = key, value
            return output + add.reshape(output.shape)

        with hooked(Hook(self.lm.module(self.lm.layout.downs[layer]), hook)):
            return state.forward(hidden, layer, end=layer + 1)

    @torch.no_grad()
    def _final_keys(self, delta: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        seen = {layer: (self.full.keys[layer], self.full.values[layer]) for layer in self.layers}
        if len(self.layers) > 1:
            self._forward(delta, self.full, seen)
        shape = (self.facts, self.per_fact, -1)
        keys = {layer: k.reshape(shape)[:, :-1].float() for layer, (k, _) in seen.items()}  # [u, J, f]
        return keys, torch.stack([y.reshape(shape)[:, 0].float() for _, y in seen.values()], 1)


def _joined(parts: list[Values], order: list[int]) -> Values:
    """Batches put together again, in the order the facts were given."""
    back = torch.tensor(order).argsort()

    def cat(tensors: Iterable[Tensor]) -> Tensor:
        whole = torch.cat(list(tensors))
        return whole[back.to(whole.device)]

    steps, losses = [x for part in parts for x in part.steps], [x for part in parts for x in part.loss]
    return Values(
        cat(part.delta for part in parts),
        cat(part.clean for part in parts),
        {layer: cat(part.keys[layer] for part in parts) for layer in parts[0].keys},
        cat(part.written for part in parts),
        [steps[i] for i in back.tolist()],
        [losses[i] for i in back.tolist()],
    )


def examples() -> list[Edit]:
    """Two facts with their subjects."""
    return [
        Edit("The Eiffel Tower is in", subject="Eiffel Tower", target="Rome"),
        Edit("Steve Jobs founded", subject="Steve Jobs", target="Paris"),
    ]
