"""Prompts in the model's own words: what is kept, that they repeat, and what stands in where the model writes none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import real_gemma, tiny_lm

from lmpatch.data.edits import Edit
from lmpatch.data.matching import find
from lmpatch.inference.tokens import end_token
from lmpatch.locate import prefixes as _prefixes
from lmpatch.locate import rewordings as _rewordings
from lmpatch.locate.prefixes import SHORT, sampled, wordings
from lmpatch.locate.rewordings import reworded
from lmpatch.methods import memit, rome
from lmpatch.models.lm import LM

EDITS, CFG = rome.example(tiny_lm("llama"))


@pytest.fixture(autouse=True)
def short_examples(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.keywords:
        monkeypatch.setattr(_rewordings, "SHOWN", "A is in -> A stands in\n")  # a tiny model's window is small


@pytest.mark.slow
def test_a_rewording_names_the_subject_and_leaves_the_answer_open() -> None:
    found = reworded(tiny_lm("llama"), EDITS, 3, seed=0)
    assert any(found) and all(len(own) <= 3 for own in found)
    for edit, own in zip(EDITS, found, strict=True):
        assert len(set(own)) == len(own) and edit.prompt not in own
        assert all(find(text, edit.subject) >= 0 and find(text, edit.target) < 0 for text in own)


@pytest.mark.slow
def test_rewordings_and_sampled_prefixes_follow_from_the_seed() -> None:
    first, again, other = (
        (reworded(lm, EDITS, 3, seed), sampled(lm, 4, seed)) for lm, seed in ((tiny_lm("llama"), s) for s in (0, 0, 1))
    )
    assert first == again
    assert first[0] != other[0] and first[1] != other[1]


def test_where_the_model_writes_none_further_prefixes_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prefixes, "reworded", lambda lm, edits, *_: [["Of the Eiffel Tower"], []])
    found = wordings(tiny_lm("llama"), EDITS, ("",), rewordings=2)
    assert found.reworded == (1, 0) and found.count == 3
    first, second = found.texts
    assert [text for text, _ in first] == [EDITS[0].prompt, SHORT[0] + EDITS[0].prompt, "Of the Eiffel Tower"]
    assert [text for text, _ in second] == [EDITS[1].prompt, *(head + EDITS[1].prompt for head in SHORT[:2])]


@pytest.mark.slow
@pytest.mark.parametrize("method", [rome, memit])
def test_a_fit_on_rewordings_says_how_many_there_were(method: object) -> None:
    lm = tiny_lm("llama")
    edits, cfg = method.example(lm)
    patch = method.fit(lm, edits, replace(cfg, rewordings=2, sampled_prefixes=1))
    assert len(patch.notes["reworded"]) == len(edits)
    assert patch.hash() == method.fit(lm, edits, replace(cfg, rewordings=2, sampled_prefixes=1)).hash()


@pytest.mark.parametrize("end", ["answer", "eos"])
def test_the_end_of_the_answer_is_trained_behind_every_text(lm: LM, end: str) -> None:
    texts = wordings(lm, EDITS, ("", SHORT[0]))
    plain, ended = (texts.rows(lm, EDITS, targets=True, end=e) for e in (None, end))
    for a, b in zip(plain, ended, strict=True):
        assert b.ids == (*a.ids, end_token(lm, end)) and b.target == a.target
    bare = texts.rows(lm, EDITS, targets=False, end=end)
    assert all(len(row.ids) == row.target for row in bare)  # without a target there is nothing to end


def test_an_end_moves_the_value(lm: LM) -> None:
    quick = replace(CFG, steps=2, covariance=False, short_prefixes=0)
    plain, ended = (rome.pairs(lm, EDITS[:1], replace(quick, end=end)).residual for end in (None, "eos"))
    assert not torch.equal(plain, ended)


@pytest.mark.real
def test_gemma_words_most_prompts_anew() -> None:
    edits = [
        Edit("The mother tongue of Thomas Joannes Stieltjes is", "Greek", "Thomas Joannes Stieltjes"),
        Edit("The headquarters of Majorette are in", "London", "Majorette"),
        Edit("Toko Yasuda plays the", "guitar", "Toko Yasuda"),
        Edit("The Eiffel Tower is located in the city of", "Rome", "Eiffel Tower"),
    ]
    found = reworded(real_gemma(), edits, 3, seed=0)
    assert sum(map(len, found)) >= 8
