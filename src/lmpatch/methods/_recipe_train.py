"""Training RECIPE's editor: one file to go on from, curves, and a validation that never sees a trained fact."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
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
from ..errors import BadInput, Diverged, LmpatchError
from ..models.lm import LM
from ..models.run import Progress, frozen, logits
from ..models.team import team
from ..models.tokens import Row, encode_all
from ..patches.keys import KeyBlock
from ..patches.retriever import Retriever
from ..record import hash_json, sync
from . import _recipe_loss as losses
from ._recipe_data import Sample, batches, drawable, exchanged, sample, words
from ._recipe_texts import Features

if TYPE_CHECKING:
    from .recipe import Training

MAP = ("content", "mix", "out")  # the submodules that make prompt vectors
CROWD = 1000  # trained facts among which the held-out ones are searched
CHECKPOINT, CURVES = "checkpoint.safetensors", "curves.jsonl"


@dataclass
class Batch:
    """Rows of one step."""

    samples: list[Sample]
    told: list[losses.Told]
    other: list[losses.Told]


class Trainer:
    """One training run. Everything random depends on the seed and the step, so a resumed run is the same run."""

    def __init__(
        self, lm: LM, net: Retriever, edits: Sequence[Edit], unrelated: Sequence[Ask], cfg: Training, out: Path | None
    ) -> None:
        self.lm, self.net, self.cfg, self.out, self.team = lm, net, cfg, out, team()
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
        self.features = Features(net, self.team, cfg.bf16, learning=bool(net.learned))
        self.words, self.targets = words(lm.tokenizer), [edit.target for edit in self.edits]
        self.base: dict[tuple[str, str], Tensor] = {}
        self.started = perf_counter()
        self.seconds = 0.0
        self.whole = True  # no step is half done
        self.recent: dict[str, float] = {}  # losses, smoothed
        texts = [*drawable(edits, unrelated), [(e.rephrases, e.locality, e.portability) for e in edits]]
        self.print = hash_json([asdict(cfg), asdict(net.shape), net.encoder.fingerprint, lm.fingerprint(), texts])
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._resume(out / CHECKPOINT)
            self._agree()

    def _agree(self) -> None:
        """Raise ``BadInput`` if the processes would go on from different steps: they cannot see the same folder."""
        own = torch.tensor([[self.step, int(self.print[:12], 16)]], device=self.net.scale.device)
        if len(self.team.gathered(own, self.team.count).unique(dim=0)) > 1:
            raise BadInput(
                f"the processes see different checkpoints in {self.out}. Give a folder that all of them share."
            )

    @property
    def second(self) -> bool:
        """Whether the next step is of the second part."""
        return self.step >= self.cfg.key_steps

    def _adam(self) -> torch.optim.AdamW:
        """An optimiser of what the next step trains: all in the first part, what makes prompt vectors in the second."""
        cfg, groups = self.cfg, []
        for name, p in self.net.named_parameters():
            part = name.partition(".")[0]
            if p.requires_grad and (part in MAP or not self.second):
                rate = cfg.prompt_lr if self.second else cfg.encoder_lr if part == "learned" else cfg.lr
                groups.append({"params": [p], "rate": rate})
        return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.decay)

    def run(self, progress: Progress | None = None) -> None:
        """Train to the last step. An interrupt leaves a checkpoint of the last whole step."""
        try:
            self._keep(progress)
            for step, places in self._places():
                if step >= self.total:
                    break
                if step == self.cfg.key_steps:
                    self.adam = self._adam()
                    self._keep(progress)
                seen = self._update(step, places)
                self.step, self.whole = step + 1, True
                self.recent = {k: 0.9 * self.recent.get(k, v) + 0.1 * v for k, v in seen.items()}
                if self.step % self.cfg.validate_every == 0 or self.step == self.total:
                    self._note({"step": self.step, **_rounded(self.recent), **_rounded(self.validate())})
                if self.step % self.cfg.save_every == 0:
                    self.save()
                if progress and self.team.leads:
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

    def _keep(self, progress: Progress | None) -> None:
        """Features of every text that a sample may have from here on, once they change no more."""
        edits = [*self.edits, *self.held]
        self.features.learning = bool(self.net.learned) and not self.second
        if not self.features.learning and not self.features.places:
            texts = [(e.prompt, e.target) for e in edits] if self.second else drawable(edits, self.unrelated)
            self.features.keep(texts, progress)

    def _update(self, step: int, places: Sequence[int]) -> dict[str, float]:
        """One step of Adam."""
        cfg, draw = self.cfg, random.Random(f"{self.cfg.seed}/{step}")
        texts = [sample(self.edits[i], self.unrelated, draw) for i in places]
        with torch.enable_grad():
            seen = self._learn_prompts(texts, draw) if self.second else self._learn_keys(texts, draw)
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * self._rate(step)
        trained = [p for g in self.adam.param_groups for p in g["params"]]
        self.team.mean([p.grad for p in trained if p.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
        if not norm.isfinite():
            raise Diverged(f"training left the finite numbers at step {step}. Lower lr, now {cfg.lr}.")
        self.whole = False  # until the step is counted
        self.adam.step()
        self.net.zero_grad()
        return seen

    def _learn_keys(self, samples: list[Sample], draw: random.Random) -> dict[str, float]:
        """The retrieval terms and the echo, backpropagated."""
        net, cfg = self.net, self.cfg
        pairs = [(s.prompt, s.again) if draw.random() < 0.5 else (s.again, s.prompt) for s in samples]
        spoken = exchanged(samples, self.words, cfg.words, draw)
        asked = [text for kind in (*zip(*pairs, strict=True), [s.other for s in samples]) for text in kind]
        texts = [(s.prompt, s.target) for s in samples + spoken] + [(text, "") for text in asked]
        features = self.features(texts)  # [5 b, 2 F]
        generator = torch.Generator().manual_seed(draw.getrandbits(40))
        seen = torch.rand(features.shape, generator=generator).to(features.device) >= cfg.dropout
        centre = net.centre  # what is not seen is as typical
        features = torch.where(seen, centre + (features - centre) / (1 - cfg.dropout), centre)
        told, echoing, questions = features.split([len(samples), len(samples), 3 * len(samples)])
        first, second, other = net.queries_of(questions).chunk(3)
        found = losses.retrieval(net.matched_of(told), net.sentinel(), first, second, other, margin=cfg.margin)
        echo = losses.echo(net.prompts_of(net.content_of(echoing)), *self._answers(spoken, net.shape.prompt_tokens))
        (found.total + echo).backward()
        terms = {"own": found.own, "neighbour": found.neighbour, "unrelated": found.unrelated, "echo": echo}
        return {name: float(value.detach()) for name, value in terms.items()}

    def _learn_prompts(self, samples: list[Sample], draw: random.Random) -> dict[str, float]:
        """The language model's terms, backpropagated into what makes the prompt vectors."""
        samples = exchanged(samples, self.targets, self.cfg.exchanged, draw)
        content = self.net.content_of(self.features([(s.prompt, s.target) for s in samples]))
        prompts = self.net.prompts_of(content)  # [b, P, d]
        seen, gradient = self._language(self._batch(samples, draw), prompts.detach())
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
        said = [t for i in every for t in told(int(draw.random() < 0.5), [i])]  # one of its two wordings
        other = [i for i in every if draw.random() < self.cfg.other_share] or [0]
        return Batch(samples, said, told(2, other))

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
        """The language model's losses (told in one wording or the other; other questions left alone), and the gradient
        [b, P, d] of their sum."""
        width, flat = prompts.shape[1], prompts.flatten(0, 1).to(self.lm.device)
        total = torch.zeros_like(flat)
        seen = {}
        for name, part in (("told", batch.told), ("other", batch.other)):
            leaf = flat.clone().requires_grad_()
            rows = losses.behind(self.lm, part, width, self.cfg.at)
            if name == "other":
                found = losses.kept(self.lm, rows, leaf, self._base(batch.samples, part), self.team)
            else:
                found = losses.told(self.lm, rows, leaf, self.cfg.margin, self.team)
            summed, grad = torch.tensor(found, device=flat.device), leaf.grad
            if grad is None:
                continue
            self.team.sum([summed, grad])
            loss, count = summed.tolist()
            seen[name] = loss / max(1, count)
            total += grad / max(1, count)
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
        net = self.net
        facts = [(s.prompt, s.target) for s in samples] + [(edit.prompt, edit.target) for edit in self.edits[:CROWD]]
        stored, sentinel = net.keys_of(self.features(facts)), net.sentinel().cpu()
        keys = stored[: len(samples)]
        block = KeyBlock(net.shape.matched)
        block.add(stored[:, : net.shape.matched], range(len(stored)))
        found = {}
        right = torch.arange(len(samples))
        for name, texts in (
            ("told", [s.prompt for s in samples]),
            ("again", [s.again for s in samples]),
            ("other", [s.other for s in samples]),
        ):
            queries = net.queries_of(self.features([(text, "") for text in texts])).cpu()
            score, place = (t[:, 0] for t in block.search(queries))
            fired = score > (queries @ sentinel).double()
            if name == "other":
                found["false_fire"] = float(fired.float().mean())
            else:
                found[f"recall_{name}"] = float((fired & (place == right)).float().mean())
        some = samples[: self.cfg.validate_lm]
        if not self.second:
            found["echo_right"] = losses.echoed(net.prompts(keys), *self._answers(samples, net.shape.prompt_tokens))
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
        if self.out is None or not self.team.leads:
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
        if self.out is None or not self.team.leads:
            return
        tensors = {f"net/{name}": p.detach() for name, p in self.net.state_dict().items()}
        tensors |= self._moments()
        head = {"step": str(self.step), "seconds": str(self.spent()), "print": self.print}
        head["recent"] = json.dumps(self.recent)
        work = self.out / f".{CHECKPOINT}.new"
        try:
            safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, work, head)
            sync(work)
            os.replace(work, self.out / CHECKPOINT)
        except (OSError, safetensors.SafetensorError) as error:
            work.unlink(missing_ok=True)
            raise LmpatchError(
                f"no checkpoint can be written to {self.out} ({error}). The one before is whole: free some space, and "
                "the same call goes on from it."
            ) from error

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
