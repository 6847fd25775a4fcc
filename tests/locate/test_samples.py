"""Sample texts: shipped for the packaged models, written once by any other, gone on with after Ctrl-C."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from snapshot import Lines, name
from tiny import tiny_lm

from lmpatch import tensor_file
from lmpatch.locate import covariance as _moments
from lmpatch.locate import samples as _samples
from lmpatch.locate.covariance import accumulate, estimate_covariance
from lmpatch.locate.samples import LENGTH, SHIPPED, own_rows
from lmpatch.models import packaged
from lmpatch.models.lm import LM
from lmpatch.models.load import load

SHORT = 32  # tokens per row here, so that texts are soon written
TOKENS = 512


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    if "real" not in request.keywords:
        monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path))
        monkeypatch.setattr(_samples, "LENGTH", SHORT)
        monkeypatch.setattr(_moments, "LENGTH", SHORT)
    return tmp_path


def stop_at(step: int, of: str = "") -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, what: str) -> None:
        if done == step and what.startswith(of):
            raise KeyboardInterrupt

    return progress


@pytest.mark.slow
def test_rows_are_whole_start_alike_and_depend_on_the_seed(lm: LM) -> None:
    rows = own_rows(lm, TOKENS, 0, keep=False)
    assert rows.shape == (-(-TOKENS // (SHORT - 1)), SHORT)
    assert set(rows[:, 0].tolist()) == {lm.tokenizer.bos_token_id}
    assert not torch.isin(rows[:, 1:], torch.tensor(lm.tokenizer.all_special_ids)).any()
    assert not torch.equal(rows, own_rows(lm, TOKENS, 1, keep=False))


@pytest.mark.slow
def test_a_model_writes_once_and_another_layer_reads_the_same_text(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = estimate_covariance(lm, [1], tokens=TOKENS)
    monkeypatch.setattr(_samples, "_sample", pytest.fail)
    assert estimate_covariance(lm, [2], tokens=TOKENS).tokens == first.tokens


@pytest.mark.slow
def test_another_model_another_count_and_a_torn_file_are_written_anew(own_cache: Path) -> None:
    a, b = tiny_lm("llama", seed=0), tiny_lm("llama", seed=1)
    rows = own_rows(a, TOKENS, 0)
    assert not torch.equal(rows, own_rows(b, TOKENS, 0))
    assert len(own_rows(a, 2 * TOKENS, 0)) > len(rows)
    for file in own_cache.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(own_rows(a, TOKENS, 0), rows)


@pytest.mark.slow
def test_what_ctrl_c_interrupts_is_gone_on_with(lm: LM, own_cache: Path) -> None:
    whole = own_rows(lm, TOKENS, 0, keep=False)
    with pytest.raises(KeyboardInterrupt):
        own_rows(lm, TOKENS, 0, progress=stop_at(20))
    (partial,) = own_cache.rglob("*.partial")
    steps: list[int] = []
    rows = own_rows(lm, TOKENS, 0, progress=lambda done, total, what: steps.append(done))
    assert steps == list(range(21, SHORT))
    assert torch.equal(rows[:, :21], whole[:, :21]) and rows.shape == whole.shape
    assert not partial.exists()


@pytest.mark.slow
def test_an_unfinished_text_is_written_out_now_and_then(
    lm: LM, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(done: int, total: int, what: str) -> None:
        if done == 20:
            raise SystemExit

    monkeypatch.setattr(_samples, "EVERY", 0.0)
    with pytest.raises(SystemExit):
        own_rows(lm, TOKENS, 0, progress=dies)
    (partial,) = own_cache.rglob("*.partial")
    assert tensor_file.read(partial)[1]["ids"].shape[1] == 20


@pytest.mark.slow
def test_it_is_said_what_is_done_and_how_long_it_takes(lm: LM) -> None:
    said: set[str] = set()
    own_rows(lm, TOKENS, 0, progress=lambda done, total, what: said.add(what))
    assert len(said) == 1
    assert re.match(r"the model writes 512 tokens of sample text, once \(about \d+ (seconds|minutes);", said.pop())
    assert "about 9 minutes" in _samples._announce(20480, 550)


@pytest.mark.slow
def test_interrupted_moments_go_on_to_the_same_bits(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, folder = tiny_lm("llama"), own_cache / "moments"
    rows = own_rows(lm, 8 * TOKENS, 0)
    monkeypatch.setattr(_moments, "AGREE", 2.0)  # so that every row counts
    whole = accumulate(lm, rows, [0, 2])
    with pytest.raises(KeyboardInterrupt):
        accumulate(lm, rows, [0, 2], folder, stop_at(80))
    steps: list[int] = []
    again = accumulate(lm, rows, [0, 2], folder, lambda done, total, what: steps.append(done))
    assert steps[0] == 88
    assert again[1:] == whole[1:]
    assert all(torch.equal(again[0][layer], whole[0][layer]) for layer in (0, 2))
    with pytest.raises(KeyboardInterrupt):
        accumulate(lm, rows, [0, 2], folder, stop_at(96))
    accumulate(lm, rows, [0], folder, lambda done, total, what: steps.append(done))
    assert 8 in steps  # with other layers it starts at the beginning


@pytest.mark.slow
def test_finished_moments_leave_no_partial_sums(lm: LM, own_cache: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        estimate_covariance(lm, [1], tokens=TOKENS, progress=stop_at(8, "second moments"))
    assert list(own_cache.rglob(_moments.PARTIAL))
    estimate_covariance(lm, [1], tokens=TOKENS)
    assert not list(own_cache.rglob(_moments.PARTIAL))


@pytest.mark.slow
def test_moments_interrupted_at_any_line_go_on_to_the_same_bits(own_cache: Path) -> None:
    """No batch is added by half, or twice."""
    lm, folder = tiny_lm("llama"), own_cache / "moments"
    rows = own_rows(lm, TOKENS, 0)
    (whole, *facts), lines = accumulate(lm, rows, [0, 2]), Lines(lambda: accumulate(lm, rows, [0, 2], folder))
    own = {
        line: times for line, times in lines.times.items() if name(line).startswith(("/locate", "/tensor", "/files"))
    }
    for line, times in own.items():
        for time in {1, (times + 1) // 2, times}:
            assert lines.interrupted(line, time)
            again, *told = accumulate(lm, rows, [0, 2], folder)
            assert told == facts and all(torch.equal(again[layer], whole[layer]) for layer in (0, 2)), name(line)
            (folder / _moments.PARTIAL).unlink(missing_ok=True)


@pytest.mark.parametrize("file", sorted(SHIPPED.iterdir()), ids=lambda file: file.stem)
def test_the_shipped_ids_are_named_by_the_model_that_wrote_them(file: Path) -> None:
    told, tensors = tensor_file.read(file)
    ids = tensors["ids"]
    fingerprint, tokens, seed = file.stem.split("-")
    assert (told["tokens"], told["seed"]) == (tokens, seed)
    assert told["fingerprint"].startswith(fingerprint) and told["model"] in packaged.MODELS
    assert ids.shape == (-(-int(tokens) // (LENGTH - 1)), LENGTH) and seed == "0"
    assert len(ids[:, 0].unique()) == 1 and len(ids[:, 1:].unique()) > 2000


@pytest.mark.real
@pytest.mark.parametrize("name", packaged.MODELS)
def test_the_shipped_ids_are_found_for_the_packaged_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packaged.MODELS[name].installed:
        pytest.skip(f"not installed: {packaged.MODELS[name].install}")
    lm = load(name)
    monkeypatch.setattr(_samples, "_sample", pytest.fail)
    rows = own_rows(lm, 10 * lm.layout.d_ff, 0, keep=False)
    assert set(rows[:, 0].tolist()) == {lm.tokenizer.bos_token_id}
    assert rows.max() < lm.layout.vocab
