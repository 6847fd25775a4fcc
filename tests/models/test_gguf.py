"""Converting ``.gguf`` files: the light reader, dense weights, digits, kills and several processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_gguf
from tiny import tiny_tokenizer

from lmpatch.errors import BadInput
from lmpatch.models import gguf
from lmpatch.models.load import load

LOAD = """
import sys
from lmpatch.models.load import load
steps = []
lm = load(sys.argv[1], progress=lambda done, total, what: steps.append(done))
print(lm.fingerprint(), "converted" if steps else "waited")
"""
CONVERT = """
import time
from lmpatch.models import gguf

def convert(file, out, report):
    print("begun", flush=True)
    while not (out.parents[1] / "go").exists():
        time.sleep(0.02)
    out.mkdir()
    (out / "done").touch()

gguf._convert = convert
gguf.converted("x", "0000", lambda where: where)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_the_light_reader_sees_all_but_the_lists_of_tokens(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    whole, light = (read(tmp_path / "tiny.gguf") for read in (library.GGUFReader, gguf._light_reader()))
    lists = {f"tokenizer.ggml.{name}" for name in ("tokens", "token_type")}  # the merges are few here
    assert light.fields["qwen2.vocab_size"].contents() == 304
    assert {name for name, field in light.fields.items() if not field.data} == lists
    for name in set(whole.fields) - lists:
        assert light.fields[name].contents() == whole.fields[name].contents(), name
    for a, b in zip(whole.tensors, light.tensors, strict=True):
        assert a.name == b.name and a.tensor_type == b.tensor_type and (a.data == b.data).all()


@pytest.mark.slow
def test_the_number_of_tokens_is_the_length_of_their_list_where_the_file_does_not_say_it(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", vocab_size=False)
    assert gguf._light_reader()(tmp_path / "tiny.gguf").fields["qwen2.vocab_size"].parts[0] == 304
    assert load(tmp_path / "tiny.gguf").layout.vocab == 304


@pytest.mark.slow
def test_dense_weights_are_asked_for_and_packed_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf")
    read, asked = AutoModelForCausalLM.from_pretrained, list[Any]()

    def packed(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("quantization_config"))
        return read(*args, **kwargs | {"dtype": torch.float16})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", packed)
    with pytest.raises(BadInput, match="left .* weights of .*packed"):
        load(tmp_path / "tiny.gguf")
    if hasattr(pytest.importorskip("transformers"), "GgufConfig"):
        assert asked[0].dequantize


def test_digits_are_cut_one_by_one_where_the_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.from_pretrained", lambda **_: tiny_tokenizer())
    tokenizers = [gguf._tokenizer(tmp_path / "x.gguf", "llama", pre) for pre in ("", "smollm")]
    cuts = [[piece for piece, _ in t.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  2024")] for t in tokenizers]
    assert cuts == [["in", "Ġ", "Ġ2024"], ["in", "ĠĠ", "2", "0", "2", "4"]]


@pytest.mark.slow
def test_progress_goes_forward_to_the_end_and_nothing_is_drawn(
    tmp_path: Path, own_cache: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    steps: list[tuple[int, int]] = []
    load(tmp_path / "tiny.gguf", progress=lambda done, total, what: steps.append((done, total)))
    assert steps == sorted(steps) and steps[0] == (0, 100) and steps[-1] == (100, 100)
    assert len(steps) > 20
    assert "it/s" not in capfd.readouterr().err
    assert f"tiny is kept as {own_cache / 'tiny-'}" in caplog.text and "iB); lmpatch cache --clear" in caplog.text
    caplog.clear()
    load(tmp_path / "tiny.gguf")
    assert not caplog.text  # said once


def _start(code: str, *args: Path) -> subprocess.Popen[str]:
    source = str(Path(gguf.__file__).parents[2])
    env = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def started(own_cache: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that converts, and waits within."""
    with _start(CONVERT) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_a_killed_process_leaves_no_folder_and_the_next_one_converts(
    started: subprocess.Popen[str], own_cache: Path
) -> None:
    started.kill()
    started.wait()
    assert [path.name for path in own_cache.iterdir() if path.is_dir()] == ["x-0000.partial"]
    made: list[Path] = []
    with pytest.raises(BadInput, match="as GGUF cannot be read"):
        gguf.converted("x", "0000", lambda where: made.append(where) or where / "none")  # type: ignore[func-returns-value]
    assert made and not [path.name for path in own_cache.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_converts_nothing(
    started: subprocess.Popen[str], own_cache: Path
) -> None:
    waited = threading.Thread(target=gguf.converted, args=("x", "0000", pytest.fail))
    waited.start()
    waited.join(0.3)
    assert waited.is_alive()
    (own_cache / "go").touch()
    waited.join(20)
    assert not waited.is_alive() and (own_cache / "x-0000" / "done").exists()


@pytest.mark.slow
def test_two_processes_that_load_one_file_convert_once(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    both = [_start(LOAD, tmp_path / "tiny.gguf") for _ in range(2)]
    said = [process.communicate()[0].split() for process in both]
    assert {process.returncode for process in both} == {0}
    assert said[0][0] == said[1][0]
    assert sorted(line[1] for line in said) == ["converted", "waited"]
