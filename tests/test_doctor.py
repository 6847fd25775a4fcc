"""The doctor finds a sound model sound, leaves it alone, and sees each fault."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import EOS, tiny_lm, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lmpatch import doctor
from lmpatch.errors import CannotMount
from lmpatch.inference.states import hidden
from lmpatch.inference.tokens import encode_all
from lmpatch.models.lm import LM
from lmpatch.models.load import wrap
from lmpatch.patches.ledger import apply
from lmpatch.provenance import hash_tensors


def failed(lm: LM) -> set[str]:
    return {finding.claim for finding in doctor.examine(lm) if not finding.holds}


def bits(lm: LM) -> str:
    return hash_tensors(lm.model.state_dict().items(), exact=True)


@pytest.mark.slow
def test_every_proof_holds_on_every_family_and_no_bit_moves(any_lm: LM) -> None:
    before = bits(any_lm)
    assert failed(any_lm) == set()
    assert bits(any_lm) == before


def test_every_proof_holds_in_bf16(lm: LM) -> None:
    assert failed(tiny_lm(lm.name.removeprefix("tiny-"), torch.bfloat16)) == set()


@pytest.mark.slow
def test_a_module_that_never_runs_is_seen() -> None:
    lm = tiny_lm("llama")
    down = lm.module(lm.layout.downs[1])
    lm.module(lm.layout.downs[2].rpartition(".")[0]).down_proj = down  # block 2 now calls block 1's projection
    assert "every hook fires once per forward" in failed(lm)


@pytest.mark.slow
def test_a_hook_that_changes_what_replay_cannot_see_is_seen() -> None:
    lm = tiny_lm("llama")

    def by_length(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        return output * (1 + args[0].shape[1])

    lm.module(lm.layout.downs[-1]).register_forward_hook(by_length)
    assert "replay equals the plain forward" in failed(lm)


@pytest.mark.slow
def test_a_mount_that_raises_is_a_failed_proof_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise CannotMount("cannot bake into this one")

    monkeypatch.setattr(doctor, "apply", refuse)
    findings = {finding.claim: finding for finding in doctor.examine(tiny_lm("gpt2"))}
    assert findings["all mounts give the same logits"].detail == "cannot bake into this one"


def detail(lm: LM, claim: str) -> str:
    """What is said of a proof that failed."""
    (finding,) = [finding for finding in doctor.examine(lm) if finding.claim == claim]
    assert not finding.holds
    return finding.detail


@pytest.mark.slow
def test_a_proof_that_crashes_is_a_failed_one_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise IndexError("index out of range\nin self")

    monkeypatch.setattr(doctor, "hidden", crash)
    said = detail(tiny_lm("llama"), "a padded batch gives what single prompts give")
    assert said == "IndexError: index out of range in self"


WHOLE = "every weight is in the model's files, and each is a finite number"


@pytest.mark.slow
def test_weights_that_a_model_folder_lacks_are_named(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    assert WHOLE not in failed(wrap(AutoModelForCausalLM.from_pretrained(tmp_path), tiny_tokenizer()))
    weights = load_file(tmp_path / "model.safetensors")
    lost = sorted(weights)[4]
    weights["x." + lost] = weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    said = detail(wrap(AutoModelForCausalLM.from_pretrained(tmp_path), tiny_tokenizer()), WHOLE)
    assert f"{lost} is missing" in said and f"x.{lost} is unexpected" in said


@pytest.mark.slow
def test_a_weight_that_is_no_number_is_named() -> None:
    lm = tiny_lm("llama")
    lm.parameter("lm_head.weight").data[3, 3] = float("nan")
    assert detail(lm, WHOLE).startswith("lm_head.weight holds NaN or infinity")


@pytest.mark.slow
def test_a_special_token_behind_a_text_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(lm: LM, texts: Any) -> Any:
        return [SimpleNamespace(ids=(*row.ids, EOS)) for row in encode_all(lm, texts)]

    monkeypatch.setattr(doctor, "encode_all", ending)
    said = detail(tiny_lm("llama"), "a text comes back from its tokens, and no special token stands behind it")
    assert said.count("ends in '<eos>'") == len(doctor.PROMPTS)


@pytest.mark.slow
def test_threads_that_get_each_others_answers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(lm: LM, prompts: Any) -> torch.Tensor:
        mine = threading.current_thread() is threading.main_thread()
        with lm.lock:
            return hidden(lm, list(prompts) if mine else doctor.PROMPTS[:1])

    monkeypatch.setattr(doctor, "hidden", mixed)
    assert "20 of 30 answers" in detail(tiny_lm("llama"), "two threads get each its own answers")


@pytest.mark.slow
def test_a_change_that_an_interrupt_leaves_behind_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(lm: LM, patch: Any, mount: Any = None) -> Any:
        try:
            return apply(lm, patch, mount=mount)
        except KeyboardInterrupt:
            lm.parameter("lm_head.weight").data[0, 0] += 1
            raise

    monkeypatch.setattr(doctor, "apply", careless)
    assert INTERRUPT in failed(tiny_lm("llama"))


INTERRUPT = "an interrupt while a patch goes on or comes off leaves the model as it was"


def test_the_footprint_names_the_weights_and_what_is_free() -> None:
    lm = tiny_lm("gpt2")
    rows = dict(doctor.footprint(lm))
    assert rows["weights"].endswith(("KiB", "MiB"))
    assert "free on cpu" in rows
