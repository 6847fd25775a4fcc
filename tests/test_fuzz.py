"""A short form of the campaign in ``benchmarks/fuzz.py``: nothing is lost, nothing is silently wrong, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
INPUTS = {
    "patch folders": 120, "editor files": 40, "checkpoints": 60, "bench folders": 40, "model folders": 15,
    "facts and documents": 150, "command lines": 30,
}  # fmt: skip


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The campaign's own modules, imported as its script imports them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))
    import fuzz

    monkeypatch.setattr(fuzz.subjects.runner, "BLOCK", 2)
    yield fuzz
    for name in [name for name in sys.modules if name == "fuzz" or name.partition(".")[0] == "campaign"]:
        del sys.modules[name]


def none_failed(tally: Any) -> None:
    assert [(f["input"], f["error"], f["at"]) for f in tally.failures] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", INPUTS)
def test_damaged_files_and_hostile_command_lines_are_refused_or_mean_the_same(
    kind: str, campaign: Any, tmp_path: Path
) -> None:
    tally = campaign.Tally(lambda line: None)
    campaign.inputs(tally, campaign.arguments(["--only", kind, "--inputs", str(INPUTS[kind])]), tmp_path)
    none_failed(tally)
    assert tally.counts[kind]["inputs"] == INPUTS[kind] and tally.counts[kind]["refused"]


@pytest.mark.slow
def test_an_interrupt_at_a_line_leaves_the_model_as_it_was(campaign: Any) -> None:
    tally = campaign.Tally(lambda line: None)
    campaign.interrupts.campaign(tally, 100, 0, ("llama",), ("apply", "remove", "ask"))
    none_failed(tally)


@pytest.mark.slow
def test_threads_get_their_own_answers(campaign: Any) -> None:
    tally = campaign.Tally(lambda line: None)
    campaign.threads.campaign(tally, 80, seed=0)
    none_failed(tally)


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_it_acknowledged(campaign: Any, tmp_path: Path) -> None:
    tally = campaign.Tally(lambda line: None)
    campaign.kills.campaign(tally, 3, 0, tmp_path)
    none_failed(tally)


def test_the_campaign_sees_what_it_looks_for(campaign: Any, tmp_path: Path) -> None:
    def wrong() -> None:
        raise sys.modules["campaign.tally"].Wrong("other rows")

    (tally := campaign.Tally(lambda line: None)).run("x", 0, "a", wrong)
    tally.run("x", 1, "b", lambda: {}["key"])
    assert [f["how"] for f in tally.failures] == ["wrong", "tracebacks"] and "KeyError" in tally.failures[1]["error"]
