"""Hostile words on the command line, run in this process: exit code 2 and one line, never a traceback."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

import lmpatch as lp
from lmpatch.cli.app import build
from lmpatch.errors import BadInput
from lmpatch.patches.patch import plain

from .mutate import LFS
from .subjects import records
from .tally import ASKED

WORDS = (
    "", " ", "-", "--", "---", "-x", "--nosuch", "--help", "\udcff", "\U0001f600", "é", "a" * 300, "a" * 5000, "-1",
    "0", "1.5", "1e999", "nan", "inf", "9" * 5000, "10000000000000", "None", "true", "..", "../..", ".", "/proc/x",
    "/dev/null/x", "/etc/passwd/x", "/dev/zero", "~nosuchuser/x", "file:///x", "http://x/y", "a/b", "a\tb", "a\nb",
    "layer=", "=1", "=", "layer=1=2", "layer=x", "layer=-1", "layer=999999999999999999999", "layer=1,2", "seed=1e400",
    "lr=nan", "lr=inf", "lr=0", "epochs=0", "epochs=-1", "epochs=999999999999", "n=0", "n=-1", "max_new_tokens=0",
    "batch_size=0", "batch_size=-1", "bootstrap=-1", "bootstrap=x", "\x1b]0;x\x07\x1b[2J", "{",
    "[" * 2000, "{}", "null",
    "@/nosuch", "@", "@.", "*", "cuda", "cuda:99", "cpu:7", "mps", "meta", "float8", "int8", "stored", "float16",
    "side", "run", "bake", "checkpoint", "rome", "memit", "recipe", "cad", "iti", "facts", "kre", "rag", "general",
    "facts.jsonl", "contexts.jsonl", "fifo", "empty", "lfs", "model", "patch", "steer", "broken", "nosuch",
)  # fmt: skip
LINES = (
    "fit model finetune facts.jsonl -o out --set layer=1 --set epochs=1",
    "fit model iti contexts.jsonl -o out",
    "fit model cad -o out --set alpha=1",
    "fit model rome facts.jsonl -o out --set layer=1 --set steps=1 --set covariance=false --dtype float32 --device cpu",
    "ask model -p patch --tokens 2 Tower",
    "ask model --context Rome --mount side Tower",
    "show patch",
    "show steer --json",
    "merge patch patch -o out",
    "export model -p patch -o out --to peft --rank 1",
    "export model -p patch -o out --to checkpoint",
    "bench model memotrap contexts.jsonl -p patch --set max_new_tokens=2 --set bootstrap=0 -o out --limit 2",
    "bench model facts facts.jsonl --method finetune --method-set layer=1 --set max_new_tokens=2 --limit 1 --set n=1",
    "probe model causal_trace facts.jsonl --limit 1 --set samples=1",
    "methods rome",
    "data rag squad.jsonl -o out --set seed=1",
    "example -o out",
)


def prepare(room: Path) -> None:
    """Everything the lines name."""
    room.mkdir(parents=True, exist_ok=True)
    model = tiny_model("llama", num_hidden_layers=2)
    model.save_pretrained(room / "model")
    tiny_tokenizer().save_pretrained(room / "model")
    lm = lp.load(room / "model")
    fact = {"prompt": "The tower is in", "subject": "tower", "target": "Rome", "old": "Paris"}
    lp.fit(lm, "finetune", [lp.Edit(**fact)], layer=1, epochs=1).save(room / "patch")
    lp.fit(lm, "cad", [], alpha=1.0).save(room / "steer")
    (room / "facts.jsonl").write_text(json.dumps(fact) + "\n")
    (room / "contexts.jsonl").write_text("".join(json.dumps(plain(record)) + "\n" for record in records(4)))
    squad = {"id": "1", "title": "T", "context": "It is in Rome.", "question": "Where?",
             "answers": [{"text": "Rome", "answer_start": 9}]}  # fmt: skip
    (room / "squad.jsonl").write_text(json.dumps(squad) + "\n")
    os.mkfifo(room / "fifo")
    (room / "empty").write_bytes(b"")
    (room / "lfs").write_bytes(LFS)
    shutil.copytree(room / "patch", room / "broken")
    (room / "broken" / "patch.json").write_bytes(b"{")


def attack(draw: random.Random) -> list[str]:
    """A line with one or two words replaced, put in, doubled or left out."""
    words = draw.choice(LINES).split()
    for _ in range(draw.choice((1, 1, 2))):
        at, how = draw.randrange(1, len(words)) if len(words) > 1 else 0, draw.randrange(8)
        if how == 0:
            words.insert(at, draw.choice(WORDS))
        elif how == 1 and len(words) > 2:
            del words[at]
        elif how == 2:
            words.insert(at, words[at])
        else:
            words[at] = draw.choice(WORDS)
    return words


def run(words: list[str], room: Path) -> Callable[[], None]:
    """The call: it ends with exit code 0, or with 1, 2 or 130 and a line."""

    def act() -> None:
        before = set(room.iterdir())
        here = os.getcwd()
        os.chdir(room)
        try:
            done = CliRunner().invoke(build(), words, input="")
            ASKED.clear()  # the size and licence of a model that the user names are looked up, which is said
        finally:
            os.chdir(here)
            for path in set(room.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code in (1, 2, 130):
            raise BadInput(done.output[-200:])
        if done.exit_code:
            raise RuntimeError(f"exit code {done.exit_code}")

    return act
