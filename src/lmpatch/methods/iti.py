"""ITI: steer attention heads towards the context's answer.

A linear probe is trained on each head's output; the heads whose probes tell best whether an answer is the context's or
the memory's get a constant pushed into their output.

Source: Li et al. 2023, "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model"
(arXiv:2306.03341); likenneth/honest_llama. There the two sorts of answers are true and false ones.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.context import ContextRecord, brief
from ..errors import BadInput, UnknownLayout
from ..inference.forward import blocks, positions
from ..inference.interventions import need_window
from ..inference.tokens import batches_of_rows, encode_all, padded
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..models.units import Head
from ..patches.hook.patch import HookPatch, Site
from ..probes.integrated_gradients import probe as integrated_gradients
from ..progress import Progress

AIM = "context"
Record = ContextRecord

BATCH = 16  # texts per forward
NEWTON = 50  # steps at most; a probe takes about ten
Direction = Literal["probe", "mass_mean"]


@dataclass(frozen=True)
class Config:
    """ITI. ``heads`` and ``strength`` are starting values for a model of 270M parameters with 72 heads; the paper takes
    48 of 1,024 and 15 for LLaMA-7B."""

    heads: int = 8
    """K, heads that are pushed: those whose probes are right most often on held-out records."""
    strength: float = 5.0
    """Alpha, in standard deviations of the head's output along the direction."""
    direction: Direction = "mass_mean"
    """From the mean output at memory answers to the mean at context answers, or the probe's coefficients."""
    positions: Literal["all", "newest"] = "all"
    """Push at every token, as a bias would; or as released at the newest one only: from the last prompt token on."""
    folds: int = 2
    """Parts of the records; each is held out once."""
    examples: int = 200
    """Records used at most, the first ones; each gives two texts."""
    control_seed: int | None = None
    """Push as many heads drawn at random with this seed instead. None: off."""


@dataclass(frozen=True)
class HeadProbes:
    """How well the outputs of all heads tell the two sorts of answers apart."""

    accuracy: Tensor
    """[layers, heads] share of held-out texts that the probe tells right."""
    loss: Tensor
    """[layers, heads] mean negative log likelihood of held-out texts, nats."""
    directions: dict[Direction, Tensor]
    """[layers, heads, d_h] of unit length, towards the context's answer."""
    spreads: dict[Direction, Tensor]
    """[layers, heads] standard deviation of the outputs along them."""


def fit(
    lm: LM, records: Sequence[ContextRecord], cfg: Config, *, probes: HeadProbes | None = None,
    progress: Progress | None = None,
) -> HookPatch:  # fmt: skip
    """Add a constant to the outputs of the heads that know best which answer is the context's: alpha, times the spread
    of the output along a direction, times that direction.

    Args:
        records: with ``memory`` answers; those without one, or with the same one, are left out.
        probes: what ``observe`` gives for these records, if it is there already.
    Returns:
        one vector per layer that holds such a head, in front of the attention's output projection. Notes: the heads
        and their probes' accuracy.
    Raises:
        BadInput: fewer records with two answers than folds, more heads than the model has, or a record longer than its
            window.
        UnknownLayout: the attention's output is no whole number of heads.
    Source: Li et al. 2023 (arXiv:2306.03341), sec. 3.
    Differs: acts at every token unless ``positions="newest"``; heads whose probes are equally often right are ordered
    by the likelihood of held-out texts; nothing is tuned here.
    """
    start = time.perf_counter()
    _check(lm, cfg)
    probes = probes or observe(lm, records, cfg, progress=progress)
    heads = best_heads(lm, probes, cfg)
    directions, spreads = probes.directions[cfg.direction], probes.spreads[cfg.direction]
    vectors: dict[str | Site, Tensor] = {}
    for head in heads:
        site = Site(lm.layout.attn_outs[head.layer], "input", "answer" if cfg.positions == "newest" else "all")
        by_head = vectors.setdefault(site, torch.zeros_like(directions[0]))  # [heads, d_h]
        by_head[head.index] = cfg.strength * spreads[head.layer, head.index] * directions[head.layer, head.index]
    return HookPatch.make(
        lm, {site: by_head.flatten() for site, by_head in vectors.items()}, method="iti", config=cfg,
        edits=brief(records), seconds=time.perf_counter() - start,
        notes={"heads": [[h.layer, h.index, float(probes.accuracy[h.layer, h.index])] for h in heads]},
    )  # fmt: skip


def observe(lm: LM, records: Sequence[ContextRecord], cfg: Config, *, progress: Progress | None = None) -> HeadProbes:
    """Read every head's output at the end of each answer, and train a probe on each."""
    _check(lm, cfg)
    used = [r for r in records[: cfg.examples] if r.memory and r.memory != r.answer]
    if len(used) < cfg.folds:
        raise BadInput(
            f"{len(used)} of {len(records)} records have an answer of memory beside the context's, and {cfg.folds} "
            "folds need one each. Give records with memory answers."
        )
    outputs = head_outputs(lm, used, progress)  # [2 * records, layers, heads, d_h]
    right = torch.arange(len(outputs)) < len(used)
    fold = torch.arange(len(used)).repeat(2) % cfg.folds  # both answers of a record are held out together
    layers = [_layer(layer, right, fold) for layer in outputs.double().unbind(1)]
    accuracy, loss, probe, mass = (torch.stack(parts) for parts in zip(*layers, strict=True))
    directions: dict[Direction, Tensor] = {"probe": F.normalize(probe, dim=-1), "mass_mean": F.normalize(mass, dim=-1)}
    spreads = {
        name: torch.einsum("nlhd,lhd->nlh", outputs.double(), theta).std(0) for name, theta in directions.items()
    }
    return HeadProbes(accuracy, loss, directions, spreads)


def best_heads(lm: LM, probes: HeadProbes, cfg: Config) -> list[Head]:
    """The heads that are pushed, the best first."""
    layers, heads = probes.accuracy.shape
    if cfg.heads > layers * heads:
        raise BadInput(f"heads is {cfg.heads}, and {lm.name} has {layers * heads}. Push fewer.")
    every = [Head(layer, index) for layer in range(layers) for index in range(heads)]
    if cfg.control_seed is not None:
        return random.Random(cfg.control_seed).sample(every, cfg.heads)
    accuracy, loss = probes.accuracy.tolist(), probes.loss.tolist()
    return sorted(every, key=lambda h: (-accuracy[h.layer][h.index], loss[h.layer][h.index], h))[: cfg.heads]


@torch.no_grad()
def head_outputs(lm: LM, records: Sequence[ContextRecord], progress: Progress | None = None) -> Tensor:
    """What each head hands to the output projection at the last token of prompt and answer.

    Returns:
        [2 n, layers, heads, d_h] fp32 on the CPU: the n context answers, then the n answers of memory.
    Raises:
        UnknownLayout: the projection's input is no whole number of heads.
    """
    heads = int(lm.model.config.get_text_config().num_attention_heads)
    prompts = [r.prompt for r in records] * 2
    rows = encode_all(lm, prompts, [r.answer for r in records] + [r.memory for r in records])
    need_window(lm, [row.ids for row in rows])
    outputs: dict[int, Tensor] = {}
    seen: list[Tensor] = []

    def see(_: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0][:, -1].float().cpu())  # [n, heads * d_h]

    with hooked(*(Hook(lm.module(name), see, before=True) for name in lm.layout.attn_outs)):
        for batch in batches_of_rows([len(row.ids) for row in rows], BATCH):
            ids, mask = padded(lm, [rows[i].ids for i in batch], side="left")
            seen.clear()
            blocks(lm, ids, mask, position_ids=positions(mask))
            widths = [x.shape[-1] for x in seen]
            if len(set(widths)) > 1 or widths[0] % heads:
                listed = ", ".join(map(str, widths))
                raise UnknownLayout(f"attention hands on {listed} numbers, which are no {heads} heads of one size.")
            outputs.update(zip(batch, torch.stack(seen, 1), strict=True))
            if progress:
                progress(len(outputs), len(rows), "reading heads")
    whole = torch.stack([outputs[i] for i in range(len(rows))])  # [2 n, layers, heads * d_h]
    return whole.reshape(*whole.shape[:2], heads, -1)


def _layer(x: Tensor, right: Tensor, fold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer's heads: held-out accuracy and loss [heads], coefficients and mean difference [heads, d_h].

    ``x`` [n, heads, d_h] fp64; ``right`` [n] the context's answer; ``fold`` [n] the part that each text is in.
    """
    x = x.transpose(0, 1)  # [heads, n, d_h]
    hits, losses = [], []
    for part in fold.unique():
        held = fold == part
        w, b = logistic(x[:, ~held], right[~held])
        z = torch.einsum("hnd,hd->hn", x[:, held], w) + b[:, None]
        hits.append((z > 0) == right[held])
        losses.append(F.softplus(torch.where(right[held], -z, z)))
    mass = x[:, right].mean(1) - x[:, ~right].mean(1)
    return torch.cat(hits, 1).double().mean(1), torch.cat(losses, 1).mean(1), logistic(x, right)[0], mass


def logistic(x: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regressions side by side, by Newton's method with step halving.

    Minimises ‖w‖²/2 + sum log(1 + exp(-+(w x + b))), as scikit-learn does with its defaults.

    Args:
        x: [p, n, d] fp64, one problem each.
        right: [n] bool, the same for all.
    Returns:
        w [p, d] and b [p].
    """
    x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], -1)  # [p, n, d + 1]
    penalty = x.new_ones(x.shape[-1])
    penalty[-1] = 0
    sign = torch.where(right, 1.0, -1.0).to(x.dtype)  # [n]

    def loss(w: Tensor) -> Tensor:
        return F.softplus(-sign * (x @ w[..., None])[..., 0]).sum(1) + (penalty * w.square()).sum(1) / 2

    w = x.new_zeros(x.shape[0], x.shape[-1])
    for _ in range(NEWTON):
        p = torch.sigmoid((x @ w[..., None])[..., 0])  # [p, n]
        gradient = ((p - right.to(p.dtype))[:, None] @ x)[:, 0] + penalty * w
        if gradient.abs().max() < 1e-9 * x.shape[1]:
            break
        hessian = x.mT @ (x * (p * (1 - p))[..., None]) + torch.diag(penalty + 1e-10)
        step, size = torch.linalg.solve(hessian, gradient), x.new_ones(len(w), 1)
        for _ in range(20):
            worse = loss(w - size * step) > loss(w)
            if not worse.any():
                break
            size[worse] /= 2
        w = torch.where(worse[:, None], w, w - size * step)
    return w[:, :-1], w[:, -1]


def _check(lm: LM, cfg: Config) -> None:
    if cfg.heads < 1 or cfg.folds < 2 or cfg.examples < 1:
        raise BadInput(
            f"heads is {cfg.heads}, folds {cfg.folds}, examples {cfg.examples}. Folds must be 2 or more, the others 1."
        )
    if not math.isfinite(cfg.strength):
        raise BadInput(f"strength is {cfg.strength}. Give a finite number; 0 changes nothing.")


def estimate(lm: LM, count: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: every head's outputs, and one layer's Newton step."""
    layout, texts = lm.layout, 2 * min(count, cfg.examples)
    return 8 * 4 * texts * layout.n_layers * layout.d_model + 8 * 4 * texts * layout.d_model + (64 << 20)


def example(lm: LM) -> tuple[list[ContextRecord], Config]:
    """Records and settings that run in milliseconds on a tiny model."""
    return integrated_gradients.examples(), Config(heads=3, strength=8.0)
