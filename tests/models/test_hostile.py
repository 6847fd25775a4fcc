"""Model folders from anyone: each loads to the model it holds, or is refused in one line of the error tree."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model, tiny_tokenizer

from lmpatch.errors import BadInput, LmpatchError
from lmpatch.inference.generate import generate
from lmpatch.inference.score import score
from lmpatch.models.lm import LM
from lmpatch.models.load import load, wrap

DOWN = "model.layers.2.mlp.down_proj.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees or fills the user's caches, or asks the hub."""
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.model_info", pytest.fail)


def save(folder: Path, family: str = "llama", **settings: Any) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    tiny_model(family, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path | str, **settings: Any) -> str:
    with pytest.raises(LmpatchError) as caught:
        load(folder, **settings)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# -- weights ---------------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    rewrite(save(tmp_path / "m"), lambda w: {name: t for name, t in w.items() if name != DOWN})
    assert f"1 missing: {DOWN}" in refused(tmp_path / "m")


def test_one_altered_bit_of_a_name_is_a_missing_and_an_unknown_tensor(tmp_path: Path) -> None:
    file = save(tmp_path / "m") / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(DOWN.encode()) + 3] ^= 1
    file.write_bytes(bytes(data))
    message = refused(tmp_path / "m")
    altered = DOWN.replace("model", "moddl", 1)
    assert f"(1 missing: {DOWN}; 1 that the model does not have: {altered})" in message


@pytest.mark.parametrize(
    ("layers", "said"), [(5, r"9 missing: model\.layers\.4"), (3, "9 that the model does not have")]
)
def test_a_config_of_other_depth_is_refused(layers: int, said: str, tmp_path: Path) -> None:
    edit(save(tmp_path / "m") / "config.json", num_hidden_layers=layers, layer_types=None)
    with pytest.raises(BadInput, match=said):
        load(tmp_path / "m")


def test_a_depth_beyond_the_number_of_tensors_is_refused_before_a_model_is_built(tmp_path: Path) -> None:
    edit(save(tmp_path / "m") / "config.json", num_hidden_layers=10**9, layer_types=None)
    assert "num_hidden_layers = 1,000,000,000, and the weights are 39 tensors" in refused(tmp_path / "m")


@pytest.mark.slow
def test_a_config_of_a_far_larger_model_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    edit(save(tmp_path / "m") / "config.json", model_type="gemma3")
    assert "weights, and the files hold 186,944" in refused(tmp_path / "m")


@pytest.mark.parametrize("change", ["tensor", "vocab_size"])
def test_another_shape_is_named(change: str, tmp_path: Path) -> None:
    save(tmp_path / "m")
    if change == "tensor":
        rewrite(tmp_path / "m", lambda w: w | {DOWN: torch.zeros(64, 100)})
    else:
        edit(tmp_path / "m" / "config.json", vocab_size=310)
    assert "of another shape: " + {"tensor": DOWN, "vocab_size": "lm_head"}[change] in refused(tmp_path / "m")


@pytest.mark.slow
def test_partial_weights_are_taken_by_those_who_mean_it_and_said(tmp_path: Path) -> None:
    rewrite(
        save(tmp_path / "m"),
        lambda w: {n: t for n, t in w.items() if n != DOWN} | {"lm_head.weight": torch.zeros(9, 64)},
    )
    with pytest.warns(UserWarning, match=rf"1 missing: {DOWN}; 1 of another shape: lm_head"):
        assert load(tmp_path / "m", partial=True).layout.n_layers == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_rightly_absent_are_no_gap(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    lm, ids = load(tmp_path / "m"), torch.tensor([[1, 40, 50]])
    assert torch.equal(lm.model(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_constants_that_old_checkpoints_hold_are_no_gap(tmp_path: Path) -> None:
    save(tmp_path / "m", "gptj")
    rewrite(tmp_path / "m", lambda w: w | {"transformer.h.0.attn.masked_bias": torch.zeros(1)})
    assert load(tmp_path / "m").layout.n_layers == 4


@pytest.mark.parametrize("name", ["w.bin", "../model.safetensors", "w.safetensors/../w.bin", "/etc/passwd", 5, None])
@pytest.mark.parametrize("beside", [True, False])
def test_an_index_that_names_anything_but_safetensors_is_refused_and_never_read(
    name: Any, beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "w.bin")
    if not beside:
        (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(torch, "load", pytest.fail)
    assert "only .safetensors files beside it are read" in refused(folder)


@pytest.mark.slow
def test_shards_are_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "m", max_shard_size="100kB")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 1
    ids = torch.tensor([[1, 40, 50]])
    assert torch.equal(load(tmp_path / "m").model(ids).logits, model(ids).logits)
    files[1].unlink()
    assert files[1].name in refused(tmp_path / "m")


# -- other files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"", "cannot be read"),
        (b"\x80\x04not safetensors", "cannot be read"),
        (b"\xff" * 8 + b"{}", "cannot be read"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (save(tmp_path / "m") / "model.safetensors").write_bytes(content)
    assert said in refused(tmp_path / "m")


def test_a_pipe_or_a_device_is_refused_and_not_opened(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        file = save(tmp_path / "m") / name
        file.unlink()
        os.mkfifo(file)
        assert "no ordinary file" in refused(tmp_path / "m")
        file.unlink()
        file.symlink_to("/dev/zero")
        assert "no ordinary file" in refused(tmp_path / "m")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (save(tmp_path / "m") / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    assert "holds an adapter" in refused(tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("end", [[[[]]], "x", [2, None], 1.5, -1, {"a": 1}])
def test_an_end_token_that_is_none_is_refused_or_passed_over(end: Any, tmp_path: Path) -> None:
    edit(save(tmp_path / "m") / "generation_config.json", eos_token_id=end)
    with suppress(LmpatchError):
        lm = load(tmp_path / "m")
        assert generate(lm, "Apple", max_new_tokens=3) == generate(
            load(save(tmp_path / "n")), "Apple", max_new_tokens=3
        )


def test_a_tokenizer_that_makes_its_library_panic_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "m") / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["continuing_subword_prefix"] = "é" * 50
    file.write_text(json.dumps(described))
    assert "cannot be read" in refused(tmp_path / "m")


@pytest.mark.parametrize("name", ["a" * 300, "~nosuchuser/x", "a/" * 3000, "", ".", "a\0b", "\ud800"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    refused(name)


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "meta", "nonsense", "cpu:x", 5.5])
def test_a_device_that_is_not_there_is_refused(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() and device == "cuda":
        pytest.skip("there is one")
    save(tmp_path / "m")
    assert "cannot be used here" in refused(tmp_path / "m", device=device)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [4, 8, 24, 100, 2000, -100_000, -1])
def test_a_truncated_gguf_file_is_refused(cut: int, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf")
    os.truncate(tmp_path / "x.gguf", cut % (tmp_path / "x.gguf").stat().st_size)
    assert "x.gguf" in refused(tmp_path / "x.gguf")


@pytest.mark.parametrize("change", [b"blk.2.attn_q.weight", b"qwen2.block_count"])
def test_a_gguf_file_whose_weights_are_not_those_of_its_head_is_refused(change: bytes, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf")
    data = bytearray((tmp_path / "x.gguf").read_bytes())
    at = data.index(change) + len(change)
    if change == b"qwen2.block_count":
        assert data[at + 4] == 4  # behind the type
        data[at + 4] = 3
    else:
        data[at - 3] ^= 1
    (tmp_path / "x.gguf").write_bytes(bytes(data))
    assert "blocks" in refused(tmp_path / "x.gguf") or "missing" in refused(tmp_path / "x.gguf")


def test_a_cache_that_is_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "x.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMPATCH_CACHE", str(tmp_path / "file"))
    assert str(tmp_path / "file") in refused(tmp_path / "x.gguf")


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_a_pad_id_without_an_embedding_row_is_replaced_and_said() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    model = tiny_model("llama", vocab_size=300)
    with pytest.warns(UserWarning, match="the pad token has id 300, the model 300 tokens"):
        lm = wrap(model, tokenizer)
    assert lm.tokenizer.pad_token == "<eos>"
    prompts = ["The Eiffel Tower is in", "Apple"]
    alone = [generate(lm, prompt, max_new_tokens=4) for prompt in prompts]
    assert generate(lm, prompts, max_new_tokens=4) == alone
    assert len(score(lm, prompts, ["Rome", "is"])) == 2


def test_a_token_without_an_embedding_row_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Zorblax"])
    lm = wrap(tiny_model("llama", vocab_size=300), tokenizer)
    with pytest.raises(BadInput, match="'Zorblax' has id 300, and .* 300 embedding rows"):
        generate(lm, "Zorblax lives in", max_new_tokens=1)


# -- anything --------------------------------------------------------------------------------------------------------

CONFIG_VALUES: tuple[Any, ...] = (None, -1, 0, 3, 7, 10**12, 1.5, "x", [], {}, True, [1, 2], {"a": 1}, float("nan"))
SAME = {"model_type", "architectures", "rms_norm_eps", "hidden_act", "rope_theta", "rope_parameters", "head_dim"}


def mutations(folder: Path, draw: random.Random) -> Iterator[str]:
    """One fault a step, in a fresh copy of the folder each time."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    keys = sorted(json.loads(config.read_text()))
    texts = sorted(path.name for path in folder.glob("*.json"))
    while True:
        kind = draw.choice(["config", "config", "cut", "head", "text", "type", "gone"])
        if kind == "config":
            key, value = draw.choice(keys), draw.choice(CONFIG_VALUES)
            edit(config, **{key: value})
            yield f"{key} = {value!r}"
        elif kind == "cut":
            file = folder / draw.choice([*texts, weights.name])
            os.truncate(file, draw.randrange(file.stat().st_size))
            yield f"{file.name} cut"
        elif kind == "head":  # the head of the weights: names, shapes, places
            data = bytearray(weights.read_bytes())
            at = draw.randrange(8 + int.from_bytes(data[:8], "little"))
            data[at] ^= 1 << draw.randrange(8)
            weights.write_bytes(bytes(data))
            yield f"bit of byte {at}"
        elif kind == "text":
            file = folder / draw.choice(texts)
            data = bytearray(file.read_bytes())
            at = draw.randrange(len(data))
            data[at] ^= 1 << draw.randrange(8)
            file.write_bytes(bytes(data))
            yield f"{file.name}: bit of byte {at}"
        elif kind == "type":
            file = folder / draw.choice(texts)
            file.write_text(
                draw.choice(
                    [
                        "null",
                        "[]",
                        "5",
                        '"x"',
                        "{}",
                        "[" * 2000,
                        '{"a": ' * 500,
                        "\ud800".encode("utf-8", "surrogatepass").decode("latin1"),
                    ]
                )
            )
            yield f"{file.name} is something else"
        else:
            file = folder / draw.choice([*texts, weights.name])
            file.unlink()
            yield f"{file.name} gone"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(6))
def test_a_hostile_folder_is_one_line_or_the_same_model(seed: int, tmp_path: Path) -> None:
    whole = save(tmp_path / "whole")
    want = {name: tuple(t.shape) for name, t in load(whole).model.named_parameters()}
    clean = load(whole).fingerprint()
    draw = random.Random(seed)
    for _ in range(30):  # six times
        folder = shutil.copytree(whole, tmp_path / "m", dirs_exist_ok=False)
        fault = next(mutations(folder, draw))
        try:
            lm: LM | None = load(folder)
        except LmpatchError as error:
            assert str(error) and "\n" not in str(error), fault
            lm = None
        if lm is not None:
            assert {name: tuple(t.shape) for name, t in lm.model.named_parameters()} == want, fault
            assert lm.fingerprint() == clean, fault
        shutil.rmtree(folder)
