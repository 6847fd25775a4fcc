"""What the packaged RECIPE editor had seen of the facts it is asked when it was trained, set by set.

    python benchmarks/exposure.py DATA

writes results/recipe-exposure.json: the shares of evaluation facts whose template (the prompt without its subject),
reworded template, target and subject occur in a fact of the training files. No prompt does: recipe_train.py drops them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from facts import SETS
from recipe_train import data

import lmpatch as lp
from lmpatch.data.edits import read_edits

RESULTS = Path(__file__).parent / "results"


def template(edit: lp.Edit, prompt: str | None = None) -> str:
    prompt = edit.prompt if prompt is None else prompt
    return prompt.replace(edit.subject, "{}") if edit.subject else prompt


def rewording(edit: lp.Edit) -> str | None:
    """Template of the first one that is asked."""
    return template(edit, edit.rephrases[0]) if edit.rephrases else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    train, _ = data(args.data)
    zsre = read_edits(args.data / SETS["zsre"])
    asked = {name: read_edits(args.data / file) for name, file in SETS.items()} | {"zsre": zsre[: len(zsre) // 2]}
    parts: dict[str, Callable[[lp.Edit], str | None]] = {
        "template": template,
        "rewording": rewording,
        "target": lambda edit: edit.target.strip(),
        "subject": lambda edit: edit.subject,
    }
    found: dict[str, Any] = {"training_facts": len(train)}
    for name, edits in asked.items():
        found[name] = {"evaluation_facts": len(edits)}
        for part, of in parts.items():
            seen = {of(edit) for edit in train} - {None}
            found[name][f"{part}_seen"] = sum(of(edit) in seen for edit in edits) / len(edits)
    print(found)
    (RESULTS / "recipe-exposure.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
