"""What the packaged RECIPE editor had seen of CounterFact's evaluation half when it was trained.

    python benchmarks/exposure.py DATA

writes results/recipe-exposure.json: the shares of evaluation facts whose template (the prompt without its subject),
target and subject occur in a fact of the training files. No prompt does: recipe_train.py drops those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from recipe_train import data

import lmpatch as lp
from lmpatch.data.edits import read_edits

RESULTS = Path(__file__).parent / "results"


def template(edit: lp.Edit) -> str:
    return edit.prompt.replace(edit.subject or "", "{}") if edit.subject else edit.prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    train, _ = data(args.data)
    asked = read_edits(args.data / "counterfact/eval.jsonl.gz")
    parts: dict[str, Callable[[lp.Edit], str | None]] = {
        "template": template,
        "target": lambda edit: edit.target.strip(),
        "subject": lambda edit: edit.subject,
    }
    found: dict[str, float] = {"evaluation_facts": len(asked), "training_facts": len(train)}
    for name, part in parts.items():
        seen = {part(edit) for edit in train}
        found[f"{name}_seen"] = sum(part(edit) in seen for edit in asked) / len(asked)
    print(found)
    (RESULTS / "recipe-exposure.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
