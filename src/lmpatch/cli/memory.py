"""``lmpatch memory``: make a memory, change and search what it holds. Only ``create`` may need the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput
from .options import Device, Download, EditorFile, new_path, open_model
from .screen import progress, say, table

if TYPE_CHECKING:
    from ..memory.entry import Entry
    from ..memory.memory import Memory
    from ..memory.store import Store

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="The folder of a memory.")]
History = Annotated[bool, typer.Option("--history", help="Also facts that no longer hold, with what ended them.")]


def create(
    store: Folder,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Take the editor that comes with lmpatch for this model.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="recipe: a trained editor's prompt vectors. rag: facts as text, for any model.")
    ] = "recipe",
    editor: EditorFile = None,
    device: Device = "auto",
    download: Download = False,
) -> None:
    """Make an empty memory with the editor that will encode its facts.

    \b
    Examples:
      lmpatch memory create store gemma-3-270m
      lmpatch memory create store ./my-model --method rag
      lmpatch memory create store --editor recipe.safetensors
    """
    from ..memory.memory import Memory
    from ..patches.editor import load_editor

    if (model is None) == (editor is None):
        raise BadInput("give either a model, whose packaged editor is taken, or --editor FILE.")
    new_path(store)
    if editor is not None:
        chosen = load_editor(editor)
    else:
        from .. import registry

        editor_for = registry.method(method).editor_for
        if editor_for is None:
            raise BadInput(f"{method} keeps no facts in a memory. Use --method recipe or rag.")
        chosen = editor_for(open_model(str(model), "bfloat16", device, download))
    Memory.create(store, chosen)
    say(f"{store}: an empty memory for {chosen.base.name}", path=store, base=chosen.base.name)


def add(
    store: Folder,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="A sentence without its end.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Its new end.")],
    source: Annotated[str, typer.Option(metavar="TEXT", help="Where the fact comes from, kept with it.")] = "",
) -> None:
    """Add a fact. If the prompt is there already, the new target supersedes the old one.

    \b
    Example:
      lmpatch memory add store "The Eiffel Tower is in" Rome --source "ticket 4711"
    """
    from ..data.edits import Edit

    opened = _memory(store)
    old = opened.store.get(prompt)
    version = opened.add([Edit(prompt, target)], source={"told": source} if source else None)
    instead = f", in place of {old.edit.target!r}" if old else ""
    say(f"version {version}{instead}, facts that hold: {len(opened)}", version=version, facts=len(opened))


def import_(
    store: Folder,
    facts: Annotated[list[Path], typer.Argument(metavar="FACTS...", help="Files as lmpatch fit reads them.")],
) -> None:
    """Add the facts of files, each file as one version. Later facts supersede earlier ones of the same prompt.

    \b
    Example:
      lmpatch memory import store facts.jsonl
    """
    from ..data.edits import read_edits

    opened = _memory(store)
    read = [(path, read_edits(path)) for path in facts]
    with progress() as bar:
        for path, edits in read:
            version = opened.add(edits, source={"file": path.name}, progress=bar)
            say(
                f"{path}: {len(edits)} facts, version {version}, facts that hold: {len(opened)}",
                version=version,
                facts=len(opened),
            )


def search(
    store: Folder,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="What a model may be asked.")],
    count: Annotated[int, typer.Option("-k", min=1, metavar="N", help="Facts shown for each.")] = 1,
) -> None:
    """The facts nearest to a question, and whether they would be used: those that score above sentinel or threshold.

    \b
    Example:
      lmpatch memory search store "Where is the Eiffel Tower?" -k 3
    """
    from dataclasses import replace

    opened = _memory(store)
    scope = replace(opened.scope, top_k=count)
    finder = opened.patch(scope).finder()
    rows = [
        (question, " ".join(finder.facts.fact(hit.place)), f"{hit.score:.2f}", f"{hit.gate:.2f}",
         "yes" if hit.fired else "no")
        for question, found in ((q, finder.search([q])[0]) for q in questions) for hit in found
    ]  # fmt: skip
    table(["question", "fact", "score", "sentinel" if scope.gate == "sentinel" else "threshold", "used"], rows)


def list_(
    store: Folder,
    history: History = False,
    at: Annotated[int | None, typer.Option(metavar="VERSION", min=0, help="As it was after this version.")] = None,
) -> None:
    """The facts that hold, oldest first.

    \b
    Examples:
      lmpatch memory list store
      lmpatch memory list store --history --at 7
    """
    _show(_open(store).facts(history=history, version=at), history)


def find(
    store: Folder,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="A part of a prompt, subject or target, in any case.")],
    history: History = False,
) -> None:
    """The facts that mention a text.

    \b
    Example:
      lmpatch memory find store "eiffel tower" --history
    """
    _show(_open(store).find(text, history=history), history)


def drop(
    store: Folder,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Whole prompts, as `list` shows them.")],
) -> None:
    """End facts. Their past stays, and `rollback` brings them back.

    \b
    Example:
      lmpatch memory drop store "The Eiffel Tower is in"
    """
    opened = _open(store)
    version = opened.drop(prompts)
    say(f"version {version}, facts that hold: {len(opened)}", version=version, facts=len(opened))


def versions(store: Folder) -> None:
    """Every commit: what it wrote and dropped, and how many facts held after it.

    \b
    Example:
      lmpatch memory versions store
    """
    rows = [(v.number, v.time, v.put, v.dropped, v.live) for v in _open(store).versions()]
    table(["version", "time", "written", "dropped", "facts"], rows)


def rollback(
    store: Folder,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="A number from `versions`; 0 is empty.")],
) -> None:
    """Let hold what held after a version. This makes a new version, so it can be undone in the same way.

    \b
    Example:
      lmpatch memory rollback store 7
    """
    opened = _open(store)
    new = opened.rollback(version)
    text = f"version {new}, facts that hold: {len(opened)}, as after version {version}"
    say(text, version=new, facts=len(opened))


def compact(store: Folder) -> None:
    """Join small files and remove what killed writers left. No fact and no version is lost.

    \b
    Example:
      lmpatch memory compact store
    """
    from ..resources import format_bytes

    before = _bytes(store)
    _open(store).compact()
    after = _bytes(store)
    say(f"{store}: {format_bytes(before)} before, {format_bytes(after)} now", bytes_before=before, bytes=after)


def export(
    store: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="The JSONL file to write.")],
) -> None:
    """Write the facts that hold as a facts file, which `lmpatch fit` reads.

    \b
    Example:
      lmpatch memory export store -o facts.jsonl
    """
    facts = _open(store).export(new_path(out))
    say(f"{facts} facts written to {out}", facts=facts, path=out)


COMMANDS: dict[str, Callable[..., None]] = {
    "create": create, "add": add, "import": import_, "search": search, "list": list_, "find": find, "drop": drop,
    "versions": versions, "rollback": rollback, "compact": compact, "export": export,
}  # fmt: skip
memory: tuple[str, dict[str, Callable[..., Any]]] = (
    "Facts kept in a folder, which goes wherever a patch does.\n\n"
    "\b\nExamples:\n  lmpatch memory create store gemma-3-270m\n  lmpatch memory import store facts.jsonl\n"
    '  lmpatch ask gemma-3-270m -p store "The Eiffel Tower is in"',
    COMMANDS,
)
"""The group's help and its commands."""


def _open(path: Path) -> Store:
    from ..memory.store import Store

    return Store.open(path)


def _memory(path: Path) -> Memory:
    from ..memory.memory import Memory

    return Memory.open(path)


def _show(entries: Iterable[Entry], history: bool) -> None:
    columns = ["version", "added", "prompt", "target", *(["state"] if history else [])]
    rows = [(e.version, e.added, e.edit.prompt, e.edit.target, *([e.state] if history else [])) for e in entries]
    table(columns, rows)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
