"""``lmpatch memory``: make a memory, change and search what it holds. Only ``create`` may need the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import BadInput
from .options import Device, Download, EditorFile, Partial, Source, arg, new_path, opt, out_option
from .screen import progress, say, table

if TYPE_CHECKING:
    from ..memory.entry import Entry
    from ..memory.memory import Memory
    from ..memory.store import Store

Folder = Annotated[Path, arg("STORE", "The folder of a memory.")]
History = Annotated[bool, opt("Also facts that no longer hold, with what ended them.", None, "--history")]

Told = Annotated[str, opt("Where facts come from, kept with them.", "TEXT")]


def create(
    store: Annotated[Path, arg("STORE", "The folder to make. It must not exist yet.", callback=new_path)],
    model: Annotated[str | None, arg("[MODEL]", "Take the editor that comes with lmpatch for this model.")] = None,
    method: Annotated[
        str, opt("recipe: a trained editor's prompt vectors. rag: facts as text, for any model.")
    ] = "recipe",
    editor: EditorFile = None,
    device: Device = "auto",
    download: Download = False,
    partial: Partial = False,
) -> None:
    """Make an empty memory with the editor that will encode its facts.

    lmpatch memory create store gemma-3-270m
    lmpatch memory create store ./my-model --method rag
    lmpatch memory create store --editor recipe.safetensors
    """
    from .. import registry
    from ..memory.memory import Memory
    from ..patches.editor import load_editor

    if editor is not None and model is None:
        chosen = load_editor(editor)
    elif editor is not None or model is None:
        raise BadInput("give either a model, whose packaged editor is taken, or --editor FILE.")
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
) -> None:
    """Add a fact. If the prompt is there already, the new target supersedes the old one.

    lmpatch memory add store "The Eiffel Tower is in" Rome --source "ticket 4711"
    """
    from ..data.edits import Edit

    opened = _memory(store)
    old = opened.store.get(prompt)
    version = opened.add([Edit(prompt, target)], source={"told": source} if source else None)
    _say(f"version {version}" + (f", in place of {old.edit.target!r}" if old else ""), opened, version)


def import_(
    store: Folder,
    facts: Annotated[list[Path], arg("FACTS...", "Files as lmpatch fit reads them.")],
    source: Told = "",
) -> None:
    """Add the facts of files, each file as one version. Later facts supersede earlier ones of the same prompt.

    lmpatch memory import store facts.jsonl
    """
    from ..data.edits import read_edits

    opened, told = _memory(store), {"told": source} if source else {}
    with progress() as bar:
        for path, edits in [(path, read_edits(path)) for path in facts]:
            version = opened.add(edits, source={"file": path.name} | told, progress=bar)
            _say(f"{path}: {len(edits)} facts, version {version}", opened, version)


def search(
    store: Folder,
    questions: Annotated[list[str], arg("QUESTION...", "What a model may be asked.")],
    count: Annotated[int, opt("Facts shown for each.", "N", "-k", min=1)] = 1,
) -> None:
    """The facts nearest to a question, and whether they would be used: those that score above sentinel or threshold.

    lmpatch memory search store "Where is the Eiffel Tower?" -k 3
    """
    from dataclasses import replace

    opened = _memory(store)
    scope = replace(opened.scope, top_k=count)
    finder = opened.patch(scope).finder()
    rows = [
        (q, " ".join(finder.facts.fact(hit.place)), f"{hit.score:.2f}", f"{hit.gate:.2f}", "yes" if hit.fired else "no")
        for q in questions
        for hit in finder.search([q])[0]
    ]
    table(["question", "fact", "score", "sentinel" if scope.gate == "sentinel" else "threshold", "used"], rows)


def list_(
    store: Folder,
    history: History = False,
    at: Annotated[int | None, opt("As it was after this version.", "VERSION", min=0)] = None,
    limit: Annotated[int | None, opt("At most this many, the newest.", "N", min=1)] = None,
) -> None:
    """The facts that hold, oldest first.

    lmpatch memory list store --limit 10
    lmpatch memory list store --history --at 7
    """
    _show(_open(store).facts(history=history, version=at), history, limit)


def find(
    store: Folder,
    text: Annotated[str, arg("TEXT", "A part of a prompt, subject or target, in any case.")],
    history: History = False,
) -> None:
    """The facts that mention a text.

    lmpatch memory find store "eiffel tower" --history
    """
    _show(_open(store).find(text, history=history), history)


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
    store: Folder, out: Annotated[Path, out_option("FILE", "The JSONL file to write. It must not exist yet.")]
) -> None:
    """Write the facts that hold as a facts file, which `lmpatch fit` reads.

    lmpatch memory export store -o facts.jsonl
    """
    facts = _open(store).export(out)
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
        rows.append({"version": e.version, "added": e.added, "prompt": e.edit.prompt, "target": e.edit.target} | state)
        lines.append("  ".join([f"{e.version:>4}", f"{e.edit.prompt} -> {e.edit.target}", *state.values()]))
    say("\n".join(lines) or "no facts", rows=rows)


def _say(text: str, store: Store | Memory, version: int, end: str = "") -> None:
    say(f"{text}, facts that hold: {len(store)}{end}", version=version, facts=len(store))
