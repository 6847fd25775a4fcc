"""``lmpatch check`` on a tiny model folder: its exit codes, its table, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner, Result

import lmpatch as lp
from lmpatch.cli.app import build
from lmpatch.errors import BadInput
from lmpatch.patches.weight.delta import LowRank
from lmpatch.patches.weight.patch import WeightPatch

FACTS = [lp.Edit(f"The tower of {p} is in", "Oslo", f"tower of {p}", old=p) for p in ("Paris", "Rome", "Tokyo")]
SHORT = ["--set", "max_new_tokens=3"]
HELD = ["efficacy", "paraphrase", "repeats", "distinct_2", "neighbours", "perplexity", "negation", "old_mentioned"]
HELD += ["true_false", "reversal", "long_states", "long_distinct_2"]
FREE = [word for name in HELD for word in ("--set", f"{name}=none")]


def run(*words: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(
        build(), [str(word) for word in words], catch_exceptions=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a patch that holds facts and does not write them, and one that holds none."""
    path = tmp_path_factory.mktemp("check")
    tiny_model("llama").save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    lm = lp.load(path / "model")
    source = torch.Generator().manual_seed(0)
    b, a = torch.randn(lm.layout.d_model, 1, generator=source), torch.randn(1, lm.layout.d_ff, generator=source)
    name = lm.layout.weight(lm.layout.downs[1])
    for word, edits in (("patch", FACTS), ("empty", [])):
        WeightPatch.make(lm, {name: LowRank(0.01 * b, a)}, method="hand", edits=edits).save(path / word)
    return path


@pytest.mark.slow
def test_a_patch_that_misses_a_limit_exits_with_1_and_says_which(folder: Path) -> None:
    done = run("check", folder / "patch", "--model", folder / "model", *SHORT)
    assert done.exit_code == 1 and "FAIL" in done.stdout and "failed: efficacy" in done.stdout
    for check in (*HELD[:4], "neighbours/unrelated", *HELD[5:], "composition", "long_repeats"):
        assert any(check in line.split() for line in done.stdout.splitlines()), check
    assert "asking 3 facts takes about" in done.stderr


@pytest.mark.slow
def test_a_patch_that_misses_none_exits_with_0_and_goes_on_in_its_folder(folder: Path, tmp_path: Path) -> None:
    words = ("check", folder / "patch", "--model", folder / "model", *SHORT, *FREE, "-o", tmp_path / "out")
    done = run(*words, "--set", "perplexity=1.5")
    assert done.exit_code == 0 and "passed" in done.stdout and (tmp_path / "out" / "report.html").exists()
    again = json.loads(run(*words, "--set", "efficacy=0.9", "--json").stdout)  # other limits, the same answers
    assert again["passed"] is False and again["missed"] == ["efficacy"]
    checks = {line["check"]: line for line in again["checks"]}
    assert checks["efficacy"] | {"fact_in_prompt": 0} == {
        "check": "efficacy", "value": 0.0, "unpatched": 0.0, "fact_in_prompt": 0, "limit": 0.9, "side": "at least",
        "n": 3, "passed": False,
    }  # fmt: skip
    assert checks["negation"]["n"] == 3 and checks["composition"]["value"] is None


@pytest.mark.slow
def test_a_check_without_facts_or_model_says_what_to_give(folder: Path, tmp_path: Path) -> None:
    done = run("check", folder / "empty", "--model", folder / "model")
    assert done.exit_code == 2 and "holds no facts of its own. Give a file" in done.stderr
    done = run("check", folder / "patch")
    assert done.exit_code == 2 and "Name it: --model MODEL" in done.stderr
    done = run("check", folder / "patch", "--model", folder / "model", "--set", "efficasy=1")
    assert done.exit_code == 2 and "Did you mean efficacy" in done.stderr


@pytest.mark.slow
def test_check_in_python_is_true_where_the_patch_passed(folder: Path) -> None:
    lm, limits = lp.load(folder / "model"), dict.fromkeys(HELD)
    verdict = lp.check(lm, folder / "empty", FACTS, max_new_tokens=3, **limits)
    assert verdict and verdict.report.run("hand").metric("negation").n == 3
    assert not lp.check(lm, folder / "empty", FACTS[:1], max_new_tokens=3, **{**limits, "efficacy": 1.0})
    with pytest.raises(BadInput, match="holds no facts"):
        lp.check(lm, folder / "empty")
