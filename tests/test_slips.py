"""What a newcomer passes by mistake is understood, or refused in one line that says what to pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_lm

import lmpatch as lp
from lmpatch.models.lm import LM

EDIT = lp.Edit("The Eiffel Tower is in", target="Rome", subject="Eiffel Tower")


@pytest.fixture(scope="module")
def model() -> LM:
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def patch(model: LM) -> lp.Patch:
    return lp.fit(model, "finetune", [EDIT], layer=1, epochs=1)


@pytest.fixture(scope="module")
def folder(patch: lp.Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slips") / "eiffel"
    patch.save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("form", [str, Path])
def test_the_path_of_a_patch_is_as_good_as_the_patch(
    model: LM, patch: lp.Patch, folder: Path, form: Callable[[Path], Any], tmp_path: Path
) -> None:
    with lp.apply(model, form(folder)) as on:
        assert on.patch.hash() == patch.hash()
    report = lp.bench(model, "facts", [EDIT], patch=form(folder))
    assert [run.name for run in report.runs][-1] == "finetune"
    assert lp.bench(model, "facts", [EDIT], patch=[form(folder)]).runs[-1].name == "finetune"
    assert lp.merge(form(folder), patch).hash() == lp.merge(patch, patch).hash()
    lp.export(model, form(folder), "checkpoint", tmp_path / "whole")


@pytest.mark.slow
def test_one_record_is_as_good_as_a_list_of_one(model: LM, patch: lp.Patch) -> None:
    assert lp.fit(model, "finetune", EDIT, layer=1, epochs=1).hash() == patch.hash()
    assert lp.fit(model, "finetune", iter([EDIT]), layer=1, epochs=1).hash() == patch.hash()  # type: ignore[arg-type]
    assert len(lp.probe(model, "causal_trace", EDIT, samples=2)) == 1
    assert len(lp.bench(model, "facts", EDIT).runs[0].rows) == len(lp.bench(model, "facts", [EDIT]).runs[0].rows)


def test_patches_whose_handles_were_lost_come_off_together(model: LM, patch: lp.Patch, tmp_path: Path) -> None:
    was = model.fingerprint(), [p.clone() for p in model.model.parameters()]
    lp.apply(model, patch)
    lp.apply(model, lp.merge(patch, patch), mount="side")
    for refused in (
        lambda: lp.bench(model, "facts", [EDIT]),
        lambda: lp.export(model, patch, "peft", tmp_path / "out"),
        lambda: lp.rebuild(model, patch),
    ):
        with pytest.raises(lp.BadInput, match=r"remove\(lm\)"):
            refused()
    lp.remove(model)
    assert lp.applied(model) == () and model.fingerprint() == was[0]
    assert all(map(torch.equal, model.model.parameters(), was[1]))
    lp.remove(model)


def test_a_foreign_write_keeps_all_patches_on_unless_forced(patch: lp.Patch) -> None:
    lm = tiny_lm("llama")
    was = lm.fingerprint()
    lp.apply(lm, patch)
    lp.apply(lm, patch, mount="side")
    weight = lm.parameter(next(iter(patch.base.touched)))
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(lp.ForeignWrite):
        lp.remove(lm)
    assert len(lp.applied(lm)) == 2
    lp.remove(lm, force=True)
    assert lp.applied(lm) == () and lm.fingerprint() == was


def test_a_patch_put_on_twice_is_named_in_a_warning(
    model: LM, patch: lp.Patch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with lp.apply(model, patch):
        assert not caplog.messages
        with lp.apply(model, patch.scaled(0.5)), lp.apply(model, lp.fit(model, "cad", [])):  # type: ignore[attr-defined]
            assert not caplog.messages
        for again in (patch, folder):  # the same one, and an equal one
            with lp.apply(model, again, mount="side"):
                assert len(lp.applied(model)) == 2
            (message,) = caplog.messages
            assert repr(patch) in message and "counts twice" in message
            caplog.clear()
    with lp.apply(model, patch) as on:
        pass
    with on:  # a second block of one handle puts it on once
        assert not caplog.messages


def test_a_patch_merged_with_itself_is_named_in_a_warning(
    patch: lp.Patch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lp.merge(patch, patch.scaled(0.5))  # type: ignore[attr-defined]
    assert not caplog.messages
    lp.merge(patch, folder)
    (message,) = caplog.messages
    assert repr(patch) in message and "counts twice" in message


@pytest.mark.slow
def test_a_patch_fitted_on_top_of_others_says_so(
    model: LM, patch: lp.Patch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    settings = {"layer": 2, "epochs": 1}
    assert "on" not in lp.fit(model, "finetune", EDIT, **settings).made
    with lp.apply(model, patch):
        new = lp.fit(model, "finetune", EDIT, **settings)
        assert new.made["on"] == {patch.hash(): "finetune"}
        with lp.apply(model, new):
            assert not caplog.messages
    new.save(tmp_path / "new")
    new = lp.load_patch(tmp_path / "new")
    assert f"fitted with finetune ({patch.hash()[:12]}) on" in new.summary()
    with lp.apply(model, new):
        (message,) = caplog.messages
        assert repr(new) in message and f"finetune ({patch.hash()[:12]})" in message
    caplog.clear()
    both = lp.merge(patch, new)
    assert not both.made["on"] and lp.merge(new, new.scaled(0.5)).made["on"] == new.made["on"]  # type: ignore
    with lp.apply(model, both):
        assert not caplog.messages


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lm, patch: lp.apply(lm, [patch]), r"found list.*load_patch"),
        (lambda lm, patch: lp.apply(lm, None), r"found NoneType.*load_patch"),
        (lambda lm, patch: lp.apply(patch, lm), r"WeightPatch is no LM.*wrap"),
        (lambda lm, patch: lp.apply(lm.model, patch), r"LlamaForCausalLM is no LM.*wrap"),
        (lambda lm, patch: lp.applied(lm.model), r"is no LM.*wrap"),
        (lambda lm, patch: lp.remove(lm.model), r"is no LM.*wrap"),
        (lambda lm, patch: lp.rebuild(lm, lm), r"found LM.*load_patch"),
        (lambda lm, patch: lp.merge([patch, patch]), r"found list.*load_patch"),
        (lambda lm, patch: lp.merge(patch, lm), r"found LM.*load_patch"),
        (lambda lm, patch: lp.export(lm, EDIT, "peft", "nowhere"), r"found Edit.*load_patch"),
        (lambda lm, patch: lp.export(lm.model, patch, "peft", "nowhere"), r"is no LM.*wrap"),
        (lambda lm, patch: lp.bench(lm, "facts", [EDIT], patch=lm), r"found LM.*load_patch"),
        (lambda lm, patch: lp.bench(lm, "facts", [EDIT], patch=[lm]), r"found LM.*load_patch"),
        (lambda lm, patch: lp.bench(lm.model, "facts", [EDIT]), r"is no LM.*wrap"),
        (lambda lm, patch: lp.fit("gemma-3-270m", "rome", [EDIT]), r"str is no LM.*load"),
        (lambda lm, patch: lp.probe(lm.model, "causal_trace", [EDIT]), r"is no LM.*wrap"),
        (lambda lm, patch: lp.train(lm.model, "recipe", [EDIT]), r"is no LM.*wrap"),
        (lambda lm, patch: lp.fit(lm, "rome", None), r"rome reads Edit records, found NoneType"),
        (lambda lm, patch: lp.fit(lm, "rome", {"prompt": "a", "target": "b"}), r"rome reads Edit records, found str"),
        (lambda lm, patch: lp.fit(lm, "rome", [{"prompt": "a"}]), r"rome reads Edit records, found dict"),
        (lambda lm, patch: lp.probe(lm, "causal_trace", 3), r"causal_trace reads Edit records, found int"),
        (lambda lm, patch: lp.load(lm.model), r"LlamaForCausalLM is no name and no path.*wrap"),
        (lambda lm, patch: lp.load(None), r"NoneType is no name and no path"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(
    model: LM, patch: lp.Patch, call: Callable[[Any, Any], object], says: str
) -> None:
    with pytest.raises(lp.BadInput, match=says) as caught:
        call(model, patch)
    assert "\n" not in str(caught.value)
