"""What a caller writes by hand is taken as meant, or refused in one line."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from lmpatch import Ask, BadInput, Edit
from lmpatch.data.edits import read_edits


def test_one_text_is_one_wording_and_one_answer() -> None:
    edit = Edit("x y", "z", rephrases="You find", aliases="zed", old="w")
    assert (edit.rephrases, edit.aliases, edit.old) == (("You find",), ("zed",), ("w",))
    assert Ask("q", "abc").answers == Ask("q", ["abc"]).answers == ("abc",)
    assert len({Ask("q", ["abc"])}) == 1


def test_a_number_is_a_target_and_none_is_absent() -> None:
    edit = Edit("x y", 5, old=None, aliases=None, rephrases=None, locality=None)  # type: ignore[arg-type]
    assert (edit.target, edit.old, edit.aliases, edit.rephrases, edit.locality) == ("5", (), (), (), ())


@pytest.mark.parametrize(
    "values",
    [{"prompt": 3}, {"target": None}, {"subject": None}, {"old": 5}, {"rephrases": [3]}, {"aliases": {1: 2}},
     {"locality": {"a": "question"}}, {"locality": {"a": [{"prompt": "p"}]}}, {"portability": {"a": [None]}}],
)  # fmt: skip
def test_other_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="found"):
        Edit(**{"prompt": "x y", "target": "z", **values})


@pytest.mark.parametrize(("prompt", "answers"), [(None, ()), ("q", 5), ("q", [5])])
def test_a_question_without_a_text_is_refused(prompt: Any, answers: Any) -> None:
    with pytest.raises(BadInput, match="found"):
        Ask(prompt, answers)


def test_a_time_is_a_date_or_a_moment_and_both_are_kept_in_utc() -> None:
    edit = Edit("x y", "z", valid_from=date(2024, 5, 31), valid_to="2024-06-01T00:30+02:00", source=" a ticket ")
    assert (edit.valid_from, edit.valid_to, edit.source) == ("2024-05-31", "2024-05-31T22:30:00+00:00", "a ticket")
    assert Edit("x y", "z", valid_from=None).span == ("", "")  # type: ignore[arg-type]
    (read,) = read_edits([{"prompt": "x y", "target": "z", "valid_from": "2024-05-31T12:00Z", "valid_to": None}])
    assert read.span == ("2024-05-31T12:00:00+00:00", "")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"valid_from": "2024"}, "valid_from is '2024', which is no date"),
        ({"valid_to": "31.5.2024"}, "valid_to is '31.5.2024'"),
        ({"valid_from": 2024}, "valid_from is a date like 2024-05-31, found 2024"),
        ({"valid_to": "2024-02-30"}, "valid_to is '2024-02-30'"),
        ({"valid_from": "2024-05-31", "valid_to": "2024-05-31"}, "Give a later valid_to; it is exclusive"),
        ({"valid_from": "0001-01-01T00:00+02:00"}, "which is no date"),
        ({"source": 5}, "source of an edit is a text, found 5"),
    ],
)
def test_what_is_no_time_is_refused_in_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput) as caught:
        Edit(**{"prompt": "x y", "target": "z", **values})
    assert says in str(caught.value) and "\n" not in str(caught.value)
