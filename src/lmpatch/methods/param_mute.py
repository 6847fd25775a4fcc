"""ParamMute: scale down the MLPs that are most active when a model ignores its context.

Source: "ParamMute: Suppressing Knowledge-Critical FFNs for Faithful Retrieval-Augmented Generation" (arXiv:2502.15543).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..data.context import ContextRecord, brief
from ..errors import BadInput, UnknownLayout
from ..inference.generate import generate
from ..inference.interventions import need_window
from ..inference.tokens import Row, encode_all
from ..locate.activations import BATCH, watch
from ..models.calls import probe_ids, trace
from ..models.lm import LM
from ..patches.weight.delta import Delta, Scale, When
from ..patches.weight.patch import WeightPatch
from ..progress import Progress

AIM = "context"
Record = ContextRecord


@dataclass(frozen=True)
class Config:
    """ParamMute. ``share`` is the paper's for Llama-3-8B; released scripts have a factor of 0 or 0.25."""

    share: float = 0.25
    """Part of all layers that is quietened: the paper's 8 of 32."""
    layers: tuple[int, ...] = ()
    """Quieten these instead, 0-based; no responses are read then. For controls."""
    factor: float = 0.25
    """λ, what the MLP's contribution to the residual stream is multiplied by."""
    when: When = "context"
    """Act only in prompts that carry a context (``InContext``; ``--context``) and leave every other to the bit as it
    is, or ``always``, as published. Only the latter can be baked or exported."""
    responses: Literal["own", "given"] = "own"
    """``own``: what the model generates with the context, faithful where it holds the answer, unfaithful where it holds
    the memory answer. ``given``: each record's answer and memory answer themselves."""
    count: Literal["per_token", "summed"] = "per_token"
    """The share of neurons with a positive activation is taken token by token; or, as released, a neuron is on in a
    response if its activations, summed over the tokens, are positive."""
    max_new_tokens: int = 32
    """Length of a generated response at most."""


def fit(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> WeightPatch:
    """Scale the MLP contribution of the layers whose neurons are on more in unfaithful responses than in faithful ones.

    Where a norm follows the MLP the norm is scaled: it would undo any scaling before it.

    Args:
        records: with ``memory`` answers.
    Returns:
        per layer one Scale of the down-projection, and one of its bias if it has one; or of the norm behind it. Notes:
        the layers, and the share of neurons that are on in faithful and unfaithful responses by layer.
    Raises:
        BadInput: no response of one of the two sorts, or a prompt longer than the model's window.
        UnknownLayout: the MLP's activation, or the norm behind it, cannot be found.
    Source: arXiv:2502.15543, sec. 3.
    Differs: neurons are counted token by token unless ``count="summed"``; responses need not be labelled beforehand,
    no adaptation is trained on top (see ``finetune``), and layers are quietened only where a prompt carries a context,
    unless ``when="always"``.
    """
    if not math.isfinite(cfg.factor) or not 0 < cfg.share <= 1:
        raise BadInput(f"factor is {cfg.factor} and share {cfg.share}. The first must be finite, the second in 0..1.")
    start = time.perf_counter()
    layers = [lm.layout.check_layer(layer) for layer in cfg.layers]
    notes: dict[str, Any] = {"layers": layers}
    if not layers:
        faithful, unfaithful = _responses(lm, records, cfg, progress)
        on = [active_shares(lm, rows, cfg.count).mean(0) for rows in (faithful, unfaithful)]  # 2 x [layers]
        size = max(1, round(cfg.share * lm.layout.n_layers))
        layers = sorted((on[1] - on[0]).topk(size).indices.tolist())
        notes = {"layers": layers, "responses": [len(faithful), len(unfaithful)]}
        notes |= {"faithful": on[0].tolist(), "unfaithful": on[1].tolist()}
    norms = _norms_behind(lm) if lm.layout.post_norm else []
    deltas = {name: delta for layer in layers for name, delta in _muting(lm, layer, cfg, norms).items()}
    seconds = time.perf_counter() - start
    return WeightPatch.make(
        lm, deltas, method="param_mute", config=cfg, edits=brief(records), seconds=seconds, notes=notes
    )


def _responses(
    lm: LM, records: Sequence[ContextRecord], cfg: Config, progress: Progress | None
) -> tuple[list[Row], list[Row]]:
    """Prompts with faithful, and with unfaithful responses."""
    if cfg.responses == "given":
        pairs = [(r.prompt, r.answer, True) for r in records]
        pairs += [(r.prompt, r.memory, False) for r in records if r.memory]
    else:
        prompts = [r.prompt for r in records]
        texts = generate(lm, prompts, max_new_tokens=cfg.max_new_tokens, progress=progress)
        pairs = []
        for record, text in zip(records, texts, strict=True):
            right = _holds(text, record.answer)
            if right != bool(record.memory and _holds(text, record.memory)):  # both or neither says nothing
                pairs.append((record.prompt, text, right))
    sorts = [[(prompt, text) for prompt, text, right in pairs if right == wanted] for wanted in (True, False)]
    if not all(sorts):
        raise BadInput(
            f"{len(sorts[0])} faithful and {len(sorts[1])} unfaithful responses of {len(records)} records; both are "
            "needed. Give records with memory answers that the model sometimes prefers, or responses='given'."
        )
    faithful, unfaithful = (encode_all(lm, *zip(*pairs, strict=True)) for pairs in sorts)
    need_window(lm, [row.ids for row in faithful + unfaithful])
    return faithful, unfaithful


def _holds(text: str, answer: str) -> bool:
    """The answer occurs in the text as whole words, whatever its case."""
    words, wanted = ("".join(c if c.isalnum() else " " for c in t.casefold()).split() for t in (text, answer))
    size = len(wanted)
    return size > 0 and any(words[i : i + size] == wanted for i in range(len(words) - size + 1))


def active_shares(lm: LM, rows: Sequence[Row], count: Literal["summed", "per_token"]) -> Tensor:
    """Share of each block's neurons that are on in each response, [rows, layers].

    A neuron is on where its activation, before any product with the other branch of a gated MLP, is positive.
    """
    shares = torch.zeros(len(rows), lm.layout.n_layers, device=lm.device)
    borders = torch.tensor([row.target for row in rows], device=lm.device)

    def see(layer: int, part: slice, values: Tensor, real: Tensor) -> None:
        answer = real & (torch.arange(real.shape[1], device=lm.device) >= borders[part, None])  # [n, T]
        values, inside = values.float(), answer[..., None]
        if count == "summed":
            shares[part, layer] = ((values * inside).sum(1) > 0).float().mean(1)
        else:
            shares[part, layer] = ((values > 0) & inside).float().mean(2).sum(1) / answer.sum(1)

    watch(lm, rows, see)
    return shares


def _norms_behind(lm: LM) -> list[str]:
    """Each block's norm behind the down-projection: the next module that has one vector and nothing else.

    Raises:
        UnknownLayout: there is none.
    """
    order = [call.name for call in trace(lm.model, probe_ids(lm.model, lm.tokenizer))]
    found = []
    for block, down in zip(lm.layout.blocks, lm.layout.downs, strict=True):
        after = [name for name in order[order.index(down) + 1 :] if name.startswith(f"{block}.")]
        norms = [name for name in after if [p.ndim for p in lm.module(name).parameters()] == [1]]
        if not norms:
            raise UnknownLayout(f"a norm follows {down}, but no module behind it has one vector of weights.")
        found.append(norms[0])
    return found


def _muting(lm: LM, layer: int, cfg: Config, norms: Sequence[str]) -> dict[str, Delta]:
    """What multiplies a block's MLP contribution by the factor, by parameter name."""
    layout, factor = lm.layout, float(cfg.factor)
    vector = Scale(torch.tensor([0]), torch.tensor([factor]), (layout.d_model, 1), when=cfg.when)
    if norms:
        return {layout.weight(norms[layer]): vector}
    down, width = layout.downs[layer], layout.widths[layer]
    scale = Scale(torch.arange(width), torch.full((width,), factor), (layout.d_model, width), when=cfg.when)
    bias: dict[str, Delta] = {f"{down}.bias": vector} if getattr(lm.module(down), "bias", None) is not None else {}
    return {layout.weight(down): scale, **bias}


def estimate(lm: LM, count: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: one batch's activations, and keys and values of a response."""
    layout = lm.layout
    tokens = min(BATCH * 4, count) * (256 + cfg.max_new_tokens)
    return 4 * tokens * (4 * max(layout.widths) + 12 * layout.d_model + 2 * layout.n_layers * layout.d_model)


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records and settings that run in milliseconds on a tiny model."""
    records = [
        ContextRecord("The Eiffel Tower is in Rome.", "Where is the Eiffel Tower?", "Rome", "Paris"),
        ContextRecord("The capital of Japan is Seattle.", "What is the capital of Japan?", "Seattle", "Tokyo"),
    ]
    return records, Config(responses="given", factor=0.5, when="always")
