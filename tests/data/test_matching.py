"""Matching answers: normalised on both sides, at word boundaries, the old answer in mind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmpatch.data.edits import Edit
from lmpatch.data.matching import find, first, match, normalise, same
from lmpatch.errors import SubjectNotFound


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The  “Paris”, (France)! ", "paris france"),
        ("ＰＡＲＩＳ", "paris"),
        ("Straße", "strasse"),
        ("the U.S. of A.", "u.s of a"),
        ("An apple", "apple"),
        ("Anapple", "anapple"),
        ("the", "the"),
        ("...", ""),
        ("New-York — city", "new-york city"),
    ],
)
def test_normalisation_leaves_the_words(text: str, plain: str) -> None:
    assert normalise(text) == plain


@pytest.mark.slow
@settings(deadline=None)
@given(st.text(max_size=40))
def test_case_padding_and_a_full_stop_never_matter(text: str) -> None:
    assert same(f"  {text}\t", text)
    if normalise(text) and not text[-1:].isspace():
        assert same(text + ".", text)


@pytest.mark.slow
@settings(deadline=None)
@given(st.text(alphabet="bc d", min_size=1, max_size=12).filter(str.strip), st.text(alphabet="xyz ", max_size=12))
def test_an_answer_that_begins_with_the_alias_is_right_by_prefix(alias: str, rest: str) -> None:
    assert match(f"{alias} {rest}", [alias]).em


@pytest.mark.parametrize(
    ("said", "alias", "em"),
    [
        (" Rome, the capital of Italy.", "Rome", True),
        (" Rome's old town", "Rome", True),
        (" Romeo and Juliet", "Rome", False),
        (" the city of Rome", "Rome", False),
        (" 2,000 people", "2", False),
        (" 2.5", "2", False),
        (" 2. It", "2", True),
        (" the United States", "United States", True),
        (" Hague", "The Hague", True),
        ("", "Rome", False),
        (" anything", "!", False),
    ],
)
def test_prefix_matching_respects_word_boundaries(said: str, alias: str, em: bool) -> None:
    assert match(said, [alias]).em is em


def test_the_full_rule_wants_the_whole_reply() -> None:
    assert match("Rome.", ["Rome"], rule="full").em
    assert not match("Rome, Italy", ["Rome"], rule="full").em
    assert not match("", [""], rule="full").em


def test_any_alias_is_enough() -> None:
    assert match("the UK", ["United Kingdom", "UK"]).em


@pytest.mark.parametrize(
    ("said", "contains", "old_first"),
    [
        ("in the city of Rome", True, False),
        ("in Rome, not Paris", True, False),
        ("in Paris, or Rome", False, True),
        ("in Paris", False, True),
        ("in Berlin", False, False),
    ],
)
def test_an_answer_counts_only_before_the_old_one(said: str, contains: bool, old_first: bool) -> None:
    found = match(said, ["Rome"], ["Paris"])
    assert (found.contains, found.old_first) == (contains, old_first)


def test_an_old_answer_that_is_also_wanted_does_not_count() -> None:
    assert not match("Islam", ["Islam"], ["islam"]).old_first


def test_the_first_place_is_the_earliest_of_all_aliases() -> None:
    assert first("a b c", ["c", "b"]) == 2
    assert first("abc", ["b"]) is None


@pytest.mark.parametrize(
    ("subject", "prompt", "at"),
    [
        ("Rome", "Rome is in", 0),
        ("Rome", "Rome's mayor is", 0),
        ("Rome", "The mayor (of Rome) is", 14),
        ("Rome", "Romeo is loved by", -1),
        ("Rome", "Jerome was born in", -1),
        ("Rome", "Romeo was seen in Rome, where", 18),
        ("Ann", "Anna is the sister of Ann-Marie and", 22),
        ("Apollo 1", "Apollo 11 was launched in", -1),
        ("Cafe", "Cafe\u0301 Noir is in", -1),  # the accent is a sign of its own
        ("X", "Cafe\u0301X is in", -1),
        ("C++", "C++ was made by", 0),
        ("東京", "東京は日本の", 0),
        ("日本", "東京は日本の", 3),
        (
            "กรุงเทพ",
            "เมืองกรุงเทพคือ",
            5,
        ),
        ("서울", "서울은 한국의", 0),
        (
            "दिल्ली",
            "दिल्ली। भारत",
            0,
        ),
        ("दिल्ल", "दिल्ली भारत", -1),
        (
            "Москва",
            "Москва - столица",
            0,
        ),
        ("Tower", "東京Towerは", 2),
    ],
)
def test_a_subject_is_found_as_whole_words(subject: str, prompt: str, at: int) -> None:
    assert find(prompt, subject) == at
    edit = Edit(prompt, "x", subject)
    if at < 0:
        with pytest.raises(SubjectNotFound, match="words of its own"):
            edit.need_subject()
    else:
        edit.need_subject()


def test_a_subject_is_looked_for_from_a_place_on_and_none_is_nowhere() -> None:
    assert find("Rome and Rome", "Rome", 1) == 9 and find("xRome", "Rome", 1) == -1 and find("Rome", "") == -1
