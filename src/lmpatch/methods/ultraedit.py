"""UltraEdit: one gradient per fact, normalised by running statistics and written by ridge regression; no training.

Source: Gu et al. 2025, "UltraEdit" (arXiv:2505.14679); StableEdit (arXiv:2605.11836) for ``whiten``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .. import tensor_file
from ..data.edits import Edit, check_contradictions
from ..errors import BadInput
from ..files import cache_dir
from ..inference.forward import HEAD_CHUNK, frozen
from ..inference.tokens import End, Row, encode_all, ended
from ..locate.covariance import text_rows
from ..locate.features import BATCH, Features, features
from ..locate.samples import LENGTH, kept, own_rows
from ..locate.solve import dual
from ..locate.statistics import Statistics
from ..models.lm import LM
from ..patches.ledger import applied, suspended
from ..patches.weight.delta import Delta, Dense, LowRank
from ..patches.weight.patch import WeightPatch
from ..progress import Progress
from ..provenance import hash_json
from ..training.adapter import shape

AIM = "facts"
Record = Edit
TOKENS, PROMPT = 4, 32  # of a long target and a long prompt, for the estimate of memory
BODY, ANSWER = 10, 2  # tokens of a warm-up prompt and of what stands behind it
TEXT = 2 * 8 * LENGTH  # tokens of given text that a warm-up reads


@dataclass(frozen=True)
class Config:
    """UltraEdit. Defaults: the paper's algebra in units of the model's own values and keys."""

    layers: tuple[int, ...] | None = None
    """Blocks that are written, 0-based. None: a third of the blocks, the last block left out; 11 to 16 of 18."""
    modules: Literal["down", "up"] = "down"
    """``down``: the down-projections. ``up``: all projections into the MLP."""
    strength: float = 0.5
    """Length of a typical written value, in units of the median length of the module's outputs. The paper's eta is
    this over width and root of the output's width."""
    ridge: float = 0.1
    """Ridge of the regression, in units of the median squared length of the keys. StableEdit's is ten times
    UltraEdit's."""
    whiten: bool = False
    """StableEdit: gradients are whitened instead of scaled entry by entry, once there are more of them than entries."""
    statistics: Literal["running", "commit", "none"] = "running"
    """What keys and gradients are normalised by: the statistics of all commits on the model and of this one; of this
    one alone; or nothing."""
    warmup: int = 100
    """Beginnings of plain text whose statistics come first, each with the continuation of another, which is as
    unexpected as a new answer. 0: none, as released; a single fact of one token then writes nothing."""
    end: End | None = None
    """What is trained behind the target, so that an answer ends with it. ``answer``: a new line, or of a chat model the
    end of its turn. ``eos``: the end-of-sequence token."""


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None, progress: Progress | None = None,
) -> WeightPatch:  # fmt: skip
    """Write all facts in one commit: ΔWᵀ = (HᵀH + rI)⁻¹ HᵀV with V = -η |Ĥ|² D̂ for each module.

    H are the module's inputs and D the gradients at its outputs, where a target token is predicted; Ĥ and D̂ are
    normalised by running statistics. Those of this commit travel in the patch, and a later fit joins the statistics of
    all patches on the model, so a patch that is taken off takes its share with it.

    Args:
        edits: subjects are not needed.
        text: plain text for the warm-up; None: the model's own samples.
        anchors: facts outside the test set whose statistics are the warm-up instead. They are not written.
    Returns:
        one LowRank(out, in) per module, of as many ranks as there are target tokens; Dense where that is smaller.
    Raises:
        BadInput: ridge or strength out of range, no layers, or too few target tokens for statistics.
        Contradiction: one prompt is asked to have two targets.
    Source: Gu et al. 2025 (arXiv:2505.14679), sec. 4; whitening: arXiv:2605.11836.
    Differs: strength and ridge are relative, the paper's numbers (1e-6, 1) have the units of one model. Losses are sums
    over a fact's tokens, so a batch's size moves nothing. Variances count each token once. The warm-up gives statistics
    only; StableEdit writes its facts into the weights.
    """
    check_contradictions(edits)
    return Commit(lm, edits, cfg, text, anchors, progress).patch(range(len(edits)))


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None, progress: Progress | None = None,
) -> list[WeightPatch]:  # fmt: skip
    """One patch per edit, as if each were fitted alone, from one pass over all."""
    commit = Commit(lm, edits, cfg, text, anchors, progress)
    return [commit.patch([i]) for i in range(len(edits))]


class Commit:
    """What was read of some facts, of which each subset can be written by itself."""

    def __init__(
        self, lm: LM, edits: Sequence[Edit], cfg: Config, text: Sequence[str] | None, anchors: Sequence[Edit] | None,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        if cfg.ridge <= 0 or cfg.strength <= 0 or cfg.warmup < 0:
            raise BadInput(
                f"ridge is {cfg.ridge}, strength {cfg.strength} and warmup {cfg.warmup}. Give a ridge and a strength "
                "above 0, and no warmup below."
            )
        self.lm, self.edits, self.cfg, self.layers = lm, edits, cfg, _layers(lm, cfg)
        self.modules = _modules(lm, cfg, self.layers)
        start = time.perf_counter()
        with frozen(lm):
            self.first: dict[str, tuple[Statistics, ...]] = {}
            if cfg.statistics == "running" and (anchors or cfg.warmup):
                self.first = self._warmup(text, anchors or (), progress)
            prepared = time.perf_counter()  # the warm-up serves every later edit and is counted apart
            self.features = features(lm, _rows(lm, edits, cfg), self.modules, self.layers[0], progress)
        self.notes = {"layers": self.layers, "prep_seconds": round(prepared - start, 3)}
        self.seconds = (time.perf_counter() - prepared) / max(1, len(edits))

    def patch(self, pick: Sequence[int]) -> WeightPatch:
        """The patch that writes these facts, in one commit."""
        lm, start, count = self.lm, time.perf_counter(), 0.0
        deltas: dict[str, Delta] = {}
        extras: dict[str, Tensor] = {}
        for name in self.modules:
            own = self.features[name].of(pick)
            keys, gradients = own.keys.double(), own.gradients.double()
            if self.cfg.statistics != "none":
                parts = Statistics.of(keys), Statistics.of(gradients, full=self.cfg.whiten)
                known = [Statistics.joined([part, *self._before(name, i)]) for i, part in enumerate(parts)]
                keys, gradients, count = known[0].normalise(keys), self._scaled(known[1], gradients), known[0].count
                if self.cfg.statistics == "running":
                    extras |= {_extra(name, i, self.cfg): part.row() for i, part in enumerate(parts)}
            deltas[lm.layout.weight(name)] = _written(own, keys, gradients, self.cfg)
        edits = [self.edits[i] for i in pick]
        notes = {**self.notes, "tokens": len(own.keys), "statistics": count}
        seconds = self.seconds * len(edits) + time.perf_counter() - start
        return WeightPatch.make(
            lm, deltas, method="ultraedit", config=self.cfg, edits=edits, seconds=seconds, notes=notes, extras=extras
        )

    def _scaled(self, known: Statistics, gradients: Tensor) -> Tensor:
        if known.count < 2:
            raise BadInput(
                "one target token has no statistics to be normalised by. Leave warmup at its default, give anchors, or "
                "more facts."
            )
        return known.whiten(gradients) if self.cfg.whiten else known.normalise(gradients)

    def _before(self, name: str, which: int) -> list[Statistics]:
        """The statistics of the warm-up and of the commits that are on the model; ``which``: keys, gradients."""
        if self.cfg.statistics != "running":
            return []
        whole, width = self.cfg.whiten and which == 1, shape(self.lm, name)[1 - which]
        found = list(self.first[name][which : which + 1]) if self.first else []
        for kind in KINDS[which][-1:] if whole else KINDS[which]:
            rows = [row for on in applied(self.lm) for row in on.patch.extras.get(f"{kind}.{name}", ())]
            found += Statistics.from_rows([row.to(self.lm.device) for row in rows], width)
        return found if whole else [one.diagonal() for one in found]

    def _warmup(
        self, text: Sequence[str] | None, anchors: Sequence[Edit], progress: Progress | None
    ) -> dict[str, tuple[Statistics, ...]]:
        """Of the anchors, or of plain text, read without the patches on the model. Those of text are kept."""
        lm, whole = self.lm, self.cfg.whiten
        with suspended(lm):
            if anchors:
                rows = _rows(lm, anchors, self.cfg)
            else:
                rows = _unexpected(_text(lm, text, self.layers, progress), self.cfg.warmup)
            head = {"warmup": hash_json([lm.fingerprint(), str(lm.dtype), self.modules, whole, [r.ids for r in rows]])}
            path = cache_dir() / "warmup" / f"{head['warmup'][:32]}.safetensors"
            if file := None if anchors else kept(path, head):
                tensors = file[1]
            else:
                read = features(lm, rows, self.modules, self.layers[0], progress)
                each = {n: (Statistics.of(f.keys), Statistics.of(f.gradients, full=whole)) for n, f in read.items()}
                tensors = {f"{i}/{n}": s.row().cpu() for n, both in each.items() for i, s in enumerate(both)}
                if not anchors:
                    tensor_file.write(path, head, tensors)
        return {
            name: tuple(
                Statistics.from_rows(tensors[f"{i}/{name}"].to(lm.device), shape(lm, name)[1 - i])[0] for i in range(2)
            )
            for name in self.modules
        }


KINDS = (("keys",), ("gradients", "covariances"))
"""In a patch's extras, before the module's name: statistics of keys; of gradients, entry by entry or of all pairs."""


def _extra(name: str, which: int, cfg: Config) -> str:
    return f"{KINDS[which][-1 if cfg.whiten else 0]}.{name}"


def _written(own: Features, keys: Tensor, gradients: Tensor, cfg: Config) -> LowRank | Dense:
    """The ridge regression of the values on the raw keys.

    Args:
        keys: [N, in] normalised, fp64.
        gradients: [N, out] normalised, fp64.
    """
    values = -keys.square().sum(1, keepdim=True) * gradients  # [N, out]
    if cfg.statistics == "none":  # nothing says how large they are
        typical = float(values.norm(dim=1).median().clamp(min=torch.finfo(torch.float64).tiny))
    else:
        typical = keys.shape[1] * gradients.shape[1] ** 0.5  # where every entry has variance 1
    values = values * (cfg.strength * float(own.sizes.median()) / typical)
    raw = own.keys.double()
    ridge = cfg.ridge * float(raw.square().sum(1).median())
    a, b = dual(raw.T, ridge).T, values.T  # [N, in], [out, N]
    if len(a) * (a.shape[1] + len(b)) > a.shape[1] * len(b):
        return Dense((b @ a).float())
    return LowRank(b.float().contiguous(), a.float().contiguous())


def _layers(lm: LM, cfg: Config) -> list[int]:
    if cfg.layers is not None:
        if not cfg.layers:
            raise BadInput("ultraedit got no layers. Name at least one, or leave layers out.")
        return sorted({lm.layout.check_layer(layer) for layer in cfg.layers})
    n = lm.layout.n_layers
    return list(range(max(0, n - 1 - max(1, n // 3)), max(1, n - 1)))


def _modules(lm: LM, cfg: Config, layers: Sequence[int]) -> list[str]:
    layout = lm.layout
    return [name for i in layers for name in ([layout.downs[i]] if cfg.modules == "down" else layout.ups[i])]


def _rows(lm: LM, edits: Sequence[Edit], cfg: Config) -> list[Row]:
    return ended(lm, encode_all(lm, [e.prompt for e in edits], [e.target for e in edits]), cfg.end)


def _text(lm: LM, text: Sequence[str] | None, layers: Sequence[int], progress: Progress | None) -> Tensor:
    """Ids [n, LENGTH] of text; its own samples are those that rome and memit take, too."""
    if text is not None:
        return text_rows(lm, text, TEXT)
    return own_rows(lm, 10 * max(lm.layout.widths[i] for i in layers), 0, progress=progress)


def _unexpected(ids: Tensor, count: int) -> list[Row]:
    """At most ``count`` beginnings of texts [n, LENGTH], each with the continuation of another behind it."""
    opening, body = ids[:, 0].tolist(), ids[:, 1:]
    size = BODY + ANSWER
    starts = range(0, body.shape[1] - size + 1, size)
    pieces = [(opening[i], body[i, j : j + size].tolist()) for j in starts for i in range(len(body))][:count]
    others = [piece[BODY:] for _, piece in pieces]
    shift = max(1, len(pieces) // 2)
    return [
        Row((first, *piece[:BODY], *others[(k + shift) % len(pieces)]), BODY + 1)
        for k, (first, piece) in enumerate(pieces)
    ]


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit of that many facts takes on top of the model, rounded up: features and factors of all facts, states
    of one batch, the solve, and with ``whiten`` the covariances."""
    layout, modules = lm.layout, _modules(lm, cfg, _layers(lm, cfg))
    sizes = [sum(shape(lm, name)) for name in modules]
    tokens, widest = facts * TOKENS, max(max(shape(lm, name)) for name in modules)
    batch = BATCH * PROMPT * layout.n_layers * 6 * layout.d_model
    solved = 8 * (4 * min(tokens, widest) ** 2 + 6 * tokens * widest)
    covariances = 8 * 4 * max(shape(lm, name)[0] for name in modules) ** 2 * (len(modules) if cfg.whiten else 0)
    return 4 * (2 * tokens * sum(sizes) + batch + 3 * HEAD_CHUNK * layout.vocab) + solved + covariances


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
    return edits, Config(layers=(1, 2), warmup=8)
