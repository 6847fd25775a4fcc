"""benchmarks/editors.py: all of it on a tiny model, that it goes on, and that packed rows give the same numbers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_tokenizer

import lmpatch as lp
from lmpatch import api
from lmpatch.benches.facts import compare

PLACES = ("Paris", "Rome", "Tokyo", "Seattle", "Italy", "Japan")


def put(file: Path, records: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in records).encode()))


def facts(word: str) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"The {word} of {place} is in", "subject": f"{word} of {place}", "target_new": "France",
            "ground_truth": place, "rephrase_prompt": f"One finds the {word} of {place} in",
            "locality_prompt": f"The river of {place} is in", "locality_ground_truth": place,
        }
        for place in PLACES
    ]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    put(tmp_path / "data/counterfact/train.jsonl.gz", facts("bridge"))
    put(tmp_path / "data/counterfact/eval.jsonl.gz", facts("tower"))
    nq = [{"question": f"who lives in {p}", "answers": ["Danielle"]} for p in (*PLACES, *PLACES)]
    put(tmp_path / "data/nq/nq_locality.jsonl.gz", nq)
    text = tmp_path / "data/wikitext2/raw_train_part.txt.gz"
    text.parent.mkdir()
    text.write_bytes(gzip.compress(b"The Eiffel Tower is in Paris.\n"))
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "data"


@pytest.mark.slow
def test_one_command_tunes_writes_asks_and_prints_and_goes_on(
    data: Path, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    editors, made = script("editors"), []
    monkeypatch.setattr(editors, "SAVED", 2)
    monkeypatch.setattr(editors, "SEQUENTIAL", ("finetune",))
    results, work = data.parent / "results/editors", data.parent / "work"
    options = {
        "model": [data.parent / "tiny"], "work": [work], "results": [results], "only": ["finetune", "rag"],
        "sets": ["counterfact"], "n": [1, 2], "seeds": [0, 1], "scored": [2], "pack": [1], "tokens": [2], "effort": [2],
        "tuned": [1], "latex": [data.parent / "tables.tex"], "json": [], "steps": ["tune", "run", "tables"],
    }  # fmt: skip
    words = [str(data), *(str(one) for name, given in options.items() for one in (f"--{name}", *given))]
    editors.main(words)
    said = capsys.readouterr().out
    told = json.loads(said.splitlines()[-1])
    assert told["models"]["tiny"]["hours"].keys() == {"finetune", "rag"} and not told["models"]["tiny"]["left_out"]
    assert "in all about" in said and "## Teacher-forced" in said and "`finetune`, one at a time" in said
    tried = json.loads((results.parent / "sweep-editors-tiny.json").read_text())["rows"]
    assert {name: len(rows) for name, rows in tried.items()} == {"finetune": 2, "rag": 2}
    lines = editors.read_lines(results / "tiny-counterfact.jsonl.gz")
    cells = {(line["n"], line["seed"], line["commit"], line["run"]) for line in lines}
    assert {cell[:3] for cell in cells} == {(1, 0, 0), (2, 0, 0), (2, 1, 0), (2, 0, 1), (2, 1, 1)}
    assert {cell[3] for cell in cells} == {"none", "fact_in_prompt", "finetune", "rag"}
    packed = (results / "tiny-counterfact.jsonl.gz").read_bytes()
    latex = (data.parent / "tables.tex").read_text()
    assert latex.count(r"\begin{tabular}") == latex.count(r"\bottomrule") >= 3 and r"\texttt{rag}" in latex
    monkeypatch.setattr(api, "fit", lambda *_, **__: made.append(1))  # nothing is written a second time
    editors.main([*words[: words.index("tune")], "run"])
    assert not made and (results / "tiny-counterfact.jsonl.gz").read_bytes() == packed


@pytest.mark.slow
def test_packed_rows_give_the_numbers_of_the_bench(data: Path, script: Any, tmp_path: Path) -> None:
    editors = script("editors")
    lm, edits = lp.load(data.parent / "tiny"), lp.read_edits(data / "counterfact/eval.jsonl.gz")
    who = compare.Entrant("ft", lambda lm, edits: lp.fit(lm, "finetune", edits, lr=1e-2, force=True))
    report = compare.entered(lm, edits, who, compare.Config(max_new_tokens=4, bootstrap=0, pack=3), tmp_path / "out")
    kinds = editors.rows.packed(vars(row) for row in report.run("ft").rows)
    found, run = report.run("ft").metrics(), [{"kinds": kinds}]
    for name, kind, key in (
        ("reliability", "edit", "em"), ("generality", "rephrase", "em"), ("tf_reliability", "edit", "tf"),
        ("loc_unchanged/same_relation", "loc/same_relation", "same"),
        ("loc_kl/same_relation", "loc/same_relation", "kl"),
        ("tf_locality/same_relation", "loc/same_relation", "tf_same"),
    ):  # fmt: skip
        assert editors.printed.average(run, kind, key).value == pytest.approx(found[name].value, abs=0.006), name
    assert found["reliability"].value > 0


def test_every_method_has_axes_and_no_setting_that_only_names_the_variant(script: Any) -> None:
    settings = script("editors_settings")
    config, start = settings.start_of("lora")
    assert "rank" not in start and "lr" not in start
    axes = {axis.name: axis.values for axis in settings.axes_of(config, start, 10)}
    assert axes["epochs"] == [12, 25, 50] and axes["end"] == [None, "answer", "eos"]
    assert axes["layer"] == [None, 1, 3, 4, 6, 8] and not {"seed", "batch", "loss"} & axes.keys()
    assert list(settings.written({"layers": (1, 2), "end": None, "nas": True})) == [
        "layers=1,2",
        "end=none",
        "nas=true",
    ]


def test_a_share_and_a_bit_survive_packing(script: Any) -> None:
    rows = script("editors").rows
    made = [
        {"when": "final", "kind": "edit", "case_id": str(i), "aliases": ["Oslo"], "text": text, "em": em, "tf_acc": tf}
        for i, (text, em, tf) in enumerate([("Oslo Oslo", True, 1.0), ("x", False, 1 / 3), (None, None, None)])
    ]
    kinds = rows.packed(made)
    assert kinds["edit"]["em"] == "10-" and kinds["edit"]["tf"] == "XX33--" and kinds["edit"]["twice"] == "10-"
    assert rows.values(kinds, "edit", "tf") == [1.0, 0.33, None] and rows.values(kinds, "loc/x", "same") == []
    tasks = rows.packed_tasks(
        [
            {"task": "csqa", "protocol": "cloze-v1", "id": "b", "value": 1.0},
            {"task": "csqa", "protocol": "cloze-v1", "id": "a", "value": 0.0},
            {"task": "perplexity", "protocol": "perplexity-v1", "id": "t", "value": 2.5, "weight": 7},
        ]
    )
    assert rows.task_values(tasks["csqa cloze-v1"]) == ([0.0, 1.0], [1.0, 1.0])
    assert rows.task_values(tasks["perplexity perplexity-v1"]) == ([2.5], [7])


def test_figures_of_others_stand_apart_and_are_called_reported(script: Any) -> None:
    printed = script("editors").printed
    assert "*reported*" in printed.NOTE and "arXiv:2405.03279" in printed.others()
    assert all(row["set"] in printed.SETS and row["source"] for row in printed.reported()["rows"])
