"""Training RECIPE's editor: one file to go on from, curves, and a validation that never sees a trained fact."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ...data.edits import Ask, Edit
from ...distributed import world
from ...errors import BadInput, Diverged
from ...inference.forward import frozen, logits
from ...inference.tokens import Row, encode_all, join
from ...models.lm import LM
from ...progress import Progress
from ...provenance import hash_json
from ...retrieval import Fact
from ...retrieval.index import KeyBlock
from ...retrieval.network import Network, target_embeddings
from ...training import checkpoint
from . import losses
from .config import Training
from .data import Sample, batches, drawable, exchanged, sample, words
from .features import Features

MAP = ("content", "say", "mix", "out", "turn")  # the submodules that make prompt vectors
CROWD = 1000  # trained facts among which the held-out ones are searched
CHECKPOINT, CURVES = "checkpoint.safetensors", "curves.jsonl"


class Trainer:
    """One training run. Everything random depends on the seed and the step, so a resumed run is the same run."""

    def __init__(
        self, lm: LM, net: Network, edits: Sequence[Edit], unrelated: Sequence[Ask], cfg: Training, out: Path | None
    ) -> None:
        self.lm, self.net, self.cfg, self.out, self.world = lm, net, cfg, out, world()
        order = list(range(len(edits)))
        random.Random(f"{cfg.seed}/held out").shuffle(order)
        held = min(cfg.validate, len(edits) // 4)
        self.held, self.edits = [edits[i] for i in order[:held]], [edits[i] for i in order[held:]]
        self.unrelated = unrelated
        most = max(cfg.key_batch, cfg.prompt_batch)
        if len(self.edits) < most:
            raise BadInput(f"a batch has {most} facts, {len(self.edits)} are left to train on. Lower key_batch.")
        self.step, self.total = 0, cfg.key_steps + cfg.prompt_steps
        self.adam = self._adam()
        self.features = Features(net, self.world, cfg.bf16, learning=bool(net.learned))
        self.pools = [words(lm.tokenizer), sorted({edit.target for edit in self.edits})]
        self.base: dict[tuple[str, str], Tensor] = {}
        self.started = perf_counter()
        self.seconds = 0.0
        self.whole = True  # no step is half done
        self.recent: dict[str, float] = {}  # losses, smoothed
        data = [[asdict(edit) for edit in edits], [asdict(ask) for ask in unrelated]]
        self.stamp = hash_json([asdict(cfg), asdict(net.shape), net.encoder.fingerprint, lm.fingerprint(), data])
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._resume(out / CHECKPOINT)
            self._agree()

    def _agree(self) -> None:
        """Raise ``BadInput`` if the processes would go on from different steps: they cannot see the same folder."""
        own = torch.tensor([[self.step, int(self.stamp[:12], 16)]], device=self.net.scale.device)
        if len(self.world.gathered(own, self.world.size).unique(dim=0)) > 1:
            raise BadInput(
                f"the processes see different checkpoints in {self.out}. Give a folder that all of them share."
            )

    @property
    def second(self) -> bool:
        """Whether the next step is of the second part."""
        return self.step >= self.cfg.key_steps

    def _adam(self) -> torch.optim.AdamW:
        """An optimiser of what the next step trains: what makes prompt vectors in the second part, the rest before."""
        cfg, groups = self.cfg, []
        for name, p in self.net.named_parameters():
            part = name.partition(".")[0]
            if p.requires_grad and (part in MAP) == self.second:
                rate = cfg.prompt_lr if self.second else cfg.encoder_lr if part == "learned" else cfg.lr
                groups.append({"params": [p], "rate": rate})
        return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.decay)

    def run(self, progress: Progress | None = None) -> None:
        """Train to the last step. An interrupt leaves a checkpoint of the last whole step."""
        try:
            self._precompute(progress)
            for step, places in self._places():
                if step >= self.total:
                    break
                if step == self.cfg.key_steps:
                    self.adam = self._adam()
                    self._precompute(progress)
                terms = self._update(step, places)
                self.step, self.whole = step + 1, True
                self.recent = {k: 0.9 * self.recent.get(k, v) + 0.1 * v for k, v in terms.items()}
                if self.step % self.cfg.validate_every == 0 or self.step == self.total:
                    self._note({"step": self.step, **_rounded(self.recent), **_rounded(self.validate())})
                if self.step % self.cfg.save_every == 0:
                    self.save()
                if progress and self.world.is_main:
                    progress(self.step, self.total, "training")
        finally:
            if self.whole:
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

    def _precompute(self, progress: Progress | None) -> None:
        """Features of every text that a sample may have from here on, once they change no more."""
        edits = [*self.edits, *self.held]
        self.features.learning = bool(self.net.learned) and not self.second
        if not self.features.learning and not self.features.places:
            self.features.precompute(drawable(edits, self.unrelated), progress)

    def _update(self, step: int, places: Sequence[int]) -> dict[str, float]:
        """One step of Adam."""
        cfg, draw = self.cfg, random.Random(f"{self.cfg.seed}/{step}")
        samples = [sample(self.edits[i], self.unrelated, draw) for i in places]
        with torch.enable_grad():
            terms = self._learn_prompts(samples, draw) if self.second else self._learn_keys(samples, draw)
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * self._rate(step)
        trained = [p for g in self.adam.param_groups for p in g["params"]]
        self.world.mean([p.grad for p in trained if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
        if not norm.isfinite():
            raise Diverged(f"training left the finite numbers at step {step}. Lower lr, now {cfg.lr}.")
        self.whole = False  # until the step is counted
        self.adam.step()
        self.net.zero_grad()
        return terms

    def _learn_keys(self, samples: list[Sample], draw: random.Random) -> dict[str, float]:
        """The retrieval terms, backpropagated."""
        net, cfg = self.net, self.cfg
        pairs = [(s.prompt, s.again) if draw.random() < 0.5 else (s.again, s.prompt) for s in samples]
        facts, others = [join(s.prompt, s.target) for s in samples], [s.other for s in samples]
        features = self.features([text for kind in (facts, *zip(*pairs, strict=True), others) for text in kind])
        generator = torch.Generator().manual_seed(draw.getrandbits(40))
        visible = torch.rand(features.shape, generator=generator).to(features.device) >= cfg.dropout
        centre = net.centre  # a hidden feature has its typical value
        features = torch.where(visible, centre + (features - centre) / (1 - cfg.dropout), centre)
        statements, questions = features.split([len(samples), 3 * len(samples)])  # [b, F], [3 b, F]
        first, second, other = net.queries_of(questions).chunk(3)
        keys = net.matched_of(statements)
        loss = losses.retrieval_losses(keys, net.sentinel(), first, second, other, margin=cfg.margin)
        loss.total.backward()
        terms = {"own": loss.own, "neighbour": loss.neighbour, "unrelated": loss.unrelated}
        return {name: float(value.detach()) for name, value in terms.items()}

    def _learn_prompts(self, samples: list[Sample], draw: random.Random) -> dict[str, float]:
        """The language model's terms, backpropagated into what makes the prompt vectors."""
        samples = exchanged(samples, self.pools, self.cfg.exchanged, draw)
        prompts = self._prompts([(s.prompt, s.target) for s in samples])  # [b, P, d]
        wordings = [(s.prompt, s.target) if draw.random() < 0.5 else (s.again, s.answer) for s in samples]
        some = [i for i in range(len(samples)) if draw.random() < self.cfg.other_share] or [0]
        others = [(samples[i].other, samples[i].other_answer) for i in some]
        answers, unrelated = self._behind(wordings, range(len(samples))), self._behind(others, some)
        base, flat = self._base(others), prompts.detach().flatten(0, 1).to(self.lm.device)
        lm, margin, world = self.lm, self.cfg.margin, self.world
        stated, gradient = self._mean(flat, lambda leaf: losses.statement_loss(lm, answers, leaf, margin, world))
        locality, other = self._mean(flat, lambda leaf: losses.locality_loss(lm, unrelated, leaf, base, world))
        prompts.backward((gradient + other).to(prompts.device).reshape(prompts.shape))
        return {"told": stated, "other": locality}

    def _mean(self, flat: Tensor, loss: Callable[[Tensor], tuple[Tensor, int]]) -> tuple[float, Tensor]:
        """A loss of prompt vectors [m, d], the mean over its tokens, and its gradient."""
        leaf = flat.clone().requires_grad_()
        summed = torch.tensor(loss(leaf), device=flat.device)
        gradient = torch.zeros_like(flat) if leaf.grad is None else leaf.grad
        self.world.sum([summed, gradient])
        total, count = summed.tolist()
        return total / max(1, count), gradient / max(1, count)

    def _prompts(self, facts: Sequence[Fact]) -> Tensor:
        """Prompt vectors [n, P, d] of facts."""
        content = self.net.content_of(self.features([join(*fact) for fact in facts]))
        targets = target_embeddings(self.lm, facts, self.net.shape.target_tokens).to(content.device)
        return self.net.prompts_of(content, targets)

    def _rows(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Prompts with answers, those cut to the length that is trained on."""
        longest = self.cfg.answer_tokens
        rows = encode_all(self.lm, *map(list, zip(*pairs, strict=True)))
        return [replace(row, ids=row.ids[: row.target + longest] if longest else row.ids) for row in rows]

    def _behind(self, pairs: Sequence[tuple[str, str]], facts: Sequence[int]) -> list[Row]:
        """The same behind the vectors of these facts of the batch."""
        rows = [losses.AnswerRow(row, i) for row, i in zip(self._rows(pairs), facts, strict=True)]
        return losses.behind(self.lm, rows, self.net.shape.prompt_tokens, self.cfg.at)

    def _base(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        """States of the unpatched model at the answers of unrelated questions; each is computed once in a run."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self.base]
        if missing:
            self.base.update(zip(missing, losses.base_states(self.lm, self._rows(missing)), strict=True))
        return [self.base[pair] for pair in pairs]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Retrieval among held-out and ``CROWD`` trained facts; in the second part answers behind the right vectors."""
        draw = random.Random(f"{self.cfg.seed}/validation")
        samples = [sample(edit, self.unrelated, draw) for edit in self.held]
        if not samples:
            return {}
        return self._recall(samples) | (self._accuracy(samples[: self.cfg.validate_lm]) if self.second else {})

    def _recall(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Questions that find their fact and beat the sentinel; those that find one and should not."""
        net = self.net
        facts = [join(s.prompt, s.target) for s in samples] + [join(e.prompt, e.target) for e in self.edits[:CROWD]]
        keys, sentinel = net.matched_of(self.features(facts)).cpu(), net.sentinel().cpu()
        block = KeyBlock(net.shape.matched)
        block.add(keys, range(len(keys)))
        shares = {}
        right = torch.arange(len(samples))
        for name, texts in (
            ("told", [s.prompt for s in samples]),
            ("again", [s.again for s in samples]),
            ("other", [s.other for s in samples]),
        ):
            queries = net.queries_of(self.features(texts)).cpu()
            score, place = (t[:, 0] for t in block.search(queries))
            fired = score > (queries @ sentinel).double()
            if name == "other":
                shares["false_fire"] = float(fired.float().mean())
            else:
                shares[f"recall_{name}"] = float((fired & (place == right)).float().mean())
        return shares

    def _accuracy(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Teacher-forced answers behind the vectors of the right facts."""
        vectors = self._prompts([(s.prompt, s.target) for s in samples]).flatten(0, 1).to(self.lm.device)
        shares = {}
        for name, pairs in (
            ("told", [(s.prompt, s.target) for s in samples]),
            ("again", [(s.again, s.answer) for s in samples]),
        ):
            hits = torch.zeros(len(samples), 2)
            for states, labels, owners in losses.answers(self.lm, self._behind(pairs, range(len(samples))), vectors):
                best = torch.cat([logits(self.lm, part).argmax(-1) for part in states.split(64)])
                right = torch.stack([(best == labels).float().cpu(), torch.ones(len(owners))], 1)
                hits.index_add_(0, torch.tensor(owners), right)
            shares[f"tf_{name}"] = float((hits[:, 0] / hits[:, 1]).mean())
        return shares

    def _note(self, line: dict[str, Any]) -> None:
        """Add a line to the curves, in place of those that a stopped run wrote after its last checkpoint."""
        if self.out is None or not self.world.is_main:
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
        """Write the checkpoint: weights, Adam's moments, the step. At once or not at all."""
        if self.out is None or not self.world.is_main:
            return
        tensors = {f"net/{name}": p.detach() for name, p in self.net.state_dict().items()}
        tensors |= self._moments()
        head = {"step": str(self.step), "seconds": str(self.spent()), "recent": json.dumps(self.recent)}
        checkpoint.write(self.out / CHECKPOINT, self.stamp, head, tensors)

    def _moments(self) -> dict[str, Tensor]:
        """Adam's state by the names it has in the file."""
        state = self.adam.state
        return {f"adam/{k}/{n}": t for n, p in self.net.named_parameters() for k, t in state.get(p, {}).items()}

    def _resume(self, path: Path) -> None:
        if not path.exists():
            return
        head, tensors = checkpoint.read(path, self.stamp)
        self.step, self.seconds, self.recent = int(head["step"]), float(head["seconds"]), json.loads(head["recent"])
        self.net.load_state_dict({n.removeprefix("net/"): t for n, t in tensors.items() if n.startswith("net/")})
        self.adam = self._adam()
        trained, params = {p for g in self.adam.param_groups for p in g["params"]}, dict(self.net.named_parameters())
        for name, t in tensors.items():
            if name.startswith("adam/"):
                _, key, owner = name.split("/", 2)
                if params[owner] in trained:  # at the border of the two parts the file still has the first one's
                    self.adam.state[params[owner]][key] = t if key == "step" else t.to(params[owner].device)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def train_network(
    lm: LM,
    net: Network,
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
