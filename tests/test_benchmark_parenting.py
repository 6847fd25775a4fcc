"""benchmarks/parenting.py on a tiny model: chosen on dev, measured on held-out articles, resumed, refused if stale."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from rag_files import records, squad
from tiny import tiny_model, tiny_tokenizer

from lmpatch.inference.closed_book import ClosedBookAnswer
from lmpatch.models.load import wrap

FILE = Path(__file__).parents[1] / "benchmarks" / "parenting.py"
GOLD = {r["question"]: r["answers"][0]["text"] for r in records() if r["answers"]}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with a tiny model that is said to know every second answer, and few things to try."""
    monkeypatch.syspath_prepend(str(FILE.parent))  # as when it runs as a script
    spec = importlib.util.spec_from_file_location("benchmark_parenting", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lm = wrap(tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer(), name="tiny")
    monkeypatch.setattr(module.lp, "load", lambda *_, **__: lm)

    def own(_: Any, asked: Any, **__: Any) -> list[ClosedBookAnswer]:
        return [ClosedBookAnswer(GOLD.get(q, "a mouse") if len(q) % 2 else "a mouse", True) for q in asked]

    for place in ("lmpatch.benches.rag", "lmpatch.methods.parenting.data"):
        monkeypatch.setattr(f"{place}.closed_book_answers", own)
    monkeypatch.setattr(module, "closed_book_answers", own)
    monkeypatch.setattr(module, "TRIED", {run: options[:2] for run, options in module.TRIED.items()})
    return module


def words(tmp_path: Path, *more: str) -> list[str]:
    quick = ("rank=2", "steps=2", "mine_steps=2", "mine_rows=2", "cue_rows=4", "warmup=0", "modules=mlp")
    return [
        str(squad(tmp_path / "s.jsonl")), "--out", str(tmp_path / "out"), "--chosen", str(tmp_path / "chosen.json"),
        "--n", "4", "--ircan-examples", "2", *more, "--set", *quick,
    ]  # fmt: skip


@pytest.mark.slow
def test_it_goes_from_squad_to_a_verdict_and_is_resumed_or_refused(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(["tune", *words(tmp_path)])
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert {run: [*found] for run, found in chosen["chosen"].items()} == {
        "parenting": ["lr"], "mixed": ["lr"], "plain": ["lr"], "cad": ["alpha"], "ircan": ["neurons", "factor"],
    }  # fmt: skip
    assert all(len(chosen["tried"][run]) == len(options) for run, options in script.TRIED.items())

    chosen["chosen"]["mixed"]["lr"] = 0.125
    (tmp_path / "chosen.json").write_text(json.dumps(chosen))
    script.main(words(tmp_path))
    made = json.loads((tmp_path / "out/parenting.json").read_text())
    assert not made["resumed"] and made["within_an_hour"] is True and made["chosen"] == chosen["chosen"]
    assert [*made["runs"]] == ["none", *script.RUNS]
    asked = script.lp.load_patch(tmp_path / "out/patches/mixed")
    assert asked.config["lr"] == 0.125 and asked.config["mode"] == "mixed"
    held = script.read_rag(tmp_path / "out/sets/held_out.jsonl", part="held_out")
    rows = script.rag.read_report(tmp_path / "out/bench").rows
    assert {row.question for row in rows} <= {r.question for r in held}  # nothing of dev is measured

    verdict = made["verdict"]
    assert [*verdict["parenting minus"]] == ["mixed", "plain", "mixed_same_units", "ircan", "cad"]
    assert [*verdict["minus parenting"]] == [*script.ABLATIONS] and [*verdict["against the base"]] == [*script.RUNS]
    one = verdict["parenting minus"]["mixed"]["R_Ad+R_Ro"]
    both = [made["runs"][run][m]["value"] for run in ("parenting", "mixed") for m in ("R_Ad", "R_Ro")]
    assert one["points"] == pytest.approx(100 * (both[0] + both[1] - both[2] - both[3]), abs=0.01)
    patches = made["patches"]
    same, every = patches["mixed_same_units"]["parameters"], patches["mixed"]["parameters"]
    assert patches["parenting"]["parameters"] == same < every
    said = capsys.readouterr().out
    assert f"parenting: R_Ad {100 * both[0]:.1f}" in said and f"{same} parameters" in said and "correlate" in said

    script.main(words(tmp_path))
    again = json.loads((tmp_path / "out/parenting.json").read_text())
    assert again["resumed"] and again["within_an_hour"] is None and again["runs"] == made["runs"]
    with pytest.raises(SystemExit, match="other values of build"):
        script.main(words(tmp_path, "--build", "seed=1"))
    (tmp_path / "chosen.json").unlink()
    with pytest.raises(SystemExit, match="other values of chosen"):
        script.main(words(tmp_path))


def test_general_ability_is_measured_where_its_data_lies_beside_squad(script: Any, tmp_path: Path) -> None:
    (tmp_path / "data/squad").mkdir(parents=True)
    there = script._arguments([str(tmp_path / "data/squad/s.jsonl")])
    assert there.general is None
    (tmp_path / "data/general").mkdir()
    assert script._arguments([str(tmp_path / "data/squad/s.jsonl")]).general == tmp_path / "data"
