"""What a person sees of a value is one line; progress in a notebook is a bar for each piece of work."""

from __future__ import annotations

import pytest
from tiny import tiny_lm

import lmpatch as lp
from lmpatch.methods.recipe.method import example_editor


@pytest.mark.slow
def test_a_model_is_one_line_and_names_the_patches_on_it() -> None:
    lm = tiny_lm("llama")
    line = repr(lm)
    assert line.startswith("LM(tiny-llama: LlamaForCausalLM of 4 layers, d=64, ") and "\n" not in line
    assert line.endswith("float32 on cpu, patches: none)")
    patch = lp.fit(lm, "rome", [lp.Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower")], covariance=False, steps=2)
    with lp.apply(lm, patch):
        assert repr(lm).endswith("patches: rome)")
        assert "<td>rome</td>" in lm._repr_html_()


@pytest.mark.slow
def test_an_editor_and_results_of_probes_are_one_line() -> None:
    lm = tiny_lm("llama")
    (trace,) = lp.probe(lm, "causal_trace", [lp.Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower")], samples=2)
    record = lp.ContextRecord("The Eiffel Tower is in Rome.", "Where is the Eiffel Tower?", "Rome")
    scores = lp.probe(lm, "integrated_gradients", [record], steps=2)
    for value in (example_editor(lm), trace, scores):
        assert repr(value).startswith(f"{type(value).__name__}(")
        assert "\n" not in repr(value) and len(repr(value)) < 200


def test_completion_offers_the_public_names_alone() -> None:
    assert dir(lp) == sorted(lp.__all__)


def test_a_bar_for_each_piece_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    report = lp.progress_bar()
    for what in ("first", "second", "first"):
        report(1, 2, what)
        report(2, 2, what)
    shown = capsys.readouterr().err
    assert shown.count("first: 100%") == 2 and shown.count("second: 100%") == 1
