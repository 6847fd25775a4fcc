"""Training RECIPE's editor: one file to go on from, curves, and a validation that never sees a trained fact."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..data.edit import Ask, Edit
from ..errors import BadInput, Diverged
from ..models.lm import LM
from ..models.run import Progress, frozen, logits
from ..models.tokens import Row, encode_all, join
from ..patches.keys import KeyBlock
from ..patches.retriever import Retriever
from ..record import hash_json
from . import _recipe_loss as losses
from ._recipe_data import Sample, batches, sample

if TYPE_CHECKING:
    from .recipe import Training

CHECKPOINT, CURVES = "checkpoint.safetensors", "curves.jsonl"


@dataclass
class Batch:
    """Rows of one step."""

    samples: list[Sample]
    told: list[losses.Told]
    again: list[losses.Told]
    other: list[losses.Told]


class Trainer:
    """One training run. Everything random depends on the seed and the step, so a resumed run is the same run."""

    def __init__(
        self, lm: LM, net: Retriever, edits: Sequence[Edit], unrelated: Sequence[Ask], cfg: Training, out: Path | None
    ) -> None:
        self.lm, self.net, self.cfg, self.out = lm, net, cfg, out
        order = list(range(len(edits)))
        random.Random(f"{cfg.seed}/held out").shuffle(order)
        held = min(cfg.validate, len(edits) // 4)
        self.held, self.edits = [edits[i] for i in order[:held]], [edits[i] for i in order[held:]]
        self.unrelated = unrelated
        if len(self.edits) < cfg.batch:
            raise BadInput(f"a batch has {cfg.batch} facts, {len(self.edits)} are left to train on. Lower batch.")
        slow = [p for n, p in net.named_parameters() if n.startswith("learned") and p.requires_grad]
        fast = [p for n, p in net.named_parameters() if not n.startswith("learned") and p.requires_grad]
        groups = [{"params": slow, "rate": cfg.encoder_lr}, {"params": fast, "rate": cfg.lr}]
        self.adam = torch.optim.Adam([g for g in groups if g["params"]], lr=cfg.lr)
        self.queue = torch.zeros(0, net.shape.width)
        self.base: dict[tuple[str, str], Tensor] = {}
        self.step = 0
        self.started = perf_counter()
        self.seconds = 0.0
        self.print = hash_json([asdict(cfg), asdict(net.shape), net.encoder.fingerprint, lm.fingerprint(), len(edits)])
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._resume(out / CHECKPOINT)

    def run(self, progress: Progress | None = None) -> None:
        """Train to the last step. An interrupt leaves a checkpoint of the last whole step."""
        recent: dict[str, float] = {}
        try:
            for step, places in batches(self.edits, self.cfg.batch, self.cfg.seed, self.step):
                if step >= self.cfg.steps:
                    break
                seen = self._update(step, places)
                self.step = step + 1
                recent = {k: 0.9 * recent.get(k, v) + 0.1 * v for k, v in seen.items()}
                if self.step % self.cfg.validate_every == 0 or self.step == self.cfg.steps:
                    self._note({"step": self.step, **_rounded(recent), **_rounded(self.validate())})
                if self.step % self.cfg.save_every == 0:
                    self.save()
                if progress:
                    progress(self.step, self.cfg.steps, "training")
        finally:
            self.save()

    def _rate(self, step: int) -> float:
        """Warm-up, then down in a line to ``final`` of the rate."""
        cfg = self.cfg
        warm = min(1.0, (step + 1) / max(1, cfg.warmup))
        return warm * (1 - (1 - cfg.final) * step / max(1, cfg.steps))

    def _update(self, step: int, places: Sequence[int]) -> dict[str, float]:
        """One step of Adam on the sum of the six losses."""
        cfg, net = self.cfg, self.net
        draw = random.Random(f"{cfg.seed}/{step}")
        batch = self._batch([sample(self.edits[i], self.unrelated, draw) for i in places], draw)
        texts = batch.samples
        with torch.enable_grad():
            weights = net.encoder_weights()
            keys = net.keys([join(s.prompt, s.target) for s in texts], weights)
            asked = [s.prompt for s in texts] + [s.again for s in texts] + [s.other for s in texts]
            rel, gen, loc = net.queries(asked, weights).chunk(3)
            swap = torch.tensor([draw.random() < 0.5 for _ in texts], device=keys.device)[:, None]
            first, second = torch.where(swap, gen, rel), torch.where(swap, rel, gen)
            found = losses.retrieval(
                keys, net.sentinel(weights), first, second, loc, margin=cfg.margin, others=self.queue.to(keys.device)
            )
            prompts = net.prompts(keys)  # [b, P, d]
            seen, gradient = self._language(batch, prompts.detach())
            # d(LM losses)/d(prompts) is known by now: this product has just that gradient
            (found.total + (prompts * gradient).sum()).backward()
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * self._rate(step)
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.adam.param_groups for p in g["params"]], cfg.clip)
        if not norm.isfinite():
            raise Diverged(f"training left the finite numbers at step {step}. Lower lr, now {cfg.lr}.")
        self.adam.step()
        self.adam.zero_grad()
        if cfg.queue:
            self.queue = torch.cat([self.queue, keys.detach().cpu()])[-cfg.queue :]
        terms = {"own": found.own, "neighbour": found.neighbour, "unrelated": found.unrelated}
        return {**{name: float(value.detach()) for name, value in terms.items()}, **seen}

    def _batch(self, samples: list[Sample], draw: random.Random) -> Batch:
        prompts = [text for s in samples for text in (s.prompt, s.again, s.other)]
        answers = [text for s in samples for text in (s.target, s.answer, s.other_answer)]
        longest = self.cfg.answer_tokens
        rows = [
            replace(row, ids=row.ids[: row.target + longest] if longest else row.ids)
            for row in encode_all(self.lm, prompts, answers)
        ]

        def pick(kind: int) -> list[losses.Told]:
            chosen = [i for i in range(len(samples)) if draw.random() < self.cfg.lm_share] or [0]
            return [losses.Told(rows[3 * i + kind], i) for i in chosen]

        return Batch(samples, pick(0), pick(1), pick(2))

    def _language(self, batch: Batch, prompts: Tensor) -> tuple[dict[str, float], Tensor]:
        """The language model's three losses, and the gradient [b, P, d] of their sum."""
        width, flat = prompts.shape[1], prompts.flatten(0, 1).to(self.lm.device)
        total = torch.zeros_like(flat)
        seen = {}
        for name, part in (("told", batch.told), ("again", batch.again), ("other", batch.other)):
            leaf = flat.clone().requires_grad_()
            rows = losses.behind(self.lm, part, width, self.cfg.at)
            if name == "other":
                loss, count = losses.kept(self.lm, rows, leaf, self._base(batch.samples, part))
            else:
                loss, count = losses.told(self.lm, rows, leaf, self.cfg.margin)
            seen[name] = float(loss) / max(1, count)
            if leaf.grad is not None and count:
                total += leaf.grad / count
        return seen, total.to(prompts.device).reshape(prompts.shape)

    def _base(self, samples: Sequence[Sample], part: Sequence[losses.Told]) -> list[Tensor]:
        """States of the unpatched model at the answers of unrelated questions; each is computed once in a run."""
        names = [(samples[t.fact].other, samples[t.fact].other_answer) for t in part]
        missing: dict[tuple[str, str], Row] = {n: t.row for n, t in zip(names, part, strict=True) if n not in self.base}
        if missing:
            made = losses.base_states(self.lm, list(missing.values()))
            self.base.update(zip(missing, made, strict=True))
        return [self.base[name] for name in names]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Retrieval among all held-out facts, and teacher-forced answers behind the right fact's vectors."""
        draw = random.Random(f"{self.cfg.seed}/validation")
        samples = [sample(edit, self.unrelated, draw) for edit in self.held]
        if not samples:
            return {}
        net, weights = self.net, self.net.encoder_weights()
        keys = net.keys([join(s.prompt, s.target) for s in samples], weights)
        block = KeyBlock(keys.shape[1])
        stored = torch.cat([keys.cpu(), self.queue])  # old keys of trained facts are further candidates
        block.add(stored, range(len(stored)))
        found = {}
        right = torch.arange(len(samples))
        for name, texts in (
            ("told", [s.prompt for s in samples]),
            ("again", [s.again for s in samples]),
            ("other", [s.other for s in samples]),
        ):
            queries = net.queries(texts, weights).cpu()
            score, place = (t[:, 0] for t in block.search(queries))
            fired = score > (queries @ net.sentinel(weights).cpu()).double()
            if name == "other":
                found["false_fire"] = float(fired.float().mean())
            else:
                found[f"recall_{name}"] = float((fired & (place == right)).float().mean())
        some = samples[: self.cfg.validate_lm]
        vectors = net.prompts(keys[: len(some)]).flatten(0, 1).to(self.lm.device)
        for name, pairs in (
            ("told", [(s.prompt, s.target) for s in some]),
            ("again", [(s.again, s.answer) for s in some]),
        ):
            rows = encode_all(self.lm, *map(list, zip(*pairs, strict=True)))
            told = [losses.Told(row, i) for i, row in enumerate(rows)]
            rows = losses.behind(self.lm, told, net.shape.prompt_tokens, self.cfg.at)
            hits = torch.zeros(len(some), 2)
            for states, labels, owners in losses.answers(self.lm, rows, vectors):
                best = torch.cat([logits(self.lm, part).argmax(-1) for part in states.split(64)])
                right_ = torch.stack([(best == labels).float().cpu(), torch.ones(len(owners))], 1)
                hits.index_add_(0, torch.tensor(owners), right_)
            found[f"tf_{name}"] = float((hits[:, 0] / hits[:, 1]).mean())
        return found

    def _note(self, line: dict[str, Any]) -> None:
        if self.out is not None:
            with (self.out / CURVES).open("a") as file:
                file.write(json.dumps(line | {"seconds": round(self.spent())}) + "\n")

    def spent(self) -> float:
        """Seconds in all sittings."""
        return self.seconds + perf_counter() - self.started

    def save(self) -> None:
        """Write the checkpoint: weights, Adam's moments, the queue, the step. At once or not at all."""
        if self.out is None:
            return
        tensors = {f"net/{name}": p.detach() for name, p in self.net.state_dict().items()}
        tensors |= {f"adam/{i}/{key}": t for i, key, t in self._moments()} | {"queue": self.queue}
        head = {"step": str(self.step), "seconds": str(self.spent()), "print": self.print}
        work = self.out / f".{CHECKPOINT}.new"
        safetensors.torch.save_file(
            {k: t.contiguous() for k, t in {**tensors, "queue": self.queue}.items()}, work, head
        )
        os.replace(work, self.out / CHECKPOINT)

    def _moments(self) -> list[tuple[int, str, Tensor]]:
        params = [p for group in self.adam.param_groups for p in group["params"]]
        return [(i, key, t) for i, p in enumerate(params) for key, t in self.adam.state.get(p, {}).items()]

    def _resume(self, path: Path) -> None:
        if not path.exists():
            return
        with safetensors.safe_open(path, "pt") as file:
            head = file.metadata()
            if head["print"] != self.print:
                raise BadInput(f"{path} is of another run: other settings, data or model. Give another folder.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        self.step, self.seconds, self.queue = int(head["step"]), float(head["seconds"]), tensors["queue"]
        self.net.load_state_dict({n.removeprefix("net/"): t for n, t in tensors.items() if n.startswith("net/")})
        params = [p for group in self.adam.param_groups for p in group["params"]]
        for name, t in tensors.items():
            if name.startswith("adam/"):
                _, i, key = name.split("/", 2)
                self.adam.state[params[int(i)]][key] = t


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def train(
    lm: LM,
    net: Retriever,
    edits: Sequence[Edit],
    unrelated: Sequence[Ask],
    cfg: Training,
    out: Path | None,
    progress: Progress | None,
) -> Trainer:
    """Train ``net`` in place; see ``recipe.train``."""
    trainer = Trainer(lm, net, edits, unrelated, cfg, out)
    with frozen(lm):
        trainer.run(progress)
    return trainer
