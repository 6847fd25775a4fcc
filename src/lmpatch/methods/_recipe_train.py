"""Training RECIPE's editor: one file to go on from, curves, and a validation that never sees a trained fact."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
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
from ._recipe_data import Sample, batches, exchanged, sample

if TYPE_CHECKING:
    from .recipe import Training

MAP = ("mix", "out")  # the submodules that turn keys into prompt vectors
SETTLED, SETTLING = 200, 0.01  # facts and steps, and the rate, with which the sentinel starts
CROWD = 1000  # trained facts among which the held-out ones are searched
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
        most = max(cfg.key_batch, cfg.prompt_batch)
        if len(self.edits) < most:
            raise BadInput(f"a batch has {most} facts, {len(self.edits)} are left to train on. Lower key_batch.")
        self.step, self.total = 0, cfg.key_steps + cfg.prompt_steps
        rates = {"learned": cfg.encoder_lr, **dict.fromkeys(MAP, cfg.lr)}
        self.named = [(n.partition(".")[0], p) for n, p in net.named_parameters() if p.requires_grad]
        self.rated = [(rates.get(name, cfg.head_lr), p) for name, p in self.named]
        self.adam = self._adam()
        self.queue = torch.zeros(0, net.shape.width)
        self.base: dict[tuple[str, str], Tensor] = {}
        self.started = perf_counter()
        self.seconds = 0.0
        self.print = hash_json([asdict(cfg), asdict(net.shape), net.encoder.fingerprint, lm.fingerprint(), len(edits)])
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._resume(out / CHECKPOINT)

    def _adam(self) -> torch.optim.Adam:
        """An optimiser of what the next step trains: all in the first part, the map in the second."""
        second = self.step >= self.cfg.key_steps
        chosen = [pair for (name, _), pair in zip(self.named, self.rated, strict=True) if not second or name in MAP]
        return torch.optim.Adam([{"params": [p], "rate": rate} for rate, p in chosen], lr=self.cfg.lr)

    def run(self, progress: Progress | None = None) -> None:
        """Train to the last step. An interrupt leaves a checkpoint of the last whole step."""
        recent: dict[str, float] = {}
        try:
            if self.step == 0:
                self._settle()
            for step, places in self._places():
                if step >= self.total:
                    break
                if step == self.cfg.key_steps:
                    self.adam = self._adam()
                seen = self._update(step, places)
                self.step = step + 1
                recent = {k: 0.9 * recent.get(k, v) + 0.1 * v for k, v in seen.items()}
                if self.step % self.cfg.validate_every == 0 or self.step == self.total:
                    self._note({"step": self.step, **_rounded(recent), **_rounded(self.validate())})
                if self.step % self.cfg.save_every == 0:
                    self.save()
                if progress:
                    progress(self.step, self.total, "training")
        finally:
            self.save()

    def _places(self) -> Iterator[tuple[int, list[int]]]:
        """(step, places of its facts) from the next step on."""
        cfg, left = self.cfg, max(0, self.cfg.key_steps - self.step)
        yield from islice(batches(self.edits, cfg.key_batch, cfg.seed, self.step), left)
        for step, places in batches(self.edits, cfg.prompt_batch, cfg.seed, max(0, self.step - cfg.key_steps)):
            yield step + cfg.key_steps, places

    def _rate(self, step: int) -> float:
        """Warm-up, then down in a line to ``final`` of the rate, in each part."""
        cfg = self.cfg
        start, end = (0, cfg.key_steps) if step < cfg.key_steps else (cfg.key_steps, self.total)
        warm = min(1.0, (step - start + 1) / max(1, cfg.warmup))
        return warm * (1 - (1 - cfg.final) * (step - start) / (end - start))

    def _settle(self) -> None:
        """Before the first step the sentinel alone learns, among keys and queries that stand still.

        It starts anywhere: far above all keys or below them, where its losses would first move everything else.
        """
        net, draw = self.net, random.Random(f"{self.cfg.seed}/settle")
        texts = [sample(edit, self.unrelated, draw) for edit in self.edits[:SETTLED]]
        with torch.no_grad():
            keys, *queries = self._encoded(texts, net.encoder_weights())
        adam = torch.optim.Adam([net.sentinel_embeddings], lr=SETTLING)
        weights = {name: w.detach() for name, w in net.encoder_weights().items()}
        for _ in range(SETTLED):
            with torch.enable_grad():
                losses.retrieval(keys, net.sentinel(weights), *queries, margin=self.cfg.margin).total.backward()
            adam.step()
            net.zero_grad()

    def _encoded(self, texts: Sequence[Sample], weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Keys of the facts, queries of both wordings and of the unrelated questions: each [b, R] fp32."""
        with torch.autocast(self.net.scale.device.type, torch.bfloat16, enabled=self.cfg.bf16):
            keys = self.net.keys([join(s.prompt, s.target) for s in texts], weights)
            asked = [s.prompt for s in texts] + [s.again for s in texts] + [s.other for s in texts]
            queries = self.net.queries(asked, weights)
        return (keys.float(), *queries.float().chunk(3))

    def _update(self, step: int, places: Sequence[int]) -> dict[str, float]:
        """One step of Adam."""
        cfg, draw = self.cfg, random.Random(f"{self.cfg.seed}/{step}")
        texts = [sample(self.edits[i], self.unrelated, draw) for i in places]
        with torch.enable_grad():
            seen = self._learn_keys(texts, draw) if step < cfg.key_steps else self._learn_prompts(texts, draw)
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * self._rate(step)
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.adam.param_groups for p in g["params"]], cfg.clip)
        if not norm.isfinite():
            raise Diverged(f"training left the finite numbers at step {step}. Lower lr, now {cfg.lr}.")
        self.adam.step()
        self.net.zero_grad()
        return seen

    def _learn_keys(self, texts: list[Sample], draw: random.Random) -> dict[str, float]:
        """The retrieval terms and the echo, backpropagated."""
        net, texts = self.net, exchanged(texts, draw)
        weights = net.encoder_weights()
        keys, rel, gen, loc = self._encoded(texts, weights)
        swap = torch.tensor([draw.random() < 0.5 for _ in texts], device=keys.device)[:, None]
        first, second = torch.where(swap, gen, rel), torch.where(swap, rel, gen)
        others = self.queue.to(keys.device)
        found = losses.retrieval(keys, net.sentinel(weights), first, second, loc, margin=self.cfg.margin, others=others)
        echo = losses.echo(net.prompts(keys), *self._answers(texts, net.shape.prompt_tokens))
        (found.total + echo).backward()
        if self.cfg.queue:
            self.queue = torch.cat([self.queue, keys.detach().cpu()])[-self.cfg.queue :]
        terms = {"own": found.own, "neighbour": found.neighbour, "unrelated": found.unrelated, "echo": echo}
        return {name: float(value.detach()) for name, value in terms.items()}

    def _learn_prompts(self, texts: list[Sample], draw: random.Random) -> dict[str, float]:
        """The language model's terms, backpropagated into the map."""
        with torch.no_grad():
            keys = self.net.keys([join(s.prompt, s.target) for s in texts])
        prompts = self.net.prompts(keys)  # [b, P, d]
        seen, gradient = self._language(self._batch(texts, draw), prompts.detach())
        prompts.backward(gradient)
        return seen

    def _batch(self, samples: list[Sample], draw: random.Random) -> Batch:
        prompts = [text for s in samples for text in (s.prompt, s.again, s.other)]
        answers = [text for s in samples for text in (s.target, s.answer, s.other_answer)]
        longest = self.cfg.answer_tokens
        rows = [
            replace(row, ids=row.ids[: row.target + longest] if longest else row.ids)
            for row in encode_all(self.lm, prompts, answers)
        ]

        def told(kind: int, which: Sequence[int]) -> list[losses.Told]:
            return [losses.Told(rows[3 * i + kind], i) for i in which]

        every = range(len(samples))
        other = [i for i in every if draw.random() < self.cfg.other_share] or [0]
        return Batch(samples, told(0, every), told(1, every), told(2, other))

    def _answers(self, samples: Sequence[Sample], count: int) -> tuple[Tensor, Tensor]:
        """Embeddings [b, count, d] and ids [b, count] of the first tokens of each target; the last one repeats."""
        rows = encode_all(self.lm, [s.prompt for s in samples], [s.target for s in samples])
        answers = [row.ids[row.target :][:count] for row in rows]
        ids = torch.tensor([[*ids, *[ids[-1]] * (count - len(ids))] for ids in answers])
        with torch.no_grad():
            found = self.lm.module(self.lm.layout.embed)(ids.to(self.lm.device)).float()
        device = self.net.scale.device
        return found.to(device), ids.to(device)

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
        """Retrieval among held-out and ``CROWD`` trained facts, and teacher-forced answers behind the right vectors."""
        draw = random.Random(f"{self.cfg.seed}/validation")
        samples = [sample(edit, self.unrelated, draw) for edit in self.held]
        if not samples:
            return {}
        net, weights = self.net, self.net.encoder_weights()
        crowd = [join(edit.prompt, edit.target) for edit in self.edits[:CROWD]]
        stored = net.keys([join(s.prompt, s.target) for s in samples] + crowd, weights)
        keys = stored[: len(samples)]
        block = KeyBlock(keys.shape[1])
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
        if self.step < self.cfg.key_steps:
            words, ids = self._answers(samples, net.shape.prompt_tokens)
            found["echo_right"] = losses.echoed(net.prompts(keys), words, ids)
            return found
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
        """Add a line to the curves, in place of those that a stopped run wrote after its last checkpoint."""
        if self.out is None:
            return
        path = self.out / CURVES
        old = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [text for text in old if text.endswith("\n") and json.loads(text)["step"] < line["step"]]
        work = path.with_name(f".{CURVES}.new")
        work.write_text("".join(kept) + json.dumps(line | {"seconds": round(self.spent())}) + "\n")
        os.replace(work, path)

    def spent(self) -> float:
        """Seconds in all sittings."""
        return self.seconds + perf_counter() - self.started

    def save(self) -> None:
        """Write the checkpoint: weights, Adam's moments, the queue, the step. At once or not at all."""
        if self.out is None:
            return
        tensors = {f"net/{name}": p.detach() for name, p in self.net.state_dict().items()}
        tensors |= self._moments() | {"queue": self.queue}
        head = {"step": str(self.step), "seconds": str(self.spent()), "print": self.print}
        work = self.out / f".{CHECKPOINT}.new"
        safetensors.torch.save_file(
            {k: t.contiguous() for k, t in {**tensors, "queue": self.queue}.items()}, work, head
        )
        os.replace(work, self.out / CHECKPOINT)

    def _moments(self) -> dict[str, Tensor]:
        """Adam's state by the names it has in the file."""
        state = self.adam.state
        return {f"adam/{k}/{n}": t for n, p in self.net.named_parameters() for k, t in state.get(p, {}).items()}

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
        self.adam = self._adam()
        trained, params = {p for g in self.adam.param_groups for p in g["params"]}, dict(self.net.named_parameters())
        for name, t in tensors.items():
            if name.startswith("adam/"):
                _, key, owner = name.split("/", 2)
                if params[owner] in trained:  # at the border of the two parts the file still has the first one's
                    self.adam.state[params[owner]][key] = t


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
