"""``lmpatch audit`` and ``diff`` on a tiny model folder: what they print and keep, the gate, and what they refuse."""

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

TEXT = "\n\n".join(
    f"The tower of {place} is {k} metres tall, and the capital of {place} is far away." for k, place in
    enumerate(("Paris", "Rome", "Tokyo", "Oslo", "Lima", "Seattle", "Bern", "Cairo"))
)  # fmt: skip


def run(*words: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(
        build(), [str(word) for word in words], catch_exceptions=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a patch that moves every logit, and a text."""
    path = tmp_path_factory.mktemp("audit")
    for seed, name in enumerate(("model", "other")):
        tiny_model("llama", seed=seed).save_pretrained(path / name)
        tiny_tokenizer().save_pretrained(path / name)
    (path / "text.txt").write_text(TEXT)
    lm, source = lp.load(path / "model"), torch.Generator().manual_seed(0)
    b, a = torch.randn(lm.layout.d_model, 1, generator=source), torch.randn(1, lm.layout.d_ff, generator=source)
    WeightPatch.make(lm, {lm.layout.weight(lm.layout.downs[1]): LowRank(b, a)}, method="hand").save(path / "patch")
    return path


@pytest.mark.slow
def test_an_audit_prints_a_table_keeps_its_numbers_and_goes_on(folder: Path, tmp_path: Path) -> None:
    words = ("audit", folder / "model", folder / "text.txt", "-o", tmp_path / "out", "--set", "min_count=2")
    done = run(*words)
    assert done.exit_code == 0 and "unigram" in done.stdout and "balanced" in done.stdout.lower()
    kept = json.loads((tmp_path / "out/audit.json").read_text())
    assert kept["documents"] == 8 and kept["buckets"] and (tmp_path / "out/audit.png").stat().st_size > 1000
    again = json.loads(run(*words, "--json").stdout)
    assert again["mean"] == kept["mean"] and again["counted_in"] == "the audited text"


@pytest.mark.slow
def test_the_gate_fails_where_tokens_pay_and_passes_where_none_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = folder / "model", folder / "text.txt"
    words = ("diff", model, folder / "patch", text, "--set", "tau=-9")  # every row certainly loses more than that
    assert run(*words, "--gate").exit_code == 0  # but eight documents have too few tokens for a row to count
    monkeypatch.setattr("lmpatch.dynamics.audit.FEW_TYPES", 3)
    monkeypatch.setattr("lmpatch.dynamics.audit.FEW_TOKENS", 10)
    failed = run(*words, "--gate")
    assert failed.exit_code == 1 and "loss rises by at least" in failed.stdout
    assert run(*words).exit_code == 0
    same = run("diff", model, model, text, "--gate")
    assert same.exit_code == 0 and "+0.0000" in same.stdout and "Nothing pays" in same.stdout
    assert "pays most" in run("diff", model, folder / "other", text).stdout


@pytest.mark.slow
def test_what_cannot_be_audited_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a\n\nb\n")
    done = run("audit", folder / "model", tmp_path / "short.txt")
    assert done.exit_code == 2 and "none of 2 documents" in done.stderr
    done = run("audit", folder / "model", folder / "text.txt", "--set", "window=5000")
    assert done.exit_code == 2 and "window is 5000" in done.stderr
    out = tmp_path / "out"
    assert run("audit", folder / "model", folder / "text.txt", "-o", out).exit_code == 0
    done = run("audit", folder / "other", folder / "text.txt", "-o", out)
    assert done.exit_code == 2 and "another model" in done.stderr


@pytest.mark.slow
def test_the_public_calls_take_texts_and_files_and_leave_the_model_as_it_was(folder: Path) -> None:
    lm = lp.load(folder / "model")
    before = lm.fingerprint()
    found = lp.audit(lm, TEXT.split("\n\n"), reference=folder / "text.txt", min_count=2)
    assert not found.counts.own and found.counts.source == "text.txt"
    moved = lp.diff(lm, folder / "patch", folder / "text.txt", min_count=2)
    assert moved.mean.value != 0 and moved.payers and lm.fingerprint() == before and not lp.applied(lm)
    for wrong in ([], [3]):
        with pytest.raises(BadInput, match="list of documents"):
            lp.audit(lm, wrong)
