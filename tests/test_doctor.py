"""The doctor finds a sound model sound, leaves it alone, and sees each fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_lm

from lmpatch import doctor
from lmpatch.errors import CannotMount
from lmpatch.models.lm import LM
from lmpatch.provenance import hash_tensors


def failed(lm: LM) -> set[str]:
    return {finding.claim for finding in doctor.examine(lm) if not finding.holds}


def bits(lm: LM) -> str:
    return hash_tensors(lm.model.state_dict().items(), exact=True)


def test_every_proof_holds_on_every_family_and_no_bit_moves(any_lm: LM) -> None:
    before = bits(any_lm)
    assert failed(any_lm) == set()
    assert bits(any_lm) == before


def test_every_proof_holds_in_bf16(lm: LM) -> None:
    assert failed(tiny_lm(lm.name.removeprefix("tiny-"), torch.bfloat16)) == set()


def test_a_module_that_never_runs_is_seen() -> None:
    lm = tiny_lm("llama")
    down = lm.module(lm.layout.downs[1])
    lm.module(lm.layout.downs[2].rpartition(".")[0]).down_proj = down  # block 2 now calls block 1's projection
    assert "every hook fires once per forward" in failed(lm)


def test_a_hook_that_changes_what_replay_cannot_see_is_seen() -> None:
    lm = tiny_lm("llama")

    def by_length(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        return output * (1 + args[0].shape[1])

    lm.module(lm.layout.downs[-1]).register_forward_hook(by_length)
    assert "replay equals the plain forward" in failed(lm)


def test_a_mount_that_raises_is_a_failed_proof_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise CannotMount("cannot bake into this one")

    monkeypatch.setattr(doctor, "apply", refuse)
    findings = {finding.claim: finding for finding in doctor.examine(tiny_lm("gpt2"))}
    assert findings["all mounts give the same logits"].detail == "cannot bake into this one"


def test_the_footprint_names_the_weights_and_what_is_free() -> None:
    lm = tiny_lm("gpt2")
    rows = dict(doctor.footprint(lm))
    assert rows["weights"].endswith(("KiB", "MiB"))
    assert "free on cpu" in rows
