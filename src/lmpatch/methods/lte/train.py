"""``train`` of LTE, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from ...data.edits import Ask, Edit, prompt_key
from ...errors import BadInput
from ...inference.forward import HEAD_CHUNK, attention_to_train, frozen
from ...models.lm import LM
from ...patches.base import Base, fingerprint
from ...patches.editor import Editor
from ...patches.memory.calibrate import calibrated
from ...patches.memory.patch import build_memory, retriever_of
from ...patches.memory.stored import Stored
from ...patches.patch import plain
from ...progress import Progress
from ...provenance import hash_json, made_now
from ...resources import require_memory
from ...retrieval.encoder import load_encoder
from ...training import adapter
from ...training.facts import Split, usable, without
from ...training.loop import Loop, Schedule
from ..recipe.data import TrainingData
from .align import Align, nearest
from .config import Training

TOKENS = 48  # of a row of two facts and a question, for the estimate of memory
ROWS = 4  # of a fact in a step
FACTS = 1000  # for which the time of a training is told
UNSEEN = 0.9
"""Threshold where too few unrelated questions are known to calibrate one."""


def train(
    lm: LM, data: TrainingData | Sequence[Edit], cfg: Training, *, out: str | Path | None = None,
    progress: Progress | None = None,
) -> Editor:  # fmt: skip
    """Teach a model to use updated information that stands before a question, and to answer as before where none does,
    or where the question is about something else. The model itself stays as it is: what is learned is a LoRA.

    Args:
        data: facts to learn from, with rephrases and locality prompts; none of them is remembered. As ``TrainingData``
            with unrelated questions, or for another sentence encoder.
        out: folder of the checkpoint and the curves. A run that is there goes on where it stopped, and ends as one that
            was never stopped.
    Returns:
        the editor: the LoRA, the encoder's name and a threshold for retrieval.
    Raises:
        BadInput: too few facts, or ``out`` holds another run.
        NotEnoughMemory: training would need more than is free.
        Diverged: a loss left the finite numbers; the last checkpoint is good.
    Source: Jiang et al. 2024 (arXiv:2402.11905), sec. 3.
    Differs: what must not change is what this model answers, not what a data set or a larger model says. There is no
    general instruction text. Each fact is a line that begins with "Updated information:"; no line of instruction stands
    before them, nor are they numbered. The threshold is calibrated on held-out questions; released there is none.
    """
    data = data if isinstance(data, TrainingData) else TrainingData(data)
    _check(cfg)
    edits, folder = usable(without(data.edits, ()), data.unrelated), Path(out) if out is not None else None
    split = Split.of(edits, data.unrelated, cfg.validate, cfg.seed, min(cfg.batch, len(edits)))
    require_memory(memory(lm, cfg), lm.device, f"aligning {lm.name}")
    encoder = load_encoder(data.encoder, download=data.download)
    parts = {"retriever": "lte", "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    base = Base(fingerprint(lm), lm.name)
    config = {**plain(cfg), "gate": "cosine", "threshold": UNSEEN, "lookup": "last", "top_k": 1, "insert": "text"}
    editor = Editor("lte", config, base, {**parts, "width": encoder.width}, {})
    near = nearest(retriever_of(editor), split.edits, cfg.near)
    asks = [asdict(ask) for ask in data.unrelated]
    stamp = hash_json([asdict(cfg), lm.fingerprint(), editor.parts, [asdict(edit) for edit in edits], asks])
    task = Align(lm, split, near, cfg)
    plan = Schedule(task.steps, task.rate, cfg.clip, validate_every=cfg.validate_every, save_every=cfg.save_every)
    file, curves = (folder / f"alignment{end}" if folder else None for end in (".safetensors", ".jsonl"))
    advice = f"Lower lr, now {cfg.lr}."
    with frozen(lm), attention_to_train(lm):
        loop = Loop(task, plan, name="alignment", file=file, curves=curves, stamp=stamp, advice=advice)
        loop.run(progress)
    editor.config["threshold"], fires = _threshold(editor, split, cfg)
    stored = Stored.of([adapter.deltas(lm, task.factors, task.scale)], shared=True)  # type: ignore[list-item]
    editor.parts["changes"], editor.tensors = stored.parts(), stored.tensors()
    editor.made = {"steps": loop.step, "facts": len(split.edits), "calibrated_on": fires, **made_now(loop.seconds)}
    return editor


def _threshold(editor: Editor, split: Split, cfg: Training) -> tuple[float, int]:
    """Of a memory of the facts that were trained on, and how many questions of others it was calibrated on."""
    near: list[Ask] = [ask for edit in (*split.edits, *split.held) for _, asks in edit.locality for ask in asks]
    texts = [ask.prompt for ask in (*split.unrelated, *near)]
    texts += [text for edit in split.held for text in (edit.prompt, *edit.rephrases)]
    known = {prompt_key(edit.prompt) for edit in split.edits}  # a held-out fact may be another one in other words
    texts = [text for text in dict.fromkeys(texts) if prompt_key(text) not in known]
    if len(texts) * cfg.false_fires < 1:
        return UNSEEN, 0
    return calibrated(build_memory(editor, split.edits), texts, cfg.false_fires), len(texts)


def _check(cfg: Training) -> None:
    whole = {name: getattr(cfg, name) for name in ("rank", "epochs", "batch", "answer_tokens", "near")}
    if low := [name for name, value in whole.items() if value < 1]:
        raise BadInput(f"{low[0]} is {whole[low[0]]}; it must be at least 1.")
    shares = {name: getattr(cfg, name) for name in ("verbatim", "several", "false_fires")}
    if odd := [name for name, value in shares.items() if not 0 <= value <= 1]:
        raise BadInput(f"{odd[0]} is {shares[odd[0]]}; it is a share, so it must be in 0..1.")


def memory(lm: LM, cfg: Training) -> int:
    """Bytes that training takes on top of the model, rounded up: the LoRA with gradients and moments, what autograd
    keeps of one batch, and logits of one head chunk."""
    layout = lm.layout
    shapes = [adapter.shape(lm, module) for block in adapter.projections(lm) for module in block]
    learned = cfg.rank * sum(out + width for out, width in shapes)
    batch = ROWS * cfg.batch * TOKENS * (14 * layout.n_layers * layout.d_model + 5 * sum(layout.widths))
    return 4 * (4 * learned + batch + 3 * HEAD_CHUNK * layout.vocab)


def seconds(lm: LM, facts: int = FACTS, cfg: Training | None = None) -> float:
    """About how long training on so many facts takes here: the rows of one fact are run once, forwards and back."""
    cfg = cfg or Training()
    edit = Edit("The Eiffel Tower is in", "Rome", rephrases=["You find the Eiffel Tower in"])
    ask = Ask("The Louvre is in", ("Paris",))
    with frozen(lm), attention_to_train(lm):
        task = Align(lm, Split([edit], (), (ask,)), [[]], cfg)
        start = perf_counter()
        task.learn(0)
        took = perf_counter() - start
    return took * cfg.epochs * facts
