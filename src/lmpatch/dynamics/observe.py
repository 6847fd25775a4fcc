"""``audit`` and ``diff``: what a user calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config import resolve
from ..data.lines import read_text
from ..errors import BadInput
from ..files import replacing
from ..models.lm import LM
from ..models.load import require_lm
from ..patches.file import as_patch
from ..patches.ledger import apply
from ..patches.patch import Mount, Patch
from ..progress import Progress
from . import audit as numbers
from . import diff as moves
from . import losses as reading
from .audit import Audit, by_frequency
from .counts import Counts, count
from .diff import Diff, compare
from .losses import Losses, measure

Text = Sequence[str] | str | Path


@dataclass(frozen=True)
class Config(reading.Config, moves.Config):
    """Everything that can be set, of reading and of what is made of it."""

    def part(self, of: type[Any]) -> Any:
        """The settings of one step."""
        return of(**{field.name: getattr(self, field.name) for field in fields(of)})


def audit(
    lm: LM,
    text: Text,
    *,
    reference: Text | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Audit:
    """Losses of a model's tokens by how frequent they are. The model is the same afterwards, to the bit.

    Args:
        text: documents, or a file of them (``.txt`` by paragraphs, ``.jsonl`` with ``text``).
        reference: where frequency is counted: the training corpus, or any large one; None: the text itself.
        limit: read at most so many documents.
        out: a folder for ``losses.safetensors``, ``audit.json`` and ``audit.png``; what is there is gone on from.
        settings: fields of ``dynamics.observe.Config``.
    Raises:
        BadInput: no text, a setting out of range, or ``out`` of another model or text.
    """
    require_lm(lm)
    cfg = resolve(Config, settings, "audit")
    cfg.check()
    folder = _folder(out)
    losses = _measured(lm, _documents(text, limit), cfg, folder, "losses", progress)
    found = by_frequency(losses, _counts(lm, reference), cfg.part(numbers.Config))
    if folder:
        _save(found, folder, "audit")
    return found


def diff(
    lm: LM,
    other: LM | Patch | str | Path,
    text: Text,
    *,
    mount: Mount | None = None,
    reference: Text | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Diff:
    """What another model loses beside this one, or this one with a patch, token by token. ``failures`` says whether it
    passes a gate.

    Args:
        other: a model with the same tokenizer, a patch, or its folder.
        mount: how the patch is put on; None: the first that fits.
        text, reference, limit, settings: as in ``audit``.
        out: a folder for ``a.safetensors``, ``b.safetensors``, ``diff.json`` and ``diff.png``.
    Raises:
        BadInput: as in ``audit``; or the tokenizers differ.
    """
    require_lm(lm)
    cfg = resolve(Config, settings, "diff")
    cfg.check()
    folder, documents = _folder(out), _documents(text, limit)
    a = _measured(lm, documents, cfg, folder, "a", progress)
    if isinstance(other, LM):
        b = _measured(other, documents, cfg, folder, "b", progress)
    else:
        with apply(lm, as_patch(other), mount):
            b = _measured(lm, documents, cfg, folder, "b", progress)
    found = compare(
        a, b, _counts(lm, reference), cfg.part(moves.Config), written=lambda token: str(lm.tokenizer.decode([token]))
    )
    if folder:
        _save(found, folder, "diff")
    return found


def _documents(text: Text, limit: int | None) -> list[str]:
    found = read_text(text, limit=limit) if isinstance(text, (str, Path)) else list(text)[:limit]
    if not found or not all(isinstance(each, str) for each in found):
        raise BadInput("the text is a list of documents, or the path of a file of them. Give at least one document.")
    return found


def _counts(lm: LM, reference: Text | None) -> Counts | None:
    if reference is None:
        return None
    source = Path(reference).name if isinstance(reference, (str, Path)) else "a reference corpus"
    return count(lm, _documents(reference, None), source)


def _measured(
    lm: LM, documents: list[str], cfg: Config, folder: Path | None, name: str, progress: Progress | None
) -> Losses:
    out = folder / f"{name}.safetensors" if folder else None
    return measure(lm, documents, cfg.part(reading.Config), out=out, progress=progress)


def _folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _save(found: Audit | Diff, folder: Path, name: str) -> None:
    with replacing(folder / f"{name}.json") as work:
        work.write_text(json.dumps(found.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    found.plot(folder / f"{name}.png")
