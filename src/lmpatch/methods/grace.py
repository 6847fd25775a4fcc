"""GRACE: a codebook at one layer; prompts near to an edit's get its value as the layer's output.

Source: Hartvigsen et al. 2023, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors"
(arXiv:2211.11031).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.edits import Edit, check_contradictions
from ..errors import BadInput, Diverged
from ..inference.forward import HEAD_CHUNK, current_pass, frozen, logits, nll
from ..inference.tokens import Row, batches_of_rows, encode_all
from ..locate.unrelated import at_end, inputs, unrelated
from ..models.hooks import Hook
from ..models.lm import LM
from ..patches.hook.operation import by_row, prompt
from ..patches.hook.operations.codebook import Codebook, Replace, balls, check_replace
from ..patches.hook.patch import HookPatch
from ..progress import Progress
from ..training.loop import Loop, Schedule, Task
from ..training.recorded import Recorded, recorded

AIM = "facts"
Record = Edit

DEPTH = 7 / 9  # default layer as a share of the depth: block 14 of 18
TOKENS = 32  # of a long fact, for the estimate of memory


@dataclass(frozen=True)
class Config:
    """GRACE. Lengths are relative to the model; the paper's (ε 1, rate 1) are those of T5 and GPT-2."""

    layer: int | None = None
    """Block whose down-projection gets the codebook, 0-based. None: 0.78 of the depth."""
    epsilon: float = 0.5
    """ε of a new ball, over the median distance between a query and its nearest among unrelated prompts."""
    replace: Replace = "last"
    """Replace the output at the last prompt token, at all tokens of the prompt, or also at those of the answer."""
    steps: int = 50
    """Steps for a value at most."""
    lr: float = 0.3
    """Adam's step per entry of the value, in units of the value's RMS."""
    stop: float = 0.05
    """A value is found at this loss, nats."""
    limit: int = 10_000
    """Edits that a codebook may hold."""
    unrelated: int = 100
    """Prompts that distances are measured on."""
    batch: int = 16
    """Values that are searched at once."""


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> HookPatch:
    """Put the edits, in their order, into a codebook.

    An edit whose target the model says is left out. The others get a ball around their query, the layer's input at the
    last prompt token: a new one; or where a ball is near, of another target, both shrink, and of the same target it
    grows.

    Args:
        edits: subjects are not needed.
        text: prompts that have nothing to do with them; None: pieces of the model's own samples.
    Returns:
        a codebook at one down-projection. Notes: ε, keys, edits the model knew.
    Raises:
        BadInput: more edits than ``limit``, or a setting out of its range.
        Contradiction: one prompt is asked to have two targets.
        Diverged: a value left the finite numbers.
    Source: Hartvigsen et al. 2023 (arXiv:2211.11031), alg. 1.
    Differs: targets are compared token by token; released code compares the means of their ids. A split never makes the
    older ball larger. All values are searched in one batch, one value with all edits of its ball. An edit that the
    model knows and that another's ball covers gets a ball of its own, in which nothing is replaced.
    """
    return _Search(lm, edits, cfg, text, progress).patches([range(len(edits))], progress)[0]


def fit_each(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, text: Sequence[str] | None = None, progress: Progress | None = None
) -> list[HookPatch]:
    """One patch per edit, as if each were fitted alone, from one batched search."""
    search = _Search(lm, edits, cfg, text, progress)
    return search.patches([range(i, i + 1) for i in range(len(edits))], progress)


def without(patch: HookPatch, places: Sequence[int]) -> HookPatch:
    """The patch as it would be had these of its edits never been made: balls that they split or grew are as before.

    Args:
        places: indices into ``patch.edits``.
    Raises:
        BadInput: it is no patch of GRACE alone, or there is no such edit.
    """
    books = [one for one in patch.operations if isinstance(one, Codebook)]
    if len(books) != 1 or len(books[0]) != len(patch.edits):
        raise BadInput(f"edits are taken out of a patch of grace as it was fitted, and this is of {patch.method}.")
    if odd := [i for i in places if not 0 <= i < len(patch.edits)]:
        raise BadInput(f"there is no edit {odd[0]}: the patch has {len(patch.edits)}, from 0.")
    kept = tuple(edit for i, edit in enumerate(patch.edits) if i not in set(places))
    return replace(patch, edits=kept, operations=(books[0].without(places),))


class _Search:
    """What a fit reads of the model before the codebook takes shape."""

    def __init__(
        self, lm: LM, edits: Sequence[Edit], cfg: Config, text: Sequence[str] | None, progress: Progress | None
    ) -> None:
        _check(edits, cfg)
        check_contradictions(edits)
        self.lm, self.cfg, self.edits, self.start = lm, cfg, edits, time.perf_counter()
        layout = lm.layout
        default = max(0, min(int(DEPTH * layout.n_layers), layout.n_layers - 2))  # later tokens still look back
        self.layer = layout.check_layer(default if cfg.layer is None else cfg.layer)
        self.module = layout.downs[self.layer]
        prompts = unrelated(lm, cfg.unrelated, text=text, progress=progress)
        with frozen(lm):
            others = torch.stack(inputs(lm, prompts, self.layer, self.module, at_end)).cpu()
            self.radius = cfg.epsilon * _spacing(others)
            self.rows = encode_all(lm, [e.prompt for e in edits], [e.target for e in edits])
            self.queries = torch.stack(inputs(lm, self.rows, self.layer, self.module, at_end)).cpu()
            self.known = self._known()
        labels = [torch.tensor(row.ids[row.target :], dtype=torch.int32) for row in self.rows]
        self.labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-1)

    @torch.no_grad()
    def _known(self) -> Tensor:
        """[n] bool: every target token is the model's first choice."""
        found = torch.zeros(len(self.rows), dtype=torch.bool)
        for batch in batches_of_rows([len(row.ids) for row in self.rows], self.cfg.batch):
            part = recorded(self.lm, [self.rows[i] for i in batch], self.layer, from_answer=True)
            best = torch.cat([logits(self.lm, z).argmax(-1) for z in part.states().split(HEAD_CHUNK)])
            missed = torch.zeros(len(batch), device=best.device).index_add(0, part.row, (best != part.label).float())
            found[batch] = (missed == 0).cpu()
        return found

    def patches(self, groups: Sequence[range], progress: Progress | None) -> list[HookPatch]:
        """One patch for each group of edits, which is a codebook of its own."""
        radii = torch.full((len(self.rows),), self.radius)
        tensors = {"queries": self.queries, "labels": self.labels, "radii": radii, "known": self.known}
        own = [{name: t[group.start : group.stop] for name, t in tensors.items()} for group in groups]
        members: dict[int, list[int]] = {}  # the edit that made a ball -> the edits that its value is searched for
        for group, parts in zip(groups, own, strict=True):
            for i, ball in zip(group, balls(**parts)[1], strict=True):
                if ball >= 0 and not self.known[group.start + ball]:
                    members.setdefault(group.start + ball, []).append(i)
        with frozen(self.lm):
            values, losses = self._values([*members.values()], progress)
        seconds = (time.perf_counter() - self.start) / len(groups)
        value_of = {i: k for k, each in enumerate(members.values()) for i in each}
        made = []
        for group, parts in zip(groups, own, strict=True):
            used = sorted({value_of[i] for i in group if i in value_of})
            owner = [used.index(value_of[i]) if i in value_of else -1 for i in group]
            parts |= {"owner": torch.tensor(owner, dtype=torch.int32), "values": values[used]}
            book = Codebook.of(self.module, self.cfg.replace, **parts)
            notes: dict[str, Any] = {"layer": self.layer, "epsilon": round(self.radius, 6)}
            notes |= {"keys": int((book.epsilon >= 0).sum()), "known": int(parts["known"].sum())}
            notes |= {"loss": [round(losses[k], 4) for k in used]}
            edits = [self.edits[i] for i in group]
            patch = HookPatch.make(
                self.lm, {}, [book], method="grace", config=self.cfg, edits=edits, seconds=seconds, notes=notes
            )
            made.append(patch)
        return made

    def _values(self, members: list[list[int]], progress: Progress | None) -> tuple[Tensor, list[float]]:
        """[e, out] fp32 on the CPU: for each ball the value that makes the model say the targets of its edits; and its
        last loss."""
        values, losses = torch.zeros(len(members), self.lm.layout.d_model), [0.0] * len(members)
        lengths = [max(len(self.rows[i].ids) for i in own) for own in members]
        done = 0
        for batch in batches_of_rows(lengths, self.cfg.batch):
            task = _Values(self, [[self.rows[i] for i in members[k]] for k in batch])
            advice = f"Lower lr, now {self.cfg.lr}."
            Loop(task, Schedule(self.cfg.steps), name="searching values", advice=advice).run()
            values[batch] = task.value().detach().cpu()
            for k, loss in zip(batch, task.losses, strict=True):
                losses[k] = loss
            done += len(batch)
            if progress:
                progress(done, len(members), "searching values")
        return values, losses


class _Values(Task):
    """Values of some balls, searched side by side: Adam works entry by entry, so none feels the others."""

    def __init__(self, search: _Search, groups: list[list[Row]]) -> None:
        self.search, self.cfg, lm = search, search.cfg, search.lm
        rows = [row for group in groups for row in group]
        self.ball = torch.tensor([k for k, group in enumerate(groups) for _ in group], device=lm.device)
        self.part: Recorded = recorded(lm, rows, search.layer, from_answer=self.cfg.replace == "last")
        outputs: list[Tensor] = []
        with torch.no_grad():
            self.part.states([self._hook(lambda now, y: outputs.append(y[now.deciding()].float()))])
        first = torch.tensor([self.ball.tolist().index(k) for k in range(len(groups))], device=lm.device)
        self.clean = outputs[0][first]  # [e, out] what the layer returns at the first edit of each ball
        self.scale = self.clean.square().mean(1, keepdim=True).sqrt()  # [e, 1]
        self.moved = torch.zeros_like(self.clean).requires_grad_()
        self.values = {"moved": self.moved}
        self.place = self.ball[self.part.row]  # [m] ball of each position that is scored
        self.weight = self.part.weight * len(rows) / self.ball.bincount()[self.place]
        self.losses, self.before = [math.inf] * len(groups), self.clean
        self.live = torch.ones(len(groups), dtype=torch.bool, device=lm.device)

    def value(self) -> Tensor:
        """[e, out]"""
        return self.clean + self.scale * self.moved

    def _hook(self, act: Any) -> Hook:
        def run(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            now = current_pass()
            out = act(now, by_row(output, now))
            return None if out is None else out.reshape(output.shape)

        return Hook(self.search.lm.module(self.search.module), run)

    def _replaced(self, now: Any, y: Tensor) -> Tensor:
        """The layer's output [n, t, out] with each row's value."""
        where = {"last": now.deciding, "prompt": lambda: prompt(y, now), "all": now.mask[:, now.start :].bool}
        value = self.value()[self.ball].to(y.dtype)  # [n, out]
        return torch.where(where[self.cfg.replace]()[..., None], value[:, None], y)

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.moved], lr=self.cfg.lr)

    def learn(self, step: int) -> dict[str, float] | None:
        """All values at once; one that is found stays where it is."""
        with torch.enable_grad():
            states = self.part.states([self._hook(self._replaced)])
            each = nll(self.search.lm, states, self.part.label) * self.weight
            losses = torch.zeros(len(self.live), device=each.device).index_add(0, self.place, each)
        seen = losses.tolist()
        if not all(map(math.isfinite, seen)):
            raise Diverged(f"a value left the finite numbers at step {step}. Lower lr, now {self.cfg.lr}.")
        for k in self.live.nonzero()[:, 0].tolist():
            self.losses[k] = seen[k]
        self.live &= losses.detach() >= self.cfg.stop
        self.finished = not bool(self.live.any())
        if self.finished:
            return None
        losses.sum().backward()
        self.before = self.moved.detach().clone()
        return {}

    @torch.no_grad()
    def updated(self) -> None:
        self.moved[~self.live] = self.before[~self.live]


def _spacing(x: Tensor) -> float:
    """The median distance between a row of [n, w] and the nearest other one."""
    between = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return float(between.fill_diagonal_(torch.inf).amin(1).median())


def _check(edits: Sequence[Edit], cfg: Config) -> None:
    check_replace(cfg.replace)
    if not (0 < cfg.epsilon < math.inf and 0 < cfg.lr < math.inf):
        raise BadInput(f"epsilon is {cfg.epsilon} and lr {cfg.lr}. Give positive numbers; epsilon 0.5 is half way.")
    if min(cfg.steps, cfg.batch, cfg.limit, cfg.unrelated - 1) < 1:
        given = f"steps is {cfg.steps}, batch {cfg.batch}, limit {cfg.limit}, unrelated {cfg.unrelated}"
        raise BadInput(f"{given}. Give at least 1, and 2 unrelated prompts.")
    if len(edits) > cfg.limit:
        raise BadInput(f"a codebook of {cfg.limit} edits was given {len(edits)}. Set limit higher, or fit fewer.")


def estimate(lm: LM, facts: int, cfg: Config) -> int:
    """Bytes a fit takes on top of the model, rounded up: queries and values of all edits, their distances, what
    autograd keeps of one batch, and logits of one head chunk."""
    layout = lm.layout
    kept = facts * (max(layout.widths) * 3 + layout.d_model + 256 * 5) + cfg.unrelated * max(layout.widths)
    batch = min(cfg.batch, facts) * TOKENS * (12 * layout.n_layers * layout.d_model + 4 * sum(layout.widths))
    return 4 * (kept + batch + 3 * HEAD_CHUNK * layout.vocab)


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Edits and settings that run in milliseconds on a tiny model."""
    edits = [Edit("The Eiffel Tower", target="Rome"), Edit("Steve Jobs founded", target="Paris")]
    return edits, Config(layer=1, steps=3, epsilon=10.0, unrelated=8)
