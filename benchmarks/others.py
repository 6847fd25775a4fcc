"""One fact written by another tool and by lmpatch: CPU seconds of the whole command.

    python -m venv other && other/bin/pip install soup-cli==0.77.0 torch transformers
    python benchmarks/others.py DATA/counterfact/train.jsonl.gz --soup other/bin/soup

runs ``soup edit set`` (ROME, its defaults) and ``lmpatch fit MODEL rome`` on the same facts in turn, each in a process
of its own, and writes results/others.json: user and system seconds of both, and how many facts each then states. The
covariance that lmpatch's ROME divides by is computed before, once for all facts; soup divides by none. Both read
prompts as they stand, without a chat template. soup saves the whole model, lmpatch a patch: neither is asked for it
here, but for the patch, which has a few kilobytes. At last lmpatch writes ``--together`` facts in one command, which
soup has no command for: CPU seconds a fact.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lmpatch as lp
from lmpatch.data.edits import read_edits
from lmpatch.methods import rome
from lmpatch.models import packaged
from lmpatch.provenance import hardware, now, versions

RESULTS = Path(__file__).parent / "results"
MODELS = ("gemma-3-270m", "smollm2-135m-instruct")


def cpu_seconds(command: Sequence[str], folder: Path) -> tuple[float, str]:
    """Of a command, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def fit_command(model: str, facts: Sequence[lp.Edit], patch: Path) -> list[str]:
    """What makes a patch of these facts with lmpatch."""
    file = patch.with_suffix(".jsonl")
    records = [{"prompt": fact.prompt, "subject": fact.subject, "target": fact.target} for fact in facts]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, "-m", "lmpatch", "fit", model, "rome", str(file), "-o", str(patch), "--force", "--raw"]
    return [*command, "--dtype", "float32", "--device", "cpu"]


def compare(
    model: str, facts: Sequence[lp.Edit], together: Sequence[lp.Edit], soup: str, folder: Path
) -> dict[str, Any]:
    """Both commands on each fact in turn, then lmpatch on the others together."""
    lm = lp.load(model, dtype="float32", device="cpu", raw=True)
    rome.fit(lm, facts[:1], rome.Config())  # the covariance is kept
    rows: list[dict[str, Any]] = []
    for i, fact in enumerate(facts):
        theirs = [soup, "edit", "set", "--base", str(packaged.folder(model)), "--method", "rome", "--device", "cpu"]
        theirs += ["--no-governor", "--subject", fact.prompt, "--target", fact.target]
        ours = fit_command(model, [fact], patch := folder / f"fact-{i}")
        seconds, said = cpu_seconds(theirs, folder)
        own, _ = cpu_seconds(ours, folder)
        chance = re.search(r"-> ([0-9.]+)", said)
        with lp.apply(lm, lp.load_patch(patch)):
            stated = lp.generate(lm, fact.prompt, max_new_tokens=8).strip().startswith(fact.target)
        rows.append(
            {"prompt": fact.prompt, "target": fact.target, "soup_cpu_s": seconds, "lmpatch_cpu_s": own}
            | {"soup_probability": float(chance[1]) if chance else None, "lmpatch_states": stated}
        )
        print(model, json.dumps(rows[-1]), flush=True)
    found = {name: median(row[name] for row in rows) for name in ("soup_cpu_s", "lmpatch_cpu_s")}
    seconds, _ = cpu_seconds(fit_command(model, together, folder / "together"), folder)
    many = {"facts": len(together), "lmpatch_cpu_s": seconds / len(together)}
    many["ratio"] = found["soup_cpu_s"] / many["lmpatch_cpu_s"]
    return {"rows": rows, **found, "ratio": found["soup_cpu_s"] / found["lmpatch_cpu_s"], "together": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path)
    parser.add_argument("--soup", required=True, help="the program, in an environment of its own")
    parser.add_argument("--n", type=int, default=5, help="facts, each alone")
    parser.add_argument("--together", type=int, default=20, help="facts in one command of lmpatch")
    args = parser.parse_args()
    edits = read_edits(args.facts, limit=args.n + args.together)
    alone, together, soup = edits[: args.n], edits[args.n :], os.path.abspath(args.soup)
    record: dict[str, Any] = {"made": now(), "versions": versions(), "hardware": hardware(), "results": {}}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            record["results"][model] = compare(model, alone, together, soup, Path(folder))
        (RESULTS / "others.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
