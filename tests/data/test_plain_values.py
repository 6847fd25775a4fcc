"""What a caller writes by hand is taken as meant, or refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from lmpatch import Ask, BadInput, Edit


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
