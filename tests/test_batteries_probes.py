"""What every probe keeps: the model as it was, equal results twice, a stopped run that goes on."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from snapshot import Lines, changed, spread, state
from snapshot import name as place
from tiny import CORE, tiny_lm

from lmpatch import registry

PROBES = registry.names("probes")
POINTS = 40  # lines of a run at which it is interrupted
RESUMING = [name for name in PROBES if "out" in inspect.signature(registry.get("probes", name).run).parameters]


@pytest.mark.slow
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("name", PROBES)
def test_the_model_is_as_it_was_and_a_run_repeats(name: str, family: str) -> None:
    probe, lm = registry.get("probes", name), tiny_lm(family)
    data, cfg = probe.example(lm)
    before = state(lm)
    one, two = (probe.run(lm, data, cfg) for _ in range(2))
    assert changed(before, state(lm)) == []
    assert one.table() == two.table()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_a_result_has_a_row_a_record_and_is_saved_the_same_twice(name: str, tmp_path: Path) -> None:
    probe, lm = registry.get("probes", name), tiny_lm("llama")
    data, cfg = probe.example(lm)
    found = probe.run(lm, data, cfg)
    columns, rows = found.table()
    assert len(rows) == len(data) and {len(row) for row in rows} == {len(columns)}
    texts = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        found.save(folder)
        texts.append((folder / f"{name}.jsonl").read_bytes())
    assert texts[0] == texts[1] != b""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_an_interrupted_run_leaves_the_model_as_it_was(name: str) -> None:
    probe, lm = registry.get("probes", name), tiny_lm("llama")
    data, cfg = probe.example(lm)
    before, lines = state(lm), Lines(lambda: probe.run(lm, data, cfg))
    for line in spread([*lines.times], POINTS):
        for time in {1, lines.times[line]}:
            assert lines.interrupted(line, time)
            assert changed(before, state(lm)) == [], f"{place(line)}, time {time}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMING)
def test_a_stopped_run_goes_on_to_the_same_result(name: str, tmp_path: Path) -> None:
    probe, lm = registry.get("probes", name), tiny_lm("llama")
    data, cfg = probe.example(lm)
    whole = probe.run(lm, data, cfg)

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe.run(lm, data, cfg, out=tmp_path / "kept.jsonl", progress=stop)
    assert probe.run(lm, data, cfg, out=tmp_path / "kept.jsonl").table() == whole.table()
