"""``lmpatch memory``: make a memory, change and search what it holds. Only ``create`` may need the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import BadInput
from .options import Device, Download, EditorFile, Partial, Source, arg, new_path, opt, out_option
from .screen import progress, say, table

if TYPE_CHECKING:
    from ..data.edits import Edit
    from ..memory.entry import Added, Entry
    from ..memory.memory import Memory
    from ..memory.store import Store

Folder = Annotated[Path, arg("STORE", "The folder of a memory.")]
History = Annotated[bool, opt("Also facts that no longer hold, with what ended them.", None, "--history")]

Told = Annotated[str, opt("Where facts come from, kept with them.", "TEXT")]
AsOf = Annotated[str, opt("The facts of this moment, as 2024-05-31 or 2024-05-31T12:00+02:00.", "DATE", "--as-of")]
Supersede = Annotated[
    bool, opt("Also retire the facts that a new one contradicts in other words.", None, "--supersede")
]
SHOWN = 10  # contradictions of a file that are shown


def create(
    store: Annotated[Path, arg("STORE", "The folder to make. It must not exist yet.", callback=new_path)],
    model: Annotated[str | None, arg("[MODEL]", "For this model. Without one: for any model, facts as text.")] = None,
    method: Annotated[
        str, opt("recipe: trained retrieval, and prompt vectors where the model has some. rag: the plain baseline.")
    ] = "recipe",
    editor: EditorFile = None,
    device: Device = "auto",
    download: Download = False,
    partial: Partial = False,
) -> None:
    """Make an empty memory with the editor that will encode its facts.

    lmpatch memory create store gemma-3-270m
    lmpatch memory create store
    lmpatch memory create store --editor recipe.safetensors
    """
    from .. import registry
    from ..memory.memory import Memory
    from ..patches.editor import find_editor, load_editor

    if editor is not None and model is not None:
        raise BadInput("give either a model, whose packaged editor is taken, or --editor FILE.")
    if editor is not None:
        chosen = load_editor(editor)
    elif model is None:
        chosen = find_editor(method, None)
    elif (editor_for := registry.method(method).editor_for) is None:
        raise BadInput(f"{method} keeps no facts in a memory. Use --method recipe or rag.")
    else:
        chosen = editor_for(Source(model, "bfloat16", device, download, partial).open())
    Memory.create(store, chosen)
    say(f"{store}: an empty memory for {chosen.base.name}", path=store, base=chosen.base.name)


def add(
    store: Folder,
    prompt: Annotated[str, arg("PROMPT", 'The beginning of a sentence: "The Eiffel Tower is in".')],
    target: Annotated[str, arg("TARGET", 'How the model shall continue it: "Rome".')],
    source: Told = "",
    subject: Annotated[str, opt("What the fact is about, as the prompt has it.", "TEXT")] = "",
    valid_from: Annotated[str, opt("Since when it holds.", "DATE", "--valid-from")] = "",
    valid_to: Annotated[str, opt("From when on it no longer holds.", "DATE", "--valid-to")] = "",
    supersede: Supersede = False,
) -> None:
    """Add a fact. If the prompt is there already, the new target supersedes the old one.

    What it contradicts in other words is shown, and retired with --supersede.

    lmpatch memory add store "The Eiffel Tower is in" Rome --source "ticket 4711" --valid-from 2024-05-31
    """
    from ..data.dates import overlap
    from ..data.edits import Edit

    opened = _memory(store)
    edit = Edit(prompt, target, subject, valid_from=valid_from, valid_to=valid_to)
    old = [entry.edit.target for entry in opened.store.beside([prompt])[0] if overlap(entry.edit.span, edit.span)]
    added = opened.add([edit], source={"told": source} if source else None, supersede=supersede)
    text, rows = _contradicted(added)
    begin = f"version {added}" + (f", in place of {', '.join(map(repr, old))}" if old else "")
    _say(begin, opened, added, text, conflicts=rows)


def import_(
    store: Folder,
    facts: Annotated[list[Path], arg("FACTS...", "Files as lmpatch fit reads them.")],
    source: Told = "",
    supersede: Supersede = False,
) -> None:
    """Add the facts of files, each file as one version. Later facts supersede earlier ones of the same prompt.

    What they contradict in other words is shown, and retired with --supersede.

    lmpatch memory import store facts.jsonl
    """
    from ..data.edits import read_edits

    opened, told, conflicts = _memory(store), {"told": source} if source else {}, []
    with progress() as bar:
        for path, edits in [(path, read_edits(path)) for path in facts]:
            added = opened.add(edits, source={"file": path.name} | told, supersede=supersede, progress=bar)
            text, rows = _contradicted(added)
            conflicts += rows
            _say(f"{path}: {len(edits)} facts, version {added}", opened, added, text, conflicts=conflicts)


def search(
    store: Folder,
    questions: Annotated[list[str], arg("QUESTION...", "What a model may be asked.")],
    count: Annotated[int, opt("Facts shown for each.", "N", "-k", min=1)] = 1,
    as_of: AsOf = "",
) -> None:
    """The facts nearest to a question, and whether they would be used: those that score above sentinel or threshold and
    that the question asks for.

    lmpatch memory search store "Where is the Eiffel Tower?" -k 3
    """
    from dataclasses import replace

    opened = _memory(store)
    scope = replace(opened.scope, top_k=count)
    finder = opened.patch(scope, as_of=as_of).finder()
    rows = [
        (q, " ".join(finder.facts.fact(hit.place)), f"{hit.score:.2f}", f"{hit.gate:.2f}", hit.told)
        for q in questions
        for hit in finder.search([q])[0]
    ]
    table(["question", "fact", "score", "sentinel" if scope.gate == "sentinel" else "threshold", "used"], rows)


def list_(
    store: Folder,
    history: History = False,
    at: Annotated[int | None, opt("As it was after this version.", "VERSION", min=0)] = None,
    limit: Annotated[int | None, opt("At most this many, the newest.", "N", min=1)] = None,
    as_of: AsOf = "",
) -> None:
    """The facts that hold, oldest first, with those whose time is over or to come.

    lmpatch memory list store --limit 10
    lmpatch memory list store --history --at 7
    lmpatch memory list store --as-of 2024-05-31
    """
    _show(_open(store).facts(history=history, version=at, as_of=as_of or None), history, limit)


def find(
    store: Folder,
    text: Annotated[str, arg("TEXT", "A part of a prompt, subject or target, in any case.")],
    history: History = False,
    as_of: AsOf = "",
) -> None:
    """The facts that mention a text.

    lmpatch memory find store "eiffel tower" --history
    """
    _show(_open(store).find(text, history=history, as_of=as_of or None), history)


def drop(
    store: Folder, prompts: Annotated[list[str], arg("PROMPT...", "Whole prompts, as `list` shows them.")]
) -> None:
    """End facts. Their past stays, and `rollback` brings them back.

    lmpatch memory drop store "The Eiffel Tower is in"
    """
    opened = _open(store)
    version = opened.drop(prompts)
    _say(f"version {version}", opened, version)


def versions(store: Folder) -> None:
    """Every commit: what it wrote and dropped, and how many facts held after it.

    lmpatch memory versions store
    """
    rows = [(v.number, v.time, v.put, v.dropped, v.live) for v in _open(store).versions()]
    table(["version", "time", "written", "dropped", "facts"], rows)


def rollback(store: Folder, version: Annotated[int, arg("VERSION", "A number from `versions`; 0 is empty.")]) -> None:
    """Let hold what held after a version. This makes a new version, so it can be undone in the same way.

    lmpatch memory rollback store 7
    """
    opened = _open(store)
    new = opened.rollback(version)
    _say(f"version {new}", opened, new, f", as after version {version}")


def compact(store: Folder) -> None:
    """Join small files and remove what killed writers left. No fact and no version is lost.

    lmpatch memory compact store
    """
    from ..resources import format_bytes

    def size() -> int:
        return sum(file.stat().st_size for file in store.rglob("*") if file.is_file())

    opened, before = _open(store), size()
    opened.compact()
    after = size()
    say(f"{store}: {format_bytes(before)} before, {format_bytes(after)} now", bytes_before=before, bytes=after)


def export(
    store: Folder,
    out: Annotated[Path, out_option("FILE", "The JSONL file to write. It must not exist yet.")],
    as_of: AsOf = "",
) -> None:
    """Write the facts that hold as a facts file, which `lmpatch fit` reads.

    lmpatch memory export store -o facts.jsonl
    """
    facts = _open(store).export(out, as_of=as_of or None)
    say(f"{facts} facts written to {out}", facts=facts, path=out)


COMMANDS: dict[str, Callable[..., None]] = {
    "create": create, "add": add, "import": import_, "search": search, "list": list_, "find": find, "drop": drop,
    "versions": versions, "rollback": rollback, "compact": compact, "export": export,
}  # fmt: skip
HELP = """Facts kept in a folder, which goes wherever a patch does.

lmpatch memory create store gemma-3-270m
lmpatch memory import store facts.jsonl
lmpatch ask gemma-3-270m -p store "The Eiffel Tower is in"
"""


def _open(path: Path) -> Store:
    from ..memory.store import Store

    return Store.open(path)


def _memory(path: Path) -> Memory:
    from ..memory.memory import Memory

    return Memory.open(path)


def _show(entries: Sequence[Entry], history: bool, limit: int | None = None) -> None:
    """A line a fact, the newest of them; when it was added is for ``--json``."""
    rows, lines = [], []
    for e in entries if limit is None else entries[-limit:]:
        state = {"state": e.state} if history else {}
        row = {"version": e.version, "added": e.added, "prompt": e.edit.prompt, "target": e.edit.target}
        more = {"valid_from": e.edit.valid_from, "valid_to": e.edit.valid_to, "source": e.origin}
        rows.append(row | state | {name: text for name, text in more.items() if text})
        told = [*state.values(), _time(e.edit), f"({e.origin})" if e.origin else ""]
        lines.append("  ".join([f"{e.version:>4}", f"{e.edit.prompt} -> {e.edit.target}", *filter(None, told)]))
    say("\n".join(lines) or "no facts", rows=rows)


def _time(edit: Edit) -> str:
    words = zip(("from", "to"), edit.span, strict=True)
    return " ".join(f"{word} {text}" for word, text in words if text)


def _contradicted(added: Added) -> tuple[str, list[dict[str, object]]]:
    """What new facts contradict: in other words as lines, each after a line break, and all of it for ``--json``."""
    from ..data.edits import prompt_key

    rows: list[dict[str, object]] = [
        {"prompt": c.new.prompt, "target": c.new.target, "old_prompt": c.old.prompt, "old_target": c.old.target,
         "version": c.version, "superseded": c.superseded}
        for c in added.conflicts
    ]  # fmt: skip
    other = [c for c in added.conflicts if prompt_key(c.new.prompt) != prompt_key(c.old.prompt)]
    lines = [
        f"{c.new.prompt} -> {c.new.target}  {'supersedes' if c.superseded else 'contradicts'}  "
        f"{c.old.prompt} -> {c.old.target}"
        for c in other[:SHOWN]
    ]
    lines += [f"... and {len(other) - SHOWN} more"] * (len(other) > SHOWN)
    if not all(c.superseded for c in other):
        lines.append("Both hold. --supersede would retire the older one; `lmpatch memory drop` ends either.")
    return "".join(f"\n{line}" for line in lines), rows


def _say(text: str, store: Store | Memory, version: int, end: str = "", **values: object) -> None:
    say(f"{text}, facts that hold: {len(store)}{end}", version=version, facts=len(store), **values)
