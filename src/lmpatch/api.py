"""The calls that take a name: ``fit`` or ``train`` with a method, run a ``probe``, run a ``bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .benches import facts as facts_bench
from .benches.core.runner import estimate, run
from .benches.facts import compare as contest
from .benches.facts import gate
from .benches.facts.advice import Comparison
from .config import parse, resolve
from .data.edits import Ask, Edit, read_asks
from .data.record import Record
from .errors import BadInput, Harmful
from .inference.plain_text import perplexity
from .models.lm import LM
from .models.load import require_lm
from .patches.editor import Editor, find_editor
from .patches.file import as_patch
from .patches.guard import check_harm
from .patches.ledger import applied
from .patches.patch import Mount, Patch
from .progress import Progress
from .registry import get, keywords, listing, taken
from .registry import method as find_method
from .resources import require_memory

PROBES = 2  # facts that are timed for the estimate of a check


def fit(
    lm: LM,
    method: str,
    edits: Record | Sequence[Any] | str | Path,
    *,
    text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None,
    editor: Editor | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Patch:
    """Make a patch that writes ``edits`` into the model, which stays as it was, to the bit.

    Args:
        method: a name from ``names("methods")``.
        edits: the facts of one commit, or whatever records the method reads (``ircan``: questions with contexts), or
            the path of a file of them; may be empty for methods that learn nothing, such as ``cad``.
        text: plain text for the covariance of activations that rome and memit need; each has its own default.
        anchors: facts outside the test set, for methods that measure on them first (memit's ``nas``).
        editor: from ``train``, for methods that have one; None: the one that comes with lmpatch for this model.
        out: folder of checkpoints, for methods that train for long. A run that is there goes on where it stopped.
        force: take a patch that ``Harmful`` would refuse.
        settings: fields of the method's ``Config``; the rest keep their defaults.
    Raises:
        Harmful: the patch multiplies the perplexity of plain text by more than 1.5.
        BadInput: no such method, no edits, an unknown setting, one of another type, or text where none is read.
        Contradiction: two edits ask for different answers to one prompt.
        NotEnoughMemory: the method's estimate is above what is free.
    """
    require_lm(lm)
    chosen = find_method(method)
    config, records = resolve(chosen.config, settings, method), _records(method, chosen.record, edits)
    if not records and chosen.needs_records:
        raise BadInput(f"{method} was given no edits. Give at least one.")
    if chosen.record:
        chosen.record.check(records)
    material = chosen.material({"text": text, "anchors": anchors, "editor": editor, "out": out})
    if chosen.estimate:
        require_memory(chosen.estimate(lm, len(records), config), lm.device, f"{method} with {len(records)} edits")
    with lm.lock:  # a patch of another thread goes on or off before or after
        patch: Patch = chosen.fit(lm, records, config, progress=progress, **material)
        if on := {one.patch.hash(): one.patch.method for one in applied(lm)}:
            patch.made["on"] = on
        check_harm(lm, patch, force=force)
    return patch


def _records(name: str, record: type[Record] | None, data: Any, limit: int | None = None) -> Sequence[Any]:
    """The records themselves, one alone as a list, or those of a file."""
    if isinstance(data, (str, Path)):
        if record is None:
            raise BadInput(f"nothing is read from {data} here. Leave it out.")
        return record.read(data, limit=limit)
    records = list(data) if isinstance(data, Iterable) else [data]
    if record and (wrong := [type(one).__name__ for one in records if not isinstance(one, record)]):
        raise BadInput(f"{name} reads {record.__name__} records, found {wrong[0]}. Give a list of them, or a file.")
    return records


def train(
    lm: LM,
    method: str,
    edits: Record | Sequence[Any] | str | Path,
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
    require_lm(lm)
    chosen = find_method(method)
    if chosen.train is None or chosen.training is None:
        raise BadInput(f"{method} learns nothing ahead of its edits. Call fit.")
    config, records = resolve(chosen.training, settings, method), _records(method, chosen.record, edits)
    extra = {"unrelated": unrelated or None, "encoder": encoder, "download": download or None}
    with lm.lock:
        editor: Editor = chosen.train(lm, chosen.training_data(records, extra), config, out=out, progress=progress)
    return editor


def probe(
    lm: LM,
    name: str,
    data: Record | Sequence[Any] | str | Path,
    *,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """Observe the model on data. The model is the same afterwards, to the bit.

    Args:
        name: a name from ``names("probes")``.
        data: records, or the path of a file of them, of which ``limit`` are read at most.
        out: a file that a long run writes as it goes, and goes on from; for probes that take one.
        settings: fields of the probe's ``Config``.
    Returns:
        the probe's own result; ``causal_trace`` gives one ``Trace`` a record, ``integrated_gradients`` ``Scores``.
    Raises:
        BadInput: no such probe, an unknown setting, or one of another type.
    """
    require_lm(lm)
    module = get("probes", name)
    config = resolve(module.Config, settings, name)
    records = _records(name, module.Record, data, limit)
    with lm.lock:
        return module.run(lm, records, config, progress=progress, **taken(name, keywords(module.run), {"out": out}))


def bench(
    lm: LM,
    name: str,
    data: Any,
    *,
    patch: Patch | str | Path | Sequence[Patch | str | Path] | None = None,
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
        patch: scored on all records; it, or the path of its folder. Several are put on in this order.
        method: makes the patches of each commit; ``method_settings``, ``text``, ``anchors``, ``editor`` as in ``fit``.
        limit: at most this many records of a file.
        unrelated: a file of questions that edits must leave alone.
        out: folder for rows and records. A run that is there already goes on where it stopped.
        settings: fields of the bench's ``Config``.
    Returns:
        the report: ``runs``, ``rows``, ``table()``, ``metrics()``, ``save_html(path)``, ``to_json()``, ``to_pandas()``.
    Raises:
        BadInput: no such bench, method or setting, a setting of another type, or both ``patch`` and ``method``.
        NotEnoughMemory: scoring would need more than is free.
    """
    if patch is not None and method is not None:
        raise BadInput("give either a patch or a method that makes patches, not both.")
    require_lm(lm)
    several: Any = patch if isinstance(patch, (list, tuple)) else [] if patch is None else [patch]
    patches = [as_patch(one) for one in several]
    module = get("benches", name)
    config = resolve(module.Config, settings, name)
    path = data if isinstance(data, (str, Path)) else None
    if path is not None:
        data = module.load(path, limit=limit, **taken(name, keywords(module.load), {"unrelated": unrelated}))
    data = [data] if isinstance(data, Record) else data
    material = {"text": text, "anchors": anchors, "editor": editor}
    makers = {"patch": patches} if method is None else _makers(method, dict(method_settings or {}), material)
    source = "" if path is None else Path(path).name
    return run(module, lm, data, config, mount=mount, data_name=source, out=out, progress=progress, **makers)


def check(
    lm: LM,
    patch: Patch | str | Path,
    facts: Record | Sequence[Any] | str | Path | None = None,
    *,
    mount: Mount | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    expect: Callable[[float, int], object] | None = None,
    **limits: Any,
) -> gate.Verdict:
    """Whether a patch may be given away: its facts and the probe pack asked, each number held against a limit.

    Args:
        facts: what the patch should have written, or the path of a file; None: the facts it holds. Where none of them
            names a question that must stay as it is, beginnings of everyday texts are asked in their place.
        limit: at most this many records of a file.
        out: folder for rows and records. A check that is there already goes on where it stopped.
        expect: hears, before the asking, how many seconds it will take about, and of how many facts.
        limits: fields of ``benches.facts.gate.Config``; a limit of None is not held.
    Returns:
        the verdict, which is true where the patch passed: ``lines``, ``missed``, and ``report`` with all numbers.
    Raises:
        BadInput: no facts, an unknown limit, or what ``bench`` refuses.
    """
    require_lm(lm)
    patch, config = as_patch(patch), resolve(gate.Config, limits, "check")
    if facts is not None:
        edits = list(_records("check", Edit, facts, limit))
    else:
        memory = getattr(patch, "memory", None)  # of a live one the facts are in its store
        edits = [fact.edit for fact in memory.store.facts()] if memory else gate.facts_of(patch.edits)
    edits, settings = gate.with_neighbours(edits), gate.settings(config)
    if expect and len(edits) > PROBES:  # fewer are asked as soon as their time is taken
        some = estimate(facts_bench, lm, edits[:PROBES], facts_bench.Config(**settings))
        count = min(len(edits), config.cases)
        expect(some.seconds / some.items * count, count)
    source = Path(facts).name if isinstance(facts, (str, Path)) else ""
    report = run(
        facts_bench, lm, edits, facts_bench.Config(**settings),
        patch=patch, mount=mount, data_name=source, out=out, progress=progress,
    )  # fmt: skip
    return gate.judge(report, config)


def compare(
    lm: LM,
    facts: Record | Sequence[Any] | str | Path,
    methods: Sequence[str] | None = None,
    *,
    editors: Sequence[Editor] = (),
    text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None,
    unrelated: str | Path | None = None,
    mount: Mount | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    expect: Callable[[list[contest.Expected]], object] | None = None,
    **settings: Any,
) -> Comparison:
    """Which editor should I take? Each writes all facts in one commit and is asked the same; the model is restored.

    Args:
        methods: names, settings of their own behind them: ``["rome", "memit solver=alphaedit"]``. None: every method
            that writes facts, as it comes.
        editors: from ``train``, for the methods that have one; others take what comes with lmpatch for this model.
        text, anchors: as in ``fit``, for the methods that read them.
        unrelated: a file of questions that edits must leave alone. Where no fact names a question that must stay as it
            is, beginnings of everyday texts are asked.
        limit: at most this many records of a file.
        out: folder for rows and patches. A comparison that is there goes on where it stopped.
        expect: hears, before the work, what each method will take; it costs writing two facts with each.
        settings: fields of ``benches.facts.compare.Config``.
    Returns:
        ``advice()``, ``tables()``, ``report`` with all numbers, and ``left_out``: who could not run, and why.
    Raises:
        BadInput: no facts, no such method or setting, or no method could write the facts.
        Contradiction: two facts ask for different answers to one prompt.
    """
    require_lm(lm)
    config = resolve(contest.Config, settings, "compare")
    edits = list(_records("compare", Edit, facts, limit))
    if not edits:
        raise BadInput("compare was given no facts. Give at least one.")
    Edit.check(edits)
    edits = facts_bench.with_unrelated(edits, read_asks(unrelated)) if unrelated else gate.with_neighbours(edits)
    who = entrants(lm, methods, editors=editors, text=text, anchors=anchors)
    if expect:
        told = contest.expected(lm, edits, who, config)
        expect(told)
        spent = {each.name: each.statistics for each in told}
        who = [replace(each, statistics=spent.get(each.name)) for each in who]
    source = Path(facts).name if isinstance(facts, (str, Path)) else ""
    with TemporaryDirectory() as folder, lm.lock:
        place = Path(folder if out is None else out)
        return Comparison(
            *contest.contest(lm, edits, who, config, place, mount=mount, data_name=source, progress=progress)
        )


def entrants(
    lm: LM,
    methods: Sequence[str] | None = None,
    *,
    editors: Sequence[Editor] = (),
    text: Sequence[str] | None = None,
    anchors: Sequence[Edit] | None = None,
    force: bool = False,
) -> list[contest.Entrant]:
    """Those that ``compare`` lets write, in its words.

    Args:
        force: take patches that ``Harmful`` would refuse.
    Raises:
        BadInput: no such method or setting, one named twice, or an editor of a method that is not among them.
    """
    if methods is None:
        listed = [each.name for each in listing("methods") if each.aim in ("facts", "")]  # "": of another package
        methods = [name for name in listed if find_method(name).record is Edit]
    if twice := {name for name in methods if list(methods).count(name) > 1}:
        raise BadInput(f"{twice.pop()!r} is named twice. Name each method once, or with settings of its own.")
    own = {editor.method: editor for editor in editors}
    if odd := own.keys() - {name.split()[0] for name in methods if name.split()}:
        raise BadInput(f"there is an editor of {odd.pop()}, which is not compared. Name it, or leave the editor out.")
    return [_entrant(lm, name, own, {"text": text, "anchors": anchors}, force) for name in methods]


def _entrant(
    lm: LM, name: str, editors: Mapping[str, Editor], material: Mapping[str, Any], force: bool
) -> contest.Entrant:
    method, *pairs = name.split() or [""]
    chosen = find_method(method)
    if chosen.record is not Edit:
        raise BadInput(f"{method} writes no facts. lmpatch methods lists those that do.")
    settings = parse(chosen.config, pairs, method)
    config = resolve(chosen.config, settings, method)
    given = {key: value for key, value in material.items() if value is not None and key in chosen.takes}
    editor, training = editors.get(method), None
    given |= {"editor": editor} if editor else {}
    if chosen.train:
        with suppress(BadInput):  # ``fit`` says it
            training = (editor or find_editor(method, lm)).made.get("seconds")
    estimate_of = chosen.estimate
    makers = _makers(method, settings, {key: given.get(key) for key in ("text", "anchors", "editor")})
    return contest.Entrant(
        name,
        make=lambda lm, edits: fit(lm, method, edits, **given, **settings, force=force),
        settings=makers["settings"],
        make_each=makers.get("make_each"),
        memory=(lambda lm, count: estimate_of(lm, count, config)) if estimate_of else None,
        training=training,
    )


def _makers(name: str, settings: dict[str, Any], material: dict[str, Any]) -> dict[str, Any]:
    """What a bench needs to make patches with a method: one commit at a time, or many single edits in one go."""
    chosen = find_method(name)
    config, given, each = resolve(chosen.config, settings, name), chosen.material(material), chosen.fit_each
    makers: dict[str, Any] = {"make": lambda lm, edits: fit(lm, name, edits, **material, **settings)}
    if each:
        makers["make_each"] = lambda lm, edits: _passed(lm, each(lm, edits, config, **given))
    return {**makers, "settings": asdict(config), "run_id": name}


def _passed(lm: LM, patches: Sequence[Patch]) -> list[Patch | Harmful]:
    """Each patch, or why it is refused."""
    before, passed = perplexity(lm), list[Patch | Harmful]()
    for patch in patches:
        try:
            check_harm(lm, patch, before=before)
            passed.append(patch)
        except Harmful as error:
            passed.append(error)
    return passed
