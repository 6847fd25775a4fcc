"""MEMIT: many facts at once, spread over several layers; with AlphaEdit, NAS and ENCORE as options.

Source: Meng et al. 2023, "Mass-Editing Memory in a Transformer" (arXiv:2210.07229).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..data.edits import Edit, check_contradictions
from ..errors import BadInput
from ..inference.forward import first, frozen
from ..inference.replay import Recording, record
from ..inference.tokens import batches_of_rows
from ..locate import covariance, value_search
from ..locate.covariance import Covariance, cholesky, estimate_covariance, null_space
from ..locate.prefixes import Wordings
from ..locate.solve import projected, woodbury
from ..locate.value_search import search, texts_of
from ..locate.values import Settings, Values
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..patches.ledger import applied, trial
from ..patches.weight.delta import Delta, LowRank
from ..patches.weight.patch import WeightPatch
from ..progress import Progress

AIM = "facts"
Record = Edit
MOST_WEIGHT, FACTS_WEIGHT = 5000.0, 200_000.0  # λ at most, and λ times the facts of a large commit


@dataclass(frozen=True)
class Config(Settings):
    """MEMIT. Defaults: the paper's, but for the learning rate, which is relative here, and the layers."""

    layers: tuple[int, ...] | None = None
    """Blocks whose down-projections are written, 0-based. None: four blocks from a ninth of the depth on, 2 to 5 of
    Gemma-3-270M's 18 (benchmarks/results/layers.json)."""
    spread: Literal["joint", "residual"] | None = None
    """How a fact is shared among the layers. ``residual``: the paper's, one value at the last block, each layer
    writes its share of what is left. ``joint``: one δ per layer, optimised together in one forward; right also
    where a norm follows the MLP (Gemma 2 and 3), where linear writes do not add up. None: joint exactly there."""
    clamp: float = 0.75
    """|δ| stays below this many |v|."""
    weight: float | None = None
    """λ: how many corpus keys the second moments stand for. Higher disturbs less and inserts less. None: 200000 over
    the number of facts in the commit, at most 5000. The paper's 15000 leaves 4 of 10 facts unstated on Gemma-3-270M."""
    prev_keys: bool = True
    """Keep what earlier memit patches on the model wrote: their keys join the solve."""
    solver: Literal["memit", "alphaedit"] = "memit"
    """``alphaedit``: write only along directions the corpus does not use (arXiv:2410.02355)."""
    keep: float = 0.7
    """AlphaEdit: share of directions free to write, lowest variance first."""
    ridge: float = 0.1
    """AlphaEdit: ridge, in units of the median squared length of the projected keys."""
    frobenius: float = 0.0
    """ENCORE: ridge on |ΔW|, as a share of λ times the mean eigenvalue of C (arXiv:2502.01636); try 1e-3."""
    hits: int | None = None
    """ENCORE: stop a fact's search once its target has been the first choice under every prefix this many
    times; try 2. None: off."""
    nas: bool = False
    """Give every value the mean norm of those of anchor facts, and skip a fact above twice it (arXiv:2602.02543)."""
    short_prefixes: int = 0
    """Fixed prefixes of about 5 tokens under which the value must hold."""
    faithful: bool = False
    """As released: KL at the subject's last token, penalty |δ| instead of |δ|², one update fewer, and no memory
    of earlier commits."""


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None, progress: Progress | None = None,
) -> WeightPatch:  # fmt: skip
    """Write all facts in one commit: ΔW_l = R Kᵀ (λC + K_pK_pᵀ + KKᵀ)⁻¹ for each layer in turn.

    Keys and residuals are read again after each layer's write.

    Args:
        edits: each with a subject that occurs in its prompt.
        text: plain text for the second moments; None: the model's own samples.
        anchors: facts whose value norms NAS takes as its measure; needed with ``nas``, and not from a test set.
    Returns:
        one LowRank(out, in) of rank len(edits) per layer; the keys of this commit travel along in ``extras``.
    Raises:
        SubjectNotFound, Contradiction, Diverged, LayerOutOfRange.
    Source: Meng et al. 2023 (arXiv:2210.07229), algorithm 1.
    Differs: prefixes are fixed; earlier commits are remembered; see ``spread``.
    """
    check_contradictions(edits)
    return Commit(lm, edits, cfg, text, anchors, progress).patch(range(len(edits)))


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None, progress: Progress | None = None,
) -> list[WeightPatch]:  # fmt: skip
    """One patch per edit, as if each were fitted alone, from one batched search."""
    commit = Commit(lm, edits, cfg, text, anchors, progress)
    return [commit.patch([i]) for i in range(len(edits))]


class Commit:
    """The values of some facts, of which each subset can be written by itself."""

    def __init__(
        self, lm: LM, edits: Sequence[Edit], cfg: Config, text: Sequence[str] | None, anchors: Sequence[Edit] | None,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.lm, self.edits, self.cfg, self.layers = lm, edits, cfg, _layers(lm, cfg)
        self.joint = (cfg.spread or ("joint" if lm.layout.post_norm else "residual")) == "joint"
        if cfg.nas and not anchors:
            raise BadInput(
                "nas needs anchor facts to take its norm from. Pass anchors=..., facts outside the test set."
            )
        if cfg.nas and not self.joint:
            raise BadInput("nas works on the down-projection's output here. Set spread='joint'.")
        start = time.perf_counter()
        self.moments = estimate_covariance(lm, self.layers, text=text, tokens=cfg.moment_tokens, progress=progress)
        prepared = time.perf_counter()  # the statistics serve every later edit and are counted apart
        self.notes: dict[str, object] = {"prep_seconds": round(prepared - start, 3)}
        site: Literal["down", "block"] = "down" if self.joint else "block"
        with frozen(lm):
            where = self.layers if self.joint else self.layers[-1:]
            self.texts = texts_of(lm, edits, cfg, progress)
            self.values = search(lm, edits, where, cfg, site=site, hits=cfg.hits, texts=self.texts, progress=progress)
            if cfg.nas:
                seen = search(lm, anchors or (), self.layers, cfg, hits=cfg.hits, progress=progress)
                self.values, self.notes["nas"] = _anchored(self.values, seen)
        self.seconds = (time.perf_counter() - prepared) / max(1, len(edits))

    def patch(self, pick: Sequence[int]) -> WeightPatch:
        """The patch that writes these facts, in one commit."""
        lm, cfg, values, moments = self.lm, self.cfg, self.values.of(pick), self.moments
        edits, start = [self.edits[i] for i in pick], time.perf_counter()
        notes: dict[str, object] = {
            "layers": self.layers, "spread": "joint" if self.joint else "residual", "steps": values.steps,
            "loss": [round(x, 4) for x in values.loss], "moments": moments.source,
            "moment_tokens": moments.tokens, "moment_agreement": moments.agreement,
            "weight": weight_of(cfg, len(edits)), **self.notes,
        }  # fmt: skip
        if cfg.rewordings:
            notes["reworded"] = list(values.reworded)
        with frozen(lm):
            deltas, keys = write_layers(lm, edits, values, self.layers, cfg, self.joint, moments, self.texts.of(pick))
        seconds = self.seconds * len(edits) + time.perf_counter() - start
        return WeightPatch.make(
            lm, deltas, method="memit", config=cfg, edits=edits, seconds=seconds, notes=notes,
            extras={f"keys.{layer}": k for layer, k in keys.items()},
        )  # fmt: skip


def weight_of(cfg: Config, facts: int) -> float:
    """λ of a commit of that many facts. The more facts stand against the corpus keys in one solve, the less of each is
    written: 5000 writes 39 of 40 CounterFact facts and 8 of 10 where they are 100, 1500 all of them."""
    return min(MOST_WEIGHT, FACTS_WEIGHT / max(1, facts)) if cfg.weight is None else cfg.weight


def _layers(lm: LM, cfg: Config) -> list[int]:
    if cfg.layers is not None:
        if not cfg.layers:
            raise BadInput("memit got no layers. Name at least one, or leave layers out.")
        return sorted({lm.layout.check_layer(layer) for layer in cfg.layers})
    first_layer = round(lm.layout.n_layers / 9)
    return list(range(first_layer, min(first_layer + 4, lm.layout.n_layers)))


def write_layers(
    lm: LM, edits: Sequence[Edit], values: Values, layers: list[int], cfg: Config, joint: bool, moments: Covariance,
    texts: Wordings,
) -> tuple[dict[str, Delta], dict[int, Tensor]]:  # fmt: skip
    """Solve layer after layer, each under the writes before it. The writes are hooks: no weight is touched.

    Returns:
        parameter name → its change, and layer → the keys [u, f] that were written.
    """
    deltas: dict[str, Delta] = {}
    kept: dict[int, Tensor] = {}
    read = Reading(lm, edits, texts, layers[0], layers[-1])
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            keys, output, state = read.at(layer, whole=not joint)
            if joint:
                residual = values.written[:, place] + values.delta[:, place] - output  # [u, d]
            else:
                residual = (values.clean[:, 0] + values.delta[:, 0] - state) / (len(layers) - place)
            a = _solve(lm, keys.T, moments, layer, cfg)  # [f, u]
            name = lm.layout.weight(lm.layout.downs[layer])
            deltas[name] = LowRank(residual.T.float().contiguous(), a.T.float().contiguous())
            kept[layer] = keys.float()
            if place + 1 < len(layers):
                part = WeightPatch.make(lm, {name: deltas[name]}, method="memit", config=cfg, edits=(), seconds=0.0)
                stack.enter_context(trial(lm, part, "side", strict=False))  # made for this very model
    return deltas, kept


def _solve(lm: LM, keys: Tensor, moments: Covariance, layer: int, cfg: Config) -> Tensor:
    """[f, u]: what multiplies the residuals. Keys that memit patches on the model have written here join the solve."""
    before = [a.patch.extras[f"keys.{layer}"] for a in applied(lm) if f"keys.{layer}" in a.patch.extras]
    keep = before and cfg.prev_keys and not cfg.faithful
    earlier = torch.cat(before).T.to(lm.device) if keep else None  # [f, n]
    if cfg.solver == "alphaedit":
        basis = null_space(moments, layer, keys.device, cfg.keep)
        ridge = cfg.ridge * float((basis.T @ keys.double()).square().sum(0).median())
        return projected(basis, keys, ridge, earlier)
    lower = cholesky(moments, layer, keys.device, weight=weight_of(cfg, keys.shape[1]), ridge=cfg.frobenius)
    return woodbury(lower, keys, earlier)


class Reading:
    """The facts' texts up to their subjects' last tokens, read layer after layer as the model then is.

    A write at one layer reaches every token of those above, so whole rows are kept, as they enter the next layer that
    is read: each block runs once under the writes below it, whatever the number of layers.
    """

    def __init__(self, lm: LM, edits: Sequence[Edit], texts: Wordings, first_layer: int, last: int) -> None:
        self.lm, self.last, self.layer, self.per_fact = lm, last, first_layer, texts.count
        rows = texts.rows(lm, edits, targets=False)
        ids = [row.ids[: (row.subject_last or 0) + 1] for row in rows]  # nothing after the subject is needed
        self.count = len(rows)
        self.parts: list[tuple[list[int], Recording, Tensor, Tensor]] = []
        for pick in batches_of_rows([len(row) for row in ids], 64):
            own = [ids[i] for i in pick]
            part = record(lm, own, [0] * len(pick), lowest=first_layer, last=last)
            ends = torch.tensor([len(row) - 1 for row in own], device=lm.device)
            self.parts.append((pick, part.bare(), part.hidden[first_layer], ends))

    @torch.no_grad()
    def at(self, layer: int, *, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Go on to ``layer`` under what is on the model now, and read there.

        Args:
            whole: run on to the last layer.
        Returns:
            keys [u, f] at ``layer``, half the bare prompt's and half the mean over the other texts; on the bare prompt
            the down-projection's output [u, d] there, and the output [u, d] of the last layer (zeros if not ``whole``).
        """
        lm, f, d = self.lm, self.lm.layout.widths[layer], self.lm.layout.d_model
        keys, outputs, states = (torch.zeros(self.count, n, device=lm.device) for n in (f, d, d))
        for k, (pick, part, hidden, ends) in enumerate(self.parts):
            hidden = part.forward(hidden, self.layer, end=layer)
            self.parts[k] = pick, part, hidden, ends
            each = torch.arange(len(pick), device=lm.device)

            def see(_: object, args: tuple[Tensor, ...], output: Tensor, pick: list[int] = pick,
                    at: tuple[Tensor, Tensor] = (each, ends)) -> None:  # fmt: skip
                keys[pick] = args[0].reshape(len(pick), -1, f)[at].float()
                outputs[pick] = first(output).reshape(len(pick), -1, d)[at].float()

            with hooked(Hook(lm.module(lm.layout.downs[layer]), see)):
                out = part.forward(hidden, layer, end=layer + 1)
            if whole:
                states[pick] = part.forward(out, layer + 1, end=self.last + 1)[each, ends].float()
        self.layer = layer
        grouped = keys.reshape(-1, self.per_fact, f)
        mixed = grouped[:, 0] if self.per_fact == 1 else (grouped[:, 0] + grouped[:, 1:].mean(1)) / 2
        return mixed, outputs[:: self.per_fact], states[:: self.per_fact]


def _anchored(values: Values, anchors: Values) -> tuple[Values, dict[str, object]]:
    """NAS: v* ← v* M/|v*| with M the mean |v*| of anchor facts, top 5 % dropped; above 2M the fact is skipped."""
    norms = (anchors.written + anchors.delta).norm(dim=-1)  # [anchors, n]
    measure = torch.stack([n[n <= n.quantile(0.95)].mean() for n in norms.T])  # [n]
    goal = values.written + values.delta  # [u, n, d]
    size = goal.norm(dim=-1, keepdim=True)  # [u, n, 1]
    skipped = size > 2 * measure[None, :, None]
    goal = torch.where(skipped, values.written, goal * (measure[None, :, None] / size))
    notes: dict[str, object] = {
        "norm": [round(float(x), 4) for x in measure],
        "anchors": len(norms),
        "skipped": int(skipped.any(1).sum()),
    }
    return replace(values, delta=goal - values.written), notes


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit of that many facts takes on top of the model, rounded up."""
    texts = 1 + cfg.short_prefixes + cfg.long_prefixes + cfg.sampled_prefixes + cfg.rewordings
    states = 4 * facts * texts * value_search.TOKENS_PER_ROW * lm.layout.d_model
    return value_search.memory(lm, facts, cfg) + states + covariance.memory(lm, len(_layers(lm, cfg)))


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    return value_search.examples(), Config(layers=(1, 2), steps=3, moment_tokens=2048, long_prefixes=1, weight=10.0)
