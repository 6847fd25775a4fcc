"""Damaged files, hostile command lines, interrupts, threads and kills: nothing is lost, nothing is silently wrong.

    python benchmarks/fuzz.py [--inputs 10000] [--interrupts 5000] [--calls 1000] [--kills 200] [--seed 0] [--out FILE]

Needs no model but the tiny ones of the tests, and no network. Every input is decided by the seed, its kind and its
number, so one alone can be tried again: ``--only "patch folders" --first 1234 --inputs 1``. Prints a line of
progress every ten seconds and a table at the end; exit code 1 if there was a traceback or something silently wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from campaign import commands, interrupts, kills, sources, subjects, threads
from campaign.child import try_all
from campaign.subjects import Subject
from campaign.tally import Tally, no_network, to_stdout

Input = tuple[str, Callable[[], None]]
GIB = 24  # address space: what a file declares must not be allocated
KINDS = {
    "patch folders": (subjects.patches, 0.3),
    "editor files": (subjects.editors, 0.1),
    "checkpoints": (subjects.checkpoints, 0.1),
    "bench folders": (subjects.bench_folders, 0.1),
    "model folders": (sources.models, 0.1),
    "facts and documents": (sources.documents, 0.2),
}
"""Kind -> what makes its subjects, and its share of all inputs."""
COMMANDS = ("command lines", 0.1)


def inputs(tally: Tally, args: argparse.Namespace, room: Path) -> None:
    """Damaged files and hostile command lines, each kind's share of them; with ``only`` all are of one kind."""
    makers = {name: make for name, (make, _) in KINDS.items()}
    shares = {name: share for name, (_, share) in KINDS.items()} | dict([COMMANDS])
    for kind, share in shares.items():
        if args.only and kind != args.only:
            continue
        place = room / kind.replace(" ", "_")
        place.mkdir()
        listed = makers[kind](place / "made") if kind in makers else []
        if not listed:
            commands.prepare(place)
        count = args.inputs if args.only else round(args.inputs * share)

        def make(number: int, kind: str = kind, place: Path = place, listed: list[Subject] = listed) -> Input:
            draw = random.Random(f"{args.seed}/{kind}/{number}")
            if listed:
                return draw.choice(listed).attack(draw, place / "now")
            words = commands.attack(draw)
            return "lmpatch " + " ".join(words)[:200], commands.run(words, place)

        try_all(tally, kind, range(args.first, args.first + count), make)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="damaged files and command lines; 0: none, as below")
    parser.add_argument("--interrupts", type=int, default=5_000, help="Ctrl-C at lines")
    parser.add_argument("--calls", type=int, default=1_000, help="calls by 2 and by 8 threads, each")
    parser.add_argument("--kills", type=int, default=200, help="kills of three writers, together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="one kind of input, and no interrupts, threads and kills")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--out", type=Path, help="failures, one JSON object a line, and the counts")
    return parser.parse_args(words)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (GIB * 2**30, resource.RLIM_INFINITY))
    no_network()
    tally = Tally(to_stdout)
    with tempfile.TemporaryDirectory() as place:
        room = Path(place)
        os.environ["LMPATCH_CACHE"] = str(room / "cache")
        inputs(tally, args, room)
        if args.interrupts and not args.only:
            interrupts.campaign(tally, args.interrupts, args.seed)
        if args.calls and not args.only:
            threads.campaign(tally, args.calls, args.seed)
        if args.kills and not args.only:
            heard = kills.campaign(tally, args.kills, args.seed, room)
            to_stdout(f"{args.kills} kills: {heard:,} writes had been acknowledged")
    tally.tell(force=True)
    to_stdout(tally.table())
    for failure in tally.failures[:20]:
        to_stdout(f"{failure['how']}: {failure['kind']} {failure['number']}: {failure['input']}\n"
                  f"    {failure['error']}  [{failure['at']}]")  # fmt: skip
    if args.out:
        counts = {kind: dict(found) for kind, found in tally.counts.items()}
        args.out.write_text("".join(json.dumps(each) + "\n" for each in [*tally.failures, {"counts": counts}]))
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    main()
