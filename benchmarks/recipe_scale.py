"""Which questions find a fact as the memory grows to a million, and which find one that they should not.

    python benchmarks/recipe_scale.py DATA [--editor FILE] [--sizes 1000 5000 10000 100000 1000000]

The facts that are asked about come first: 500 of CounterFact's evaluation half and 500 real ones (LocFT's WikiBigEdit).
The rest of CounterFact and the other sets follow, then facts made up of them: the first word of one subject, the last
of another, a prompt and a target of CounterFact. No language model is asked. Made-up facts are encoded in bf16, the
others in fp32. Writes results/recipe-scale.json; resumable: work/recipe-scale.safetensors holds the best score of each
question so far.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from facts import unseen
from recipe_answers import FILES
from safetensors.torch import load_file, save_file
from tables.rows import RESULTS, WORK

import lmpatch as lp
from lmpatch.data.edits import read_edits
from lmpatch.patches.editor import find_editor, load_editor
from lmpatch.patches.memory.patch import encode_keys, retriever_of
from lmpatch.patches.memory.search import last_sentence
from lmpatch.provenance import hardware, now, versions
from lmpatch.retrieval.verifier import KINDS, SLACK

SIZES = (1000, 5000, 10_000, 100_000, 1_000_000)
DOUBTS = (1.0, 0.9, 0.8, 0.7, 0.5, 0.3)
"""``doubt`` of a memory; 1: the sentinel alone."""
ASKED = {"counterfact": 500, "real-wiki": 500}
TOGETHER = 2000


def real(data: Path) -> tuple[list[lp.Edit], list[lp.Edit]]:
    """The facts that are asked about, and the other real ones, in an order of their own."""
    sets = {name: read_edits(data / file) for name, file in FILES.items()}
    random.Random(0).shuffle(sets["counterfact"])
    asked = [edit for name, count in ASKED.items() for edit in sets[name][:count]]
    rest = [edit for name, edits in sets.items() for edit in edits[ASKED.get(name, 0) :]]
    random.Random(1).shuffle(rest)
    return asked, rest


def made_up(edits: list[lp.Edit], start: int) -> Iterator[lp.Edit]:
    """Facts about people and places that are not there; the one at ``start`` and those after it."""
    whole = [edit for edit in edits if edit.subject and edit.subject in edit.prompt]
    while True:
        draw = random.Random(start)
        one, other, form, target = (draw.choice(whole) for _ in range(4))
        subject = f"{str(one.subject).split()[0]} {str(other.subject).split()[-1]} {draw.randrange(1800, 2030)}"
        yield lp.Edit(form.prompt.replace(str(form.subject), subject), target.target, subject)
        start += 1


def questions(asked: list[lp.Edit], kept: set[str], data: Path) -> list[tuple[str, str, int]]:
    """(kind, question, the fact it is about or -1)."""
    found = [("told", edit.prompt, i) for i, edit in enumerate(asked)]
    found += [("reworded", edit.rephrases[0], i) for i, edit in enumerate(asked) if edit.rephrases]
    near = [ask.prompt for edit in asked for kind, asks in edit.locality for ask in asks if kind == "same_relation"]
    found += [("same relation", text, -1) for text in dict.fromkeys(near) if text not in kept]
    return found + [("unrelated", ask.prompt, -1) for ask in unseen(data)]


class Best:
    """The nearest fact of each question among those seen so far. Of one that stands behind a remark the last sentence
    is looked up, too, as a memory does."""

    def __init__(self, retriever: Any, rows: list[tuple[str, str, int]], file: Path, stamp: str) -> None:
        self.retriever, self.rows, self.file, self.stamp = retriever, rows, file, f"{stamp} last sentences"
        self.texts = [question for _, question, _ in rows]
        ends = [(i, last_sentence(text)) for i, text in enumerate(self.texts)]
        self.behind = [(i, end) for i, end in ends if end != self.texts[i]]  # question, its last sentence
        self.texts += [end for _, end in self.behind]
        self.queries = retriever.queries(self.texts)
        self.gate = retriever.gate(self.queries).float() / retriever.scale
        self.score, self.place = torch.full((len(self.texts),), -torch.inf), torch.full((len(self.texts),), -1)
        self.fact = [""] * len(self.texts)  # prompts of the nearest facts
        self.seen = torch.zeros((), dtype=torch.int64)

    def resume(self) -> None:
        """Go on from the file, if it is of the same run."""
        held = load_file(self.file) if self.file.exists() else {}
        if f"seen {self.stamp}" in held:
            self.score, self.place, self.seen = held["score"], held["place"], held[f"seen {self.stamp}"]
            self.fact = bytes(held["fact"].tolist()).decode().split("\0")

    def add(self, facts: list[lp.Edit], keys: torch.Tensor) -> None:
        scores = (self.queries @ keys[:, : self.retriever.matched].float().T) / self.retriever.scale
        score, place = scores.max(1)
        for i in (score > self.score).nonzero()[:, 0].tolist():
            self.fact[i] = facts[int(place[i])].prompt
            self.place[i], self.score[i] = place[i] + self.seen, score[i]
        self.seen = self.seen + len(keys)

    def save(self) -> None:
        self.file.parent.mkdir(exist_ok=True)
        facts = torch.tensor(list("\0".join(self.fact).encode()), dtype=torch.uint8)
        save_file({"score": self.score, "place": self.place, "fact": facts, f"seen {self.stamp}": self.seen}, self.file)

    def table(self) -> dict[str, Any]:
        """Shares that use a fact, and that use their own one, for each of ``DOUBTS``."""
        own = torch.tensor([place for _, _, place in self.rows])
        chances = self.retriever.verify([(fact, "") for fact in self.fact], self.texts)
        over = self.score - self.gate
        nearer = torch.arange(len(self.rows))
        for k, (i, _) in enumerate(self.behind, len(self.rows)):
            nearer[i] = k if over[k] > over[i] else i
        other, over, found_at = chances[nearer, KINDS.index("other")], over[nearer], self.place[nearer]
        found: dict[str, dict[str, float]] = {}
        for kind in dict.fromkeys(kind for kind, *_ in self.rows):
            of = torch.tensor([row[0] == kind for row in self.rows])
            found[kind] = {"n": int(of.sum())}
            for doubt in DOUBTS:
                used = (over > 0) if doubt == 1 else (over > -SLACK) & (other <= doubt)
                found[kind][str(doubt)] = float(used[of].float().mean())
                if int(own[of][0]) >= 0:
                    found[kind][f"{doubt}, its own"] = float((used & (found_at == own))[of].float().mean())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--editor", type=Path, help="default: the packaged retrieval")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    args = parser.parse_args()
    editor = load_editor(args.editor) if args.editor else find_editor("recipe", None)
    retriever = retriever_of(editor)
    asked, rest = real(args.data)
    kept = {edit.prompt for edit in asked + rest}
    best = Best(retriever, questions(asked, kept, args.data), WORK / "recipe-scale.safetensors", editor.hash())
    best.resume()
    out, facts = RESULTS / "recipe-scale.json", asked + rest
    before = json.loads(out.read_text()) if out.exists() else {}
    found = before["results"] if before.get("editor") == editor.hash() and int(best.seen) else {}
    for size in sorted(args.sizes):
        if str(size) in found:
            continue
        if int(best.seen) > size:
            raise SystemExit(f"{best.file} is beyond {size:,} facts: delete it to begin again")
        while (seen := int(best.seen)) < size:
            count = min(TOGETHER, size - seen, max(len(facts) - seen, 0) or TOGETHER)
            if seen < len(facts):
                some = facts[seen : seen + count]
                best.add(some, encode_keys(retriever, some))
            else:
                source = made_up(rest, seen)
                some = [next(source) for _ in range(count)]
                with torch.autocast("cpu", torch.bfloat16):
                    best.add(some, encode_keys(retriever, some))
            best.save()
            print(f"{int(best.seen):,} facts", flush=True)
        found[str(size)] = best.table()
        print(size, json.dumps(found[str(size)]), flush=True)
        record = {"made": now(), "versions": versions(), "hardware": hardware(), "editor": editor.hash()}
        out.write_text(json.dumps(record | {"real": len(facts), "results": found}, indent=1))


if __name__ == "__main__":
    main()
