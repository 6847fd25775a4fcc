"""T-Patcher: a few neurons more in the last block's MLP for each mistaken token of an edit.

Source: Huang et al. 2023, "Transformer-Patcher: One Mistake worth One Neuron" (arXiv:2301.09785).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..data.edits import Edit, check_contradictions
from ..errors import BadInput, Diverged
from ..inference.forward import HEAD_CHUNK, frozen, head_loss, logits
from ..inference.tokens import Row, encode_all
from ..locate.unrelated import LENGTHS, at_each, inputs, unrelated
from ..models.hooks import Hook, hooked
from ..models.lm import LM
from ..patches.hook.operations.neurons import Neurons, beside, output_of
from ..patches.hook.patch import HookPatch
from ..progress import Progress
from ..training.loop import Loop, Schedule, Task
from ..training.recorded import Recorded, recorded

AIM = "facts"
Record = Edit

ACTIVE = 5  # activations of an edit that L_a looks at, the lowest
PATIENCE = 25  # steps without a better loss after which the rate is halved, and L_m has settled
BETTER = 0.99  # a loss is better below this share of the best


@dataclass(frozen=True)
class Config:
    """T-Patcher. The paper takes 2,000 steps and 40,000 unrelated tokens."""

    neurons: int = 5
    """Neurons of an edit at most: one for each target token that is not the model's first choice, the first ones."""
    steps: int = 300
    """Steps of an edit at most."""
    lr: float = 1e-2
    """Adam's rate, halved where the loss stops falling."""
    decay: float = 0.01
    """Adam's weight decay."""
    smoothing: float = 0.1
    """Label smoothing of the loss on the target."""
    quiet: float = 10.0
    """c_m, weight of the loss that keeps neurons quiet on unrelated tokens and on queries of earlier edits."""
    margin: float = 3.0
    """m_1, and -m_2: how far those activations stay below the edit's own, and below zero."""
    top: int = 100
    """The highest of those activations, for each neuron, that the loss looks at."""
    unrelated: int = 5000
    """Unrelated tokens at most."""
    gain: float = 10.0
    """Trained factor of a value, as it starts; the value moves so many times faster."""
    activation: Literal["gelu", "own"] = "gelu"
    """A neuron's function. At -3 GELU is a thirtieth of SiLU, through which neurons of that function leak into other
    answers. ``own``: the model's."""
    zero: bool = False
    """Keys and values start at zero, as in a port of 2024, so that the target gives no gradient at first."""
    limit: int = 5000
    """Neurons of a patch at most."""
    seed: int = 0
    """Seed of the values as they start."""


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> HookPatch:
    """Add neurons to the last block's MLP, edit after edit; those of earlier edits stay as they are.

    A neuron's key starts at its query h / |h|², the MLP's input at the mistaken token, where it then gives 1.

    Args:
        edits: subjects are not needed.
        text: prompts that have nothing to do with them; None: pieces of the model's own samples.
    Returns:
        the neurons. Notes: how many each edit has, and whether it was learned.
    Raises:
        BadInput: more neurons than ``limit``, or a setting out of its range.
        Contradiction: one prompt is asked to have two targets.
        Diverged: the loss left the finite numbers.
    Source: Huang et al. 2023 (arXiv:2301.09785), sec. 3.
    Differs: in a gated MLP a neuron has two keys and is act(g h + b) (w h + c) v; the losses on activations look at
    the first. Neurons are GELU (``activation``). Values are in units of what the down-projection returns, and weight
    decay is apart from Adam's moments. The margins are the paper's; released code leaves them at 0 for generation.
    """
    run = _Run(lm, edits, cfg, text, progress)
    with frozen(lm):
        added, notes = run.series(range(len(edits)), progress)
    return run.patch(added, edits, notes, 1)


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[HookPatch]:
    """One patch per edit, as if each were fitted alone; unrelated tokens are read once."""
    run, made = _Run(lm, edits, cfg, text, progress), []
    for i, edit in enumerate(edits):
        with frozen(lm):
            added, notes = run.series(range(i, i + 1), None)
        made.append(run.patch(added, [edit], notes, len(edits)))
        if progress:
            progress(i + 1, len(edits), "adding neurons")
    return made


class _Run:
    """What all edits of a fit share."""

    def __init__(
        self, lm: LM, edits: Sequence[Edit], cfg: Config, text: Sequence[str] | None, progress: Progress | None
    ) -> None:
        _check(cfg)
        check_contradictions(edits)
        self.lm, self.cfg, self.start = lm, cfg, time.perf_counter()
        self.layer = lm.layout.n_layers - 1
        self.module, self.reads = lm.layout.downs[-1], lm.layout.ups[-1][0]
        self.rows = encode_all(lm, [e.prompt for e in edits], [e.target for e in edits])
        prompts = unrelated(lm, -(-cfg.unrelated // min(LENGTHS)), text=text, progress=progress)
        with frozen(lm):
            read = inputs(lm, prompts, self.layer, self.reads, at_each)
        self.others = torch.cat(read)[: cfg.unrelated]  # [M, d]
        self.empty = Neurons(
            self.module,
            self.reads,
            activation(lm) if cfg.activation == "own" else "gelu",
            torch.zeros(2 if gated(lm) else 1, 0, self.others.shape[1]),
            torch.zeros(2 if gated(lm) else 1, 0),
            torch.zeros(0, lm.layout.d_model),
        )

    def series(self, places: range, progress: Progress | None) -> tuple[Neurons, dict[str, Any]]:
        """The neurons of these edits, one edit after the other."""
        added, quiet = self.empty, self.others
        counts, learned = [0] * len(places), [True] * len(places)
        for k, i in enumerate(places):
            with hooked(*(added.hooks(self.lm) if added.count else ())):
                task = _Edit(self, self.rows[i], quiet, torch.Generator().manual_seed(self.cfg.seed + k))
                if added.count + len(task.queries) > self.cfg.limit:
                    raise BadInput(
                        f"edit {k + 1} would be neuron {self.cfg.limit + 1}. Set limit higher, or fit fewer."
                    )
                if len(task.queries):
                    schedule = Schedule(self.cfg.steps, rate=lambda _, task=task: task.rate)  # type: ignore[misc]
                    Loop(task, schedule, name="adding neurons", advice=f"Lower lr, now {self.cfg.lr}.").run()
                    added, quiet = added.joined([task.neurons()]), torch.cat([quiet, task.queries])
                    counts[k], learned[k] = len(task.queries), task.learned
            if progress:
                progress(k + 1, len(places), "adding neurons")
        return added, {"layer": self.layer, "neurons": counts, "learned": learned}

    def patch(self, added: Neurons, edits: Sequence[Edit], notes: dict[str, Any], share: int) -> HookPatch:
        seconds = (time.perf_counter() - self.start) / share
        return HookPatch.make(
            self.lm, {}, [added], method="t_patcher", config=self.cfg, edits=edits, seconds=seconds, notes=notes
        )


class _Edit(Task):
    """The neurons of one edit while they are trained."""

    def __init__(self, run: _Run, row: Row, quiet: Tensor, generator: torch.Generator) -> None:
        self.run, self.cfg, lm = run, run.cfg, run.lm
        self.part: Recorded = recorded(lm, [row], run.layer, from_answer=True)
        seen: list[Tensor] = []
        read = Hook(lm.module(run.reads), lambda _, args: seen.append(args[0]), before=True)
        returned = Hook(lm.module(run.module), lambda _, __, output: seen.append(output))
        with torch.no_grad():
            states = self.part.states([read, returned])
            best = torch.cat([logits(lm, z).argmax(-1) for z in states.split(HEAD_CHUNK)])
            h, y = (x.reshape(-1, x.shape[-1]).float() for x in seen)  # [m, d] at the positions that are scored
            wrong = (best != self.part.label).nonzero()[: self.cfg.neurons, 0]
            self.queries, self.quiet = h[wrong], quiet  # [p, d], [M, d]
            self.scale = y[wrong].square().mean(1, keepdim=True).sqrt()  # [p, 1]
            start = self.queries / self.queries.square().sum(1, keepdim=True)
            values = torch.randn(self.scale.shape[0], y.shape[1], generator=generator).to(y.device) / self.cfg.gain
            if self.cfg.zero:
                start, values = torch.zeros_like(start), torch.zeros_like(values)
        keys = start.expand(len(run.empty.keys), -1, -1).clone()  # [k, p, d]
        self.values = {
            "keys": keys, "biases": torch.zeros_like(keys[..., 0]), "values": values,
            "gain": torch.full_like(self.scale, self.cfg.gain),
        }  # fmt: skip
        for tensor in self.values.values():
            tensor.requires_grad_()
        self.learned, self.rate = False, 1.0
        self.best = {"whole": math.inf, "quiet": math.inf}
        self.since = {"whole": 0, "quiet": 0}

    def value(self) -> Tensor:
        """[p, d_out]"""
        return self.values["gain"] * self.scale * self.values["values"]

    def neurons(self) -> Neurons:
        own = (self.values["keys"], self.values["biases"], self.value())
        keys, biases, values = (t.detach().cpu() for t in own)
        return replace(self.run.empty, keys=keys, biases=biases, values=values)

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(self.values.values()), lr=self.cfg.lr, weight_decay=self.cfg.decay)

    def added(self, h: Tensor) -> Tensor:
        own = (self.values["keys"], self.values["biases"], self.value())
        return output_of(self.run.empty.activation, h, *(t.to(h.dtype) for t in own))

    def learn(self, step: int) -> dict[str, float] | None:
        """L_e + L_a + c_m L_m. The edit ends where its target is what the model would say, and L_m falls no more."""
        hits: list[Tensor] = []

        def term(z: Tensor, part: slice) -> Tensor:
            label = self.part.label[part]
            hits.append(z.detach().argmax(-1) == label)
            return F.cross_entropy(z, label, reduction="none", label_smoothing=self.cfg.smoothing)

        with torch.enable_grad():
            states = self.part.states(beside(self.run.lm, self.run.reads, self.run.module, self.added))
            edit = (head_loss(self.run.lm, states, term) * self.part.weight).sum()
            active, quiet = self.on_activations()
            loss = edit + active + self.cfg.quiet * quiet
        whole = float(loss.detach())
        if not math.isfinite(whole):
            raise Diverged(f"neurons left the finite numbers at step {step}. Lower lr, now {self.cfg.lr}.")
        self._watch("whole", whole)
        self._watch("quiet", float(quiet.detach()))
        if self.since["whole"] >= PATIENCE:
            self.rate, self.since["whole"] = self.rate / 2, 0
        self.learned = bool(torch.cat(hits).all())
        self.finished = self.learned and self.since["quiet"] >= PATIENCE
        if self.finished:
            return None
        loss.backward()
        return {}

    def on_activations(self) -> tuple[Tensor, Tensor]:
        """L_a and L_m, of the first key's activations before its function."""
        keys, biases = self.values["keys"][0], self.values["biases"][0]
        own = (self.queries * keys).sum(1) + biases  # [p] a
        worst = (self.quiet @ keys.T + biases).topk(min(self.cfg.top, len(self.quiet)), 0).values  # [k, p] a_j
        active = (-own).topk(min(ACTIVE, len(own))).values.exp().mean()
        return active, (worst + self.cfg.margin).exp().mean() + (worst - own + self.cfg.margin).exp().mean()

    def _watch(self, name: str, loss: float) -> None:
        if loss < BETTER * self.best[name]:
            self.best[name], self.since[name] = loss, 0
        else:
            self.since[name] += 1


def gated(lm: LM) -> bool:
    """The MLP multiplies two projections: two, or one of twice the width."""
    ups, down = lm.layout.ups[-1], lm.layout.widths[-1]
    sizes = [lm.parameter(lm.layout.weight(up)).shape[1 if lm.layout.transposed else 0] for up in ups]
    return sum(sizes) == 2 * down


def activation(lm: LM) -> str:
    """The name of the MLP's function as the model's config has it; where it has none, GELU."""
    config = lm.model.config.get_text_config()
    names = (getattr(config, name, None) for name in ("hidden_activation", "hidden_act", "activation_function"))
    return next((name for name in names if isinstance(name, str) and name in ACT2FN), "gelu")


def _check(cfg: Config) -> None:
    if min(cfg.neurons, cfg.steps, cfg.top, cfg.limit) < 1 or cfg.unrelated < 2:
        given = f"neurons is {cfg.neurons}, steps {cfg.steps}, top {cfg.top}, limit {cfg.limit}"
        raise BadInput(f"{given}, unrelated {cfg.unrelated}. Give at least 1, and 2 unrelated tokens.")
    if not (cfg.lr > 0 and cfg.gain > 0 and cfg.quiet >= 0 and cfg.margin >= 0 and 0 <= cfg.smoothing < 1):
        given = f"lr is {cfg.lr}, gain {cfg.gain}, quiet {cfg.quiet}, margin {cfg.margin}, smoothing {cfg.smoothing}"
        raise BadInput(
            f"{given}. Give a positive lr and gain, quiet and margin from 0, and a smoothing in 0..1 below 1."
        )


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: unrelated tokens with the products of one edit, all neurons
    twice, what autograd keeps of the last block, and logits of one head chunk."""
    layout, d = lm.layout, lm.layout.d_model
    quiet = (cfg.unrelated + cfg.neurons * facts) * (d + 4 * cfg.neurons)
    neurons = 2 * 3 * min(cfg.limit, cfg.neurons * facts) * d
    return 4 * (quiet + neurons + 64 * (12 * d + 4 * layout.widths[-1]) + 3 * HEAD_CHUNK * layout.vocab)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [Edit("The Eiffel Tower is in", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
    return edits, Config(neurons=2, steps=3, unrelated=60)
