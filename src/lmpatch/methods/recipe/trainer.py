"""Training RECIPE's editor, with a validation that never sees a trained fact."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ...data.edits import Ask, Edit
from ...distributed import World, world
from ...errors import BadInput
from ...inference.forward import frozen, logits
from ...inference.generate import StopTokens, continuations
from ...inference.tokens import Row, encode_all, end_token, join
from ...models.lm import LM
from ...progress import Progress
from ...provenance import hash_json
from ...retrieval import Fact
from ...retrieval.index import KeyBlock
from ...retrieval.network import Network, target_embeddings
from ...training.loop import Loop, Schedule, Task, linear
from . import losses
from .config import Training
from .data import Sample, batch, drawable, exchanged, sample, words

MAP = ("content", "say", "mix", "out", "turn", "end")  # the submodules that make prompt vectors
CROWD = 1000  # trained facts among which the held-out ones are searched
TOGETHER = 2048  # texts encoded between two reports of progress
CHECKPOINT, CURVES = "checkpoint.safetensors", "curves.jsonl"


class Trainer(Task):
    """One training run of two parts: retrieval, then what makes prompt vectors."""

    def __init__(
        self, lm: LM, net: Network, edits: Sequence[Edit], unrelated: Sequence[Ask], cfg: Training,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.lm, self.net, self.cfg, self.world, self.progress = lm, net, cfg, world(), progress
        order = list(range(len(edits)))
        random.Random(f"{cfg.seed}/held out").shuffle(order)
        held = min(cfg.validate, len(edits) // 4)
        self.held, self.edits = [edits[i] for i in order[:held]], [edits[i] for i in order[held:]]
        self.unrelated = unrelated
        most = max(cfg.key_batch, cfg.prompt_batch)
        if len(self.edits) < most:
            raise BadInput(f"a batch has {most} facts, {len(self.edits)} are left to train on. Lower key_batch.")
        self.second = False  # which part the steps are of
        self.values = net.state_dict(keep_vars=True)
        self.features = Features(net, self.world, cfg.bf16)
        self.pools = [words(lm.tokenizer), sorted({edit.target for edit in self.edits})]
        self.base: dict[tuple[str, str], Tensor] = {}
        self.ends, self.end = StopTokens(lm, None), end_token(lm)
        data = [[asdict(edit) for edit in edits], [asdict(ask) for ask in unrelated]]
        self.stamp = hash_json([asdict(cfg), asdict(net.shape), net.encoder.fingerprint, lm.fingerprint(), data])

    def run(self, folder: Path | None) -> Loop:
        """Train the network in place, see ``recipe.train``; ``folder``: of checkpoint and curves."""
        cfg, both = self.cfg, self.cfg.key_steps + self.cfg.prompt_steps
        every = {"validate_every": cfg.validate_every, "save_every": cfg.save_every}
        schedule = Schedule(both, rate=self.rate, clip=cfg.clip, renew=frozenset({cfg.key_steps}), **every)
        file, curves = (folder / name if folder else None for name in (CHECKPOINT, CURVES))
        advice = f"Lower lr, now {cfg.lr}."
        loop = Loop(self, schedule, file=file, curves=curves, stamp=self.stamp, advice=advice)
        with frozen(self.lm):
            loop.run(self.progress)
        return loop

    def optimiser(self, step: int) -> torch.optim.Optimizer:
        """AdamW over what the part trains: what makes prompt vectors in the second, the rest in the first."""
        cfg, groups, features = self.cfg, [], self.features
        self.second = step >= cfg.key_steps
        features.learning = bool(self.net.learned) and not self.second
        if not features.learning and not features.places:  # those of every text that a sample may have change no more
            features.precompute(drawable([*self.edits, *self.held], self.unrelated), self.progress)
        for name, p in self.net.named_parameters():
            part = name.partition(".")[0]
            if p.requires_grad and (part in MAP) == self.second:
                rate = cfg.prompt_lr if self.second else cfg.encoder_lr if part == "learned" else cfg.lr
                groups.append({"params": [p], "lr": rate})
        return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.decay)

    def rate(self, step: int) -> float:
        """Warm-up, then down in a line to ``final`` of the rate, in each part."""
        cfg = self.cfg
        start, end = (0, cfg.key_steps) if step < cfg.key_steps else (cfg.key_steps, cfg.key_steps + cfg.prompt_steps)
        return linear(step - start, end - start, cfg.warmup, cfg.final)

    @torch.enable_grad()
    def learn(self, step: int) -> dict[str, float]:
        """The losses of the step's part, backpropagated."""
        draw = random.Random(f"{self.cfg.seed}/{step}")
        size, start = (self.cfg.prompt_batch, self.cfg.key_steps) if self.second else (self.cfg.key_batch, 0)
        places = batch(len(self.edits), size, self.cfg.seed, step - start)
        samples = [sample(self.edits[i], self.unrelated, draw) for i in places]
        terms = self._learn_prompts(samples, draw) if self.second else self._learn_keys(samples, draw)
        self.world.mean([p.grad for p in self.net.parameters() if p.grad is not None])
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
        terms = losses.retrieval_losses(keys, net.sentinel(), first, second, other, margin=cfg.margin)
        torch.stack([*terms.values()]).sum().backward()
        return {name: float(value.detach()) for name, value in terms.items()}

    def _learn_prompts(self, samples: list[Sample], draw: random.Random) -> dict[str, float]:
        """The language model's terms, backpropagated into what makes the prompt vectors."""
        samples = exchanged(samples, self.pools, self.cfg.exchanged, draw)
        prompts, lengths = self._prompts([(s.prompt, s.target) for s in samples])  # [b, P, d]
        wordings = [(s.prompt, s.target) if draw.random() < 0.5 else (s.again, s.answer) for s in samples]
        some = [i for i in range(len(samples)) if draw.random() < self.cfg.other_share] or [0]
        others = [(samples[i].other, samples[i].other_answer) for i in some]
        told, after = self._continued(self._rows(wordings))
        answers, unrelated = (
            self._behind(rows, at, lengths) for rows, at in ((told, range(len(samples))), (self._rows(others), some))
        )
        base, flat = self._base(others), prompts.detach().flatten(0, 1).to(self.lm.device)
        lm, margin, world = self.lm, self.cfg.margin, self.world
        stated, gradient = self._mean(flat, lambda leaf: losses.statement_loss(lm, answers, leaf, margin, world, after))
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

    def _prompts(self, facts: Sequence[Fact]) -> tuple[Tensor, list[int]]:
        """Prompt vectors [n, P, d] of facts, and how many of each are used."""
        content = self.net.content_of(self.features([join(*fact) for fact in facts]))
        targets = target_embeddings(self.lm, facts, self.net.shape.target_tokens)
        return self.net.prompts_of(content, targets), self.net.lengths(targets)

    def _rows(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Prompts with answers, those cut to the length that is trained on."""
        longest = self.cfg.answer_tokens
        rows = encode_all(self.lm, *map(list, zip(*pairs, strict=True)))
        return [replace(row, ids=row.ids[: row.target + longest]) for row in rows] if longest else rows

    def _behind(self, rows: Sequence[Row], facts: Sequence[int], lengths: Sequence[int]) -> list[Row]:
        """The rows behind the vectors of these facts of the batch."""
        return losses.behind(self.lm, rows, facts, self.net.shape.prompt_tokens, self.cfg.at, lengths)

    def _continued(self, rows: Sequence[Row]) -> tuple[list[Row], list[tuple[int, Tensor]]]:
        """Rows with the rest of the sentence as the unpatched model says it, and an end of the answer where it ends;
        how many tokens each target has, and the model's states [k, d] at the rest."""
        count = self.cfg.after_tokens
        if not count:
            return list(rows), []
        new = continuations(self.lm, rows, count)
        rest = [self._sentence(own, row.ids[row.target]) for row, own in zip(rows, new, strict=True)]
        behind = [Row((*row.ids, *kept), len(row.ids)) for row, (kept, _) in zip(rows, rest, strict=True)]
        longer = [
            Row((*row.ids, *[self.end] * ended), told.target)
            for row, told, (_, ended) in zip(behind, rows, rest, strict=True)
        ]
        states = [torch.zeros(0, self.lm.layout.d_model)] * len(rows)
        some = [i for i, (kept, _) in enumerate(rest) if kept]
        for i, own in zip(some, losses.base_states(self.lm, [behind[i] for i in some]), strict=True):
            states[i] = own
        return longer, [(len(row.ids) - row.target, own) for row, own in zip(rows, states, strict=True)]

    def _sentence(self, ids: list[int], target: int) -> tuple[list[int], bool]:
        """The ids up to the end of a sentence, and whether it ends. One that says the target again ends before it
        begins."""
        for k, token in enumerate(ids):
            if token == target:
                return [], True
            if token in self.ends:
                return ids[:k], True
            if self.lm.tokenizer.decode([token]).strip() in (".", "!", "?"):
                return ids[: k + 1], True
        return ids, False

    def _base(self, pairs: Sequence[tuple[str, str]]) -> list[Tensor]:
        """States of the unpatched model at the answers of unrelated questions; each is computed once in a run."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self.base]
        if missing:
            self.base.update(zip(missing, losses.base_states(self.lm, self._rows(missing)), strict=True))
        return [self.base[pair] for pair in pairs]

    def validate(self, step: int) -> dict[str, float]:
        """Retrieval among held-out and ``CROWD`` trained facts; in the second part answers behind the right vectors."""
        draw = random.Random(f"{self.cfg.seed}/validation")
        samples = [sample(edit, self.unrelated, draw) for edit in self.held]
        if not samples:
            return {}
        shares = self._recall(samples)
        if step >= self.cfg.key_steps:
            shares |= self._accuracy(samples[: self.cfg.validate_lm])
        return {name: round(share, 4) for name, share in shares.items()}

    def _recall(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Questions that find their fact and beat the sentinel; those that find one and should not."""
        net = self.net
        facts = [join(s.prompt, s.target) for s in samples] + [join(e.prompt, e.target) for e in self.edits[:CROWD]]
        keys, sentinel = net.matched_of(self.features(facts)).cpu(), net.sentinel().cpu()
        block = KeyBlock(net.shape.matched)
        block.add(keys, range(len(keys)))
        texts = {"recall_told": [s.prompt for s in samples], "recall_again": [s.again for s in samples]}
        shares = {}
        for name, questions in (texts | {"false_fire": [s.other for s in samples]}).items():
            queries = net.queries_of(self.features(questions)).cpu()
            score, place = (t[:, 0] for t in block.search(queries))
            fired = score > (queries @ sentinel).double()
            right = place == torch.arange(len(samples)) if name in texts else True
            shares[name] = float((fired & right).float().mean())
        return shares

    def _accuracy(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Teacher-forced answers behind the vectors of the right facts."""
        told, again = [(s.prompt, s.target) for s in samples], [(s.again, s.answer) for s in samples]
        prompts, lengths = self._prompts(told)
        vectors = prompts.flatten(0, 1).to(self.lm.device)
        shares = {}
        for name, pairs in (("tf_told", told), ("tf_again", again)):
            hits = torch.zeros(len(samples), 2)
            rows = self._behind(self._rows(pairs), range(len(samples)), lengths)
            for states, labels, owners in losses.answers(self.lm, rows, vectors):
                best = torch.cat([logits(self.lm, part).argmax(-1) for part in states.split(64)])
                right = torch.stack([(best == labels).float().cpu(), torch.ones(len(owners))], 1)
                hits.index_add_(0, torch.tensor(owners), right)
            shares[name] = float((hits[:, 0] / hits[:, 1]).mean())
        return shares


class Features:
    """Called with texts, gives their features, each computed once where the encoder stands still. Several processes
    encode a part each."""

    def __init__(self, net: Network, world: World, bf16: bool) -> None:
        self.net, self.world, self.bf16 = net, world, bf16
        self.learning = bool(net.learned)  # gradients flow into the encoder, and nothing can be kept
        self.places: dict[str, int] = {}
        self.table = torch.zeros(0)  # [n, F] fp16

    def precompute(self, texts: Sequence[str], progress: Progress | None) -> None:
        """Compute the features of these texts, once and for all."""
        parts = []
        for start in range(0, len(texts), TOGETHER):
            parts.append(self._encode(texts[start : start + TOGETHER]).half().cpu())
            if progress and self.world.is_main:
                progress(min(start + TOGETHER, len(texts)), len(texts), "encoding texts")
        self.places, self.table = {text: i for i, text in enumerate(texts)}, torch.cat(parts)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features [n, F] fp32 of texts, computed ahead or not."""
        places = [self.places.get(text) for text in texts]
        new = [i for i, place in enumerate(places) if place is None]
        if len(new) == len(texts):
            return self._encode(texts)
        features = self.table[[place or 0 for place in places]].float().to(self.net.scale.device)
        if new:
            features[new] = self._encode([texts[i] for i in new])
        return features

    def _encode(self, texts: Sequence[str]) -> Tensor:
        own, device = self.world.part(texts), self.net.scale.device
        encode = torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)(self.net.features)
        encode = encode if self.learning else torch.no_grad()(encode)
        features = encode(own) if own else torch.zeros(0, self.net.inputs, device=device)
        return self.world.gathered(features.float(), len(texts))
