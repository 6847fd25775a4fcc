"""One fact written by another tool and by lmpatch: CPU seconds of the whole command.

    python -m venv other && other/bin/pip install soup-cli==0.77.0 torch transformers
    python benchmarks/others.py DATA/counterfact/train.jsonl.gz --soup other/bin/soup

runs ``soup edit set`` (ROME, its defaults) and ``lmpatch fit MODEL rome`` on the same facts in turn, each in a process
of its own, and writes results/others.json: user and system seconds of both, and how many facts each then states. The
covariance that lmpatch's ROME divides by is computed before, once for all facts; soup divides by none. soup saves the
whole model, lmpatch a patch: neither is asked for it here, but for the patch, which has a few kilobytes.
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


def compare(model: str, facts: Sequence[lp.Edit], soup: str, folder: Path) -> dict[str, Any]:
    """Both commands on each fact in turn."""
    lm = lp.load(model, dtype="float32", device="cpu")
    rome.fit(lm, facts[:1], rome.Config())  # the covariance is kept
    rows: list[dict[str, Any]] = []
    for i, fact in enumerate(facts):
        file, patch = folder / f"fact-{i}.jsonl", folder / f"fact-{i}"
        record = {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target}
        file.write_text(json.dumps(record) + "\n")
        theirs = [soup, "edit", "set", "--base", str(packaged.folder(model)), "--method", "rome", "--device", "cpu"]
        theirs += ["--no-governor", "--subject", fact.prompt, "--target", fact.target]
        ours = [sys.executable, "-m", "lmpatch", "fit", model, "rome", str(file), "-o", str(patch), "--force"]
        ours += ["--dtype", "float32", "--device", "cpu"]
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
    return {"rows": rows, **found, "ratio": found["soup_cpu_s"] / found["lmpatch_cpu_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path)
    parser.add_argument("--soup", required=True, help="the program, in an environment of its own")
    parser.add_argument("--n", type=int, default=5, help="facts")
    args = parser.parse_args()
    facts = read_edits(args.facts, limit=args.n)
    record: dict[str, Any] = {"made": now(), "versions": versions(), "hardware": hardware(), "results": {}}
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            record["results"][model] = compare(model, facts, os.path.abspath(args.soup), Path(folder))
        (RESULTS / "others.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
