"""The calls that take a name: ``fit`` or ``train`` with a method, run a ``probe``, run a ``bench``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from .benches.core.runner import run
from .config import resolve
from .data.context import read_context
from .data.edit import Ask, Edit, check_contradictions
from .data.rag.reader import read_rag
from .data.readers import read_edits
from .errors import BadInput
from .models.lm import LM
from .patches.editor import Editor
from .patches.patch import Mount, Patch
from .progress import Progress
from .registry import get
from .resources import require_memory


def fit(
    lm: LM,
    method: str,
    edits: Sequence[Any],
    *,
    text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None,
    editor: Editor | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Patch:
    """Make a patch that writes ``edits`` into the model. The model itself stays as it was, to the bit.

    Args:
        method: a name from ``registry.names("methods")``.
        edits: the facts of one commit, or whatever records the method reads (``ircan``: questions with contexts); may
            be empty for methods that learn nothing, such as ``cad``.
        text: plain text for methods that take second moments; each has its own default.
        anchors: facts outside the test set, for methods that measure on them first (memit's ``nas``).
        editor: from ``train``, for methods that have one; None: the one that comes with lmpatch for this model.
        out: folder of checkpoints, for methods that train for long. A run that is there goes on where it stopped.
        progress: called with (done, total, what).
        settings: fields of the method's ``Config``; the rest keep their defaults.
    Raises:
        UnknownName: no such method.
        BadInput: no edits, an unknown setting or one of another type, or text for a method that reads none.
        Contradiction: two edits ask for different answers to one prompt.
        NotEnoughMemory: the method's estimate is above what is free.
    """
    module = get("methods", method)
    config = resolve(module.Config, settings)
    if not edits and needs_records(module):
        raise BadInput(f"{method} was given no edits. Give at least one.")
    if reads(module) == "edits":
        check_contradictions(edits)
    material = _material(module.fit, method, text=text, anchors=anchors, editor=editor, out=out)
    if hasattr(module, "estimate"):
        require_memory(module.estimate(lm, len(edits), config), lm.device, f"{method} with {len(edits)} edits")
    patch: Patch = module.fit(lm, edits, config, progress=progress, **material)
    return patch


def train(
    lm: LM,
    method: str,
    edits: Sequence[Edit],
    *,
    unrelated: Sequence[Ask] = (),
    out: str | Path | None = None,
    encoder: str | None = None,
    download: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Editor:
    """Train a method's editor: what it learns once and reuses for every later edit.

    Args:
        method: a method that has one, such as ``recipe``.
        edits: facts to learn editing from. The editor remembers none of them.
        unrelated: questions with answers that no fact touches.
        out: folder of checkpoint and curves. A run that is there goes on where it stopped.
        encoder: a sentence encoder; None: the method's default.
        download: an encoder named by a hub id may be fetched.
        settings: fields of the method's ``Training``.
    Raises:
        BadInput: the method has no editor, or as the method says.
    """
    module = get("methods", method)
    if not hasattr(module, "train"):
        raise BadInput(f"{method} learns nothing ahead of its edits. Call fit.")
    config = resolve(module.Training, settings)
    given = {} if encoder is None else {"encoder": encoder}
    editor: Editor = module.train(
        lm, edits, config, unrelated=unrelated, out=out, download=download, progress=progress, **given
    )
    return editor


def probe(
    lm: LM,
    name: str,
    data: Sequence[Any] | str | Path,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Observe the model on data. The model is the same afterwards, to the bit.

    Args:
        name: a name from ``names("probes")``.
        data: records, or the path of a file of them.
        limit: at most this many records of a file.
        out: a file that a long run writes as it goes, and goes on from; for probes that take one.
        settings: fields of the probe's ``Config``.
    Returns:
        the probe's own result; ``causal_trace`` gives one ``Trace`` a record, ``integrated_gradients`` ``Scores``.
    Raises:
        UnknownName: no such probe.
        BadInput: an unknown setting, or one of another type.
    """
    module = get("probes", name)
    config = resolve(module.Config, settings)
    records = read(module, data, limit=limit) if isinstance(data, (str, Path)) else data
    return module.run(lm, records, config, progress=progress, **_material(module.run, name, out=out))


def needs_records(module: ModuleType) -> bool:
    """Whether a method learns from records; one that only packs a rule says ``needs_records = False``."""
    return bool(getattr(module, "needs_records", True))


def reads(module: ModuleType) -> str:
    """The kind of records a method or probe takes: what its module says in ``reads``, else ``edits``."""
    kind: str = getattr(module, "reads", "edits")
    return kind


def read(module: ModuleType, path: str | Path, *, limit: int | None = None, check: bool = False) -> list[Any]:
    """The records of a file, as a method or probe takes them.

    Args:
        check: refuse facts that contradict each other.
    """
    if reads(module) == "context":
        return list(read_context(path, limit=limit))
    if reads(module) == "rag":
        return list(read_rag(path, limit=limit))
    return list(read_edits(path, limit=limit, check=check))


def bench(
    lm: LM,
    name: str,
    data: Any,
    *,
    patch: Patch | Sequence[Patch] | None = None,
    method: str | None = None,
    method_settings: Mapping[str, Any] | None = None,
    mount: Mount | None = None,
    limit: int | None = None,
    unrelated: str | Path | None = None,
    text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None,
    editor: Editor | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Measure the model on data beside its baselines: with a patch, with patches a method makes, or alone.

    Args:
        name: a name from ``names("benches")``.
        data: what the bench's ``load`` gives, or the path it reads: a file of facts, a folder of tasks for ``general``.
        patch: scored on all records. Several are put on in this order.
        method: makes the patches of each commit, with ``method_settings``, ``text``, ``anchors`` and ``editor`` as in
            ``fit``.
        limit: at most this many records of a file.
        unrelated: a file of questions that edits must leave alone.
        out: folder for rows and records. A run that is there already goes on where it stopped.
        settings: fields of the bench's ``Config``.
    Returns:
        the report: ``runs``, ``rows``, ``table()``, ``metrics()``, ``save_html(path)``, ``to_json()``, ``to_pandas()``.
    Raises:
        UnknownName: no such bench or method.
        BadInput: a setting that does not exist or has another type, or both ``patch`` and ``method``.
        NotEnoughMemory: scoring would need more than is free.
    """
    if patch is not None and method is not None:
        raise BadInput("give either a patch or a method that makes patches, not both.")
    module = get("benches", name)
    config = resolve(module.Config, settings)
    path = data if isinstance(data, (str, Path)) else None
    edits = (
        data if path is None else module.load(path, limit=limit, **_material(module.load, name, unrelated=unrelated))
    )
    makers: dict[str, Any] = {"patch": patch}
    if method is not None:
        makers = _makers(method, dict(method_settings or {}), {"text": text, "anchors": anchors, "editor": editor})
    source = "" if path is None else Path(path).name
    return run(module, lm, edits, config, mount=mount, data_name=source, out=out, progress=progress, **makers)


def _makers(method: str, settings: dict[str, Any], material: dict[str, Any]) -> dict[str, Any]:
    """What a bench needs to make patches with a method: one commit at a time, or many single edits in one go."""
    module = get("methods", method)
    config = resolve(module.Config, settings)
    given = _material(module.fit, method, **material)
    makers = {
        "make": lambda lm, edits: fit(lm, method, edits, **material, **settings),
        "settings": asdict(config),
        "run_id": method,
    }
    if hasattr(module, "fit_each"):
        makers["make_each"] = lambda lm, edits: module.fit_each(lm, edits, config, **given)
    return makers


def _material(function: Callable[..., Any], name: str, **given: Any) -> dict[str, Any]:
    """What was given, once it is certain that the function takes it."""
    known = inspect.signature(function).parameters
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in known:
            raise BadInput(f"{name} reads no {key}. Leave {key} out.")
    return given
