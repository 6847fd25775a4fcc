"""``fit`` and ``train`` of RECIPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ...data.edits import Edit, prompt_key
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK, attention_to_train, frozen
from ...models.lm import LM
from ...patches.base import ANY, Base, fingerprint
from ...patches.editor import Editor, find_editor, joined
from ...patches.memory.patch import MemoryPatch, build_memory, retriever_of, scope_of
from ...patches.patch import plain
from ...progress import Progress
from ...provenance import hash_json, made_now
from ...resources import require_memory
from ...retrieval import Form, Scope
from ...retrieval.encoder import load_encoder, shared_encoder
from ...retrieval.network import Network, Shape, Sizes
from ...retrieval.prompts import PromptMap, PromptShape, PromptSizes, embedded
from ...retrieval.recipe import PREFIX, Recipe
from ...training.facts import Split, usable, without
from ...training.loop import Loop, Schedule, Task
from .config import Config, Training
from .data import TrainingData, drawable
from .keys import Keys
from .losses import BATCH_TOKENS
from .prompts import Prompts
from .published import Published
from .verify import Verify

PUBLISHED = 3  # prompt vectors of a fact in the published form
TYPICAL = 256  # facts whose mean feature is taken for the centre of all


def train(
    lm: LM, data: TrainingData | Sequence[Edit], cfg: Training, *, out: str | Path | None = None,
    progress: Progress | None = None,
) -> Editor:  # fmt: skip
    """Train an editor: retrieval that knows a fact in other words and leaves the rest alone, a verifier of what it
    finds, and prompt vectors that make the model state it once and stop.

    Args:
        data: facts to learn editing from, with rephrases and locality prompts; none of them is remembered. As
            ``TrainingData`` with unrelated questions, or for another sentence encoder.
        out: folder of the checkpoints and the curves. A run that is there goes on where it stopped.
    Returns:
        the editor; ``save`` writes one safetensors file, without the retrieval where that is lmpatch's own.
        Without ``prompt_steps`` it is one for any model.
    Raises:
        BadInput: too few facts, or ``out`` holds another run.
        NotEnoughMemory: training would need more than is free.
        Diverged: a loss left the finite numbers; the last checkpoint is good.
    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.3; with ``faithful`` as published.
    Differs, without it: retrieval never asks the language model, and is trained apart with all facts as rivals; the
    encoder stays as it is; prompt vectors are made of the target's tokens alone, see ``retrieval.prompts``, and learn
    an end of the answer, with and without the fact as text behind them.
    """
    data = data if isinstance(data, TrainingData) else TrainingData(data)
    if data.encoder != TrainingData.encoder and not (cfg.key_steps or cfg.faithful):
        raise BadInput(f"the encoder {data.encoder!r} needs retrieval of its own. Set key_steps, 1200 for example.")
    edits, folder = usable(without(data.edits, ()), data.unrelated), Path(out) if out is not None else None
    batches = ((cfg.key_batch, cfg.key_steps), (cfg.prompt_batch, cfg.prompt_steps or cfg.faithful))
    least = max((size for size, steps in batches if steps), default=2)
    split = Split.of(edits, data.unrelated, cfg.validate, cfg.seed, least)
    stamp = hash_json([asdict(cfg), [asdict(edit) for edit in edits], [asdict(ask) for ask in data.unrelated]])
    run = _Run(lm, split, cfg, folder, stamp, progress)
    if cfg.faithful:
        return run.published(data)
    half = run.retrieval(data) if cfg.key_steps else find_editor("recipe", None)
    half = run.verifier(half) if cfg.verifier_steps else half
    whole = run.prompts(half) if cfg.prompt_steps else half
    return replace(whole, on=None) if cfg.key_steps or cfg.verifier_steps else whole


@dataclass(frozen=True)
class _Run:
    """The parts of one training."""

    lm: LM
    split: Split
    cfg: Training
    folder: Path | None
    stamp: str
    progress: Progress | None

    def retrieval(self, data: TrainingData) -> Editor:
        """Heads and sentinel."""
        net = self._network(data)
        need = 2 * net.inputs * len(self._texts()) + 16 * sum(p.numel() for p in net.parameters() if p.requires_grad)
        require_memory(need, self.lm.device, f"training on {len(self.split.edits)} facts")
        net.encoder.module.to(self.lm.device)
        task = Keys(net.to(self.lm.device), self.split, self.cfg, self.progress)
        made = self._trained(task, "retrieval", self.cfg.key_steps, task.rate, net.encoder.fingerprint)
        return Editor("recipe", _config(self.cfg, "text"), ANY, *_network_parts(net), made)

    def verifier(self, half: Editor) -> Editor:
        """The same retrieval, and what looks again at the facts that it finds."""
        own = retriever_of(half)
        assert isinstance(own, Recipe)
        tensors = {name: tensor for name, tensor in own.learned.items() if not name.startswith("verifier.")}
        net = Network(replace(own.shape, verifier=self.cfg.verifier), own.encoder)
        assert net.verifier is not None
        net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
        net.requires_grad_(False)
        net.verifier.requires_grad_(True).start(torch.Generator().manual_seed(self.cfg.seed))
        net.encoder.module.to(self.lm.device)
        need = 4 * net.inputs * len(self._texts())  # about as many questions are asked of other subjects
        require_memory(need, self.lm.device, f"training on {len(self.split.edits)} facts")
        task = Verify(net.to(self.lm.device), self.split, self.cfg, self.progress)
        made = self._trained(task, "verifier", self.cfg.verifier_steps, task.rate, half.hash())
        parts, learned = _network_parts(net)
        made = {**half.made, "verifier": made}
        return replace(half, parts={**half.parts, **parts}, tensors={**half.tensors, **learned}, made=made)

    def prompts(self, half: Editor) -> Editor:
        """The prompt map of the model, joined to the retrieval."""
        lm, cfg = self.lm, self.cfg
        sizes = {f.name: getattr(cfg, f.name) for f in fields(PromptSizes)}
        net = PromptMap(PromptShape(d_model=_embedding_width(lm), **sizes))
        net.start(lm, cfg.seed)
        layout = lm.layout
        batch = BATCH_TOKENS * (12 * layout.n_layers * layout.d_model + 4 * sum(layout.widths))
        require_memory(4 * (batch + 3 * HEAD_CHUNK * layout.vocab), lm.device, f"training {lm.name}'s prompt vectors")
        task = Prompts(lm, net.to(lm.device), self.split, cfg)
        made = self._trained(task, "prompts", cfg.prompt_steps, task.rate, lm.fingerprint())
        tensors = {f"{PREFIX}{name}": tensor for name, tensor in _bf16(net).items()}
        parts = {"prompt": asdict(net.shape)}
        rest = Editor("recipe", _config(cfg, "both"), Base(fingerprint(lm), lm.name), parts, tensors, made)
        return joined(rest, half)

    def published(self, data: TrainingData) -> Editor:
        """All at once, as published."""
        lm, cfg = self.lm, self.cfg
        net = self._network(data, _embedding_width(lm), PUBLISHED)
        net.encoder.module.to(lm.device)
        task = Published(lm, net.to(lm.device), self.split, cfg)
        made = self._trained(task, "published", cfg.prompt_steps, task.rate, lm.fingerprint())
        return Editor("recipe", _config(cfg, "vectors"), Base(fingerprint(lm), lm.name), *_network_parts(net), made)

    def _network(self, data: TrainingData, d_model: int = 0, prompt_tokens: int = 0) -> Network:
        """A network with its starting weights; ``BadInput``: a text is longer than its encoder reads."""
        encoder, texts = load_encoder(data.encoder, download=data.download), self._texts()
        long = [t for t, ids in zip(texts, encoder.tokenise(texts), strict=True) if len(ids) > encoder.limit]
        if long:
            raise BadInput(
                f"{len(long)} of {len(texts)} texts are longer than the {encoder.limit} tokens {encoder.name} reads: "
                f"{long[0][:60]!r}…. Leave them out or shorten them."
            )
        sizes = {f.name: getattr(self.cfg, f.name) for f in fields(Sizes)}
        shape = Shape(encoder=encoder.name, features=encoder.width, **sizes)
        if d_model:  # published
            shape = replace(shape, d_model=d_model, prompt_tokens=prompt_tokens, asked=False)
        net = Network(shape, encoder)
        typical = [(e.prompt, e.target) for e in self.split.edits[:TYPICAL]]
        net.start(self.cfg.seed, typical, typical_embeddings(self.lm) if d_model else None)
        return net

    def _texts(self) -> list[str]:
        return drawable([*self.split.edits, *self.split.held], self.split.unrelated)

    def _trained(self, task: Task, name: str, steps: int, rate: Callable[[int], float], asked: str) -> dict[str, Any]:
        """Run a part to its end; what is noted of it."""
        cfg = self.cfg
        schedule = Schedule(
            steps, rate=rate, clip=cfg.clip, validate_every=cfg.validate_every, save_every=cfg.save_every
        )
        file, curves = (self.folder / f"{name}{end}" if self.folder else None for end in (".safetensors", ".jsonl"))
        advice = f"Lower lr, now {cfg.lr}, or prompt_lr, now {cfg.prompt_lr}."
        loop = Loop(
            task, schedule, name=name, file=file, curves=curves, stamp=hash_json([self.stamp, asked]), advice=advice
        )
        with frozen(self.lm), attention_to_train(self.lm):
            loop.run(self.progress)
        lm_dtype = str(self.lm.dtype).removeprefix("torch.")
        made = {"steps": loop.step, "facts": len(self.split.edits), "lm_dtype": lm_dtype}
        return made | made_now(loop.seconds)


def _config(cfg: Training, insert: Form) -> dict[str, Any]:
    """How an editor was trained, and how its facts are used unless a call says otherwise."""
    return {**plain(cfg), "insert": insert}


def _bf16(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().to(torch.bfloat16).contiguous() for name, p in net.state_dict().items()}


def _network_parts(net: Network) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"shape": asdict(net.shape), "encoder_fingerprint": net.encoder.fingerprint}, _bf16(net)


def _embedding_width(lm: LM) -> int:
    return lm.parameter(lm.layout.weight(lm.layout.embed)).shape[1]


def typical_embeddings(lm: LM) -> Tensor:
    """Outputs of the embedding module for the tokens of a sentence: [n, d_model]."""
    return embedded(lm, lm.tokenizer("The quick brown fox jumps over the lazy dog near Paris in 1999.")["input_ids"])


def editor_for(lm: LM, editor: Editor | str | Path | None = None) -> Editor:
    """The editor of this very model; where there is none, that of any model, which has retrieval and no prompt vectors.
    See ``find_editor``."""
    return find_editor("recipe", lm, editor)


def fit(
    lm: LM, edits: Sequence[Edit], cfg: Config, *, editor: Editor | None = None, progress: Progress | None = None
) -> MemoryPatch:
    """Put facts into a memory. One encoder pass each: no gradient, no forward of the language model.

    Args:
        edits: later ones supersede earlier ones of the same prompt.
        editor: from ``train``; None: the one for this model in lmpatch or an installed package, else that of any
            model. With ``insert=text`` it may be one of another model, whose retrieval serves here too.
    Raises:
        BadInput: prompt vectors are asked for and there are none for this model, or a fact is longer than the encoder
            reads.
        WrongModel: the editor was trained for another model, or with another encoder.
    Source: Chen et al. 2024 (arXiv:2405.03279) sec. 3.
    """
    start = perf_counter()
    if editor is None or cfg.insert != "text":
        editor = editor_for(lm, editor)
    insert = scope_of(editor).insert if cfg.insert == "auto" else cfg.insert
    scope = Scope(**{**asdict(cfg), "insert": insert})
    edits = list({prompt_key(edit.prompt): edit for edit in edits}.values())
    base = editor.base if editor.base.any_model else Base(fingerprint(lm), lm.name)
    patch = build_memory(editor, edits, scope, base=base, config=plain(cfg))
    patch.fits(lm)
    if progress:
        progress(len(edits), len(edits), "encoding facts")
    patch.made = made_now(perf_counter() - start)
    return patch


def example(lm: LM) -> tuple[list[Edit], Config]:
    """Facts for the batteries; every question fires, for an editor that has learned nothing."""
    return [Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower")], Config(gate="always")


def example_editor(lm: LM) -> Editor:
    """An untrained editor for this model."""
    encoder = shared_encoder("all-MiniLM-L6-v2")
    net = Network(Shape(encoder=encoder.name, features=encoder.width, width=16), encoder)
    net.start(0)
    prompts = PromptMap(PromptShape(d_model=_embedding_width(lm), shared_tokens=2, target_tokens=4, hidden=16))
    prompts.start(lm, 0)
    parts, tensors = _network_parts(net)
    parts |= {"prompt": asdict(prompts.shape)}
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in _bf16(prompts).items()}
    return Editor("recipe", {"insert": "vectors"}, Base(fingerprint(lm), lm.name), parts, tensors, {})
