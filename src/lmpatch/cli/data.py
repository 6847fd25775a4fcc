"""``lmpatch data``: build sets of records, and look at what a file holds. Needs no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .options import Out, Settings, arg, opt
from .screen import say, table

if TYPE_CHECKING:
    from ..data.rag.reader import RagRecord

OWN = "(the model's own answer)"


def rag(
    source: Annotated[Path, arg("SOURCE", "A SQuAD-format file, or JSONL of question, documents, answer.")],
    out: Out,
    settings: Settings = None,
) -> None:
    """Build the sets of `parenting` and the bench `rag`: split by article, the same files every time.

    lmpatch data rag squad.jsonl.gz -o sets
    lmpatch data rag logs.jsonl -o sets --set words=120 --set seed=1
    """
    from ..config import parse, resolve
    from ..data.rag.reader import Build, build, read_questions, write

    cfg = resolve(Build, parse(Build, settings or []))
    sets = build(read_questions(source), cfg)
    manifest = write(sets, out, source=source, cfg=cfg)
    table(["part", "kind", "variant", "records"], [(*name.split("/"), n) for name, n in manifest["counts"].items()])
    for name, found in manifest["built"].items():
        if found["built"] < found["asked"]:
            say(f"{name}: asked for {found['asked']}, built {found['built']}")
    for why, count in manifest["skipped"].items():
        say(f"skipped {count}: {why}")
    say(f"train.jsonl, dev.jsonl, held_out.jsonl and manifest.json in {out}", path=out)


def show(
    file: Annotated[Path, arg("FILE", "A file that `rag` wrote, or one that it reads.")],
    count: Annotated[int, opt("Examples of each variant.", "N", "-n", "--count", min=0)] = 1,
) -> None:
    """What a file holds: how many records of each kind, and examples as the model reads them.

    lmpatch data show sets/train.jsonl -n 2
    """
    from ..data.rag.reader import build, counts, is_built, read_built, read_questions

    built = is_built(file)
    records = read_built(file) if built else build(read_questions(file)).records
    if not built:
        say(f"{file} is a source; this is what is built from it.")
    table(["part", "kind", "variant", "records"], [(*name.split("/"), n) for name, n in counts(records).items()])
    seen: dict[str, int] = {}
    examples = []
    for record in records:
        seen[record.variant] = seen.get(record.variant, 0) + 1
        if seen[record.variant] <= count:
            examples.append(record)
    say("\n".join(map(_text, examples)), examples=[asdict(record) for record in examples])


def _text(record: RagRecord) -> str:
    head = f"\n--- {record.kind}, {record.variant}, {record.id}\n{record.prompt}{record.answer or OWN}"
    return f"{head}\ntrue: {' | '.join(record.gold)}" if record.gold else head


COMMANDS: dict[str, Callable[..., None]] = {"rag": rag, "show": show}
HELP = """Build and inspect sets of questions with documents.

lmpatch data rag squad.jsonl.gz -o sets
lmpatch data show sets/train.jsonl
"""
