"""From what a user wrote (``steps=20``) to a checked ``Config``.

A ``Config`` is a frozen dataclass whose fields are ``int``, ``float``, ``bool``, ``str``, ``Literal[...]``,
``tuple[X, ...]``, or one of these ``| None``.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import BadInput

C = TypeVar("C")


def resolve(config: type[C], given: Mapping[str, Any], name: str = "") -> C:
    """``config(**given)`` after checking every name and every type.

    Whole numbers are taken where a float is expected, lists where a tuple is.

    Args:
        name: whose settings they are, for messages.
    Raises:
        BadInput: a setting the class does not have, or a value of another type.
    """
    hints = get_type_hints(config)
    return config(**{key: _check(key, value, _hint(config, hints, key, name)) for key, value in given.items()})


def parse(config: type[Any], pairs: Iterable[str], owner: str = "") -> dict[str, Any]:
    """Settings from ``key=value`` texts, read by the type each field has; tuples are written ``4,5,6``.

    Raises:
        BadInput: no ``=``, an unknown key, or a value that cannot be read as the field's type.
    """
    hints = get_type_hints(config)
    read = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise BadInput(f"cannot read the setting {pair!r}. Write it as key=value.")
        name = name.strip()
        read[name] = _read(name, text.strip(), _hint(config, hints, name, owner))
    return read


def describe(hint: Any) -> str:
    """A type as a person writes it: ``a whole number or none``, ``'target' or 'prompt_last'``."""
    return " or ".join(map(_word, _options(hint)))


def describe_fields(config: type[Any]) -> list[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of every setting; the meaning is the text under the field."""
    hints, meanings = get_type_hints(config), _meanings(config)
    defaults: dict[Any, str] = {MISSING: "required", None: "none"}
    return [
        (f.name, describe(hints[f.name]), defaults.get(f.default, str(f.default)), meanings.get(f.name, ""))
        for f in fields(config)
    ]


def _hint(config: type[Any], hints: Mapping[str, Any], name: str, owner: str) -> Any:
    known = [field.name for field in fields(config)]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(known) or 'none'}."
        owner = owner or config.__module__.rpartition(".")[2]
        raise BadInput(f"{owner} has no setting {name!r}. {hint}")
    return hints[name]


def _check(name: str, value: Any, hint: Any) -> Any:
    for option in _options(hint):
        if option is type(None):
            if value is None:
                return None
        elif get_origin(option) is Literal:
            if value in get_args(option):
                return value
        elif get_origin(option) is tuple:
            if isinstance(value, (tuple, list)):
                return tuple(_check(name, each, get_args(option)[0]) for each in value)
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    raise BadInput(f"setting {name} is {value!r}; it must be {describe(hint)}.")


def _read(name: str, text: str, hint: Any) -> Any:
    for option in _options(hint):
        with suppress(ValueError, KeyError):
            return _read_as(name, text, option)
    raise BadInput(f"setting {name} is {text!r}; it must be {describe(hint)}.")


def _read_as(name: str, text: str, option: Any) -> Any:
    if option is type(None):
        return {"none": None, "null": None, "": None}[text.lower()]
    if get_origin(option) is Literal:
        return {str(choice): choice for choice in get_args(option)}[text]
    if get_origin(option) is tuple:
        parts = [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
        return tuple(_read(name, part, get_args(option)[0]) for part in parts)
    if option is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}[text.lower()]
    return option(text)


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, ``None`` first, so that ``none`` is not taken for a text."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(sorted(get_args(hint), key=lambda option: option is not type(None)))
    return (hint,)


def _word(option: Any) -> str:
    if option is type(None):
        return "none"
    if get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in get_args(option))
    if get_origin(option) is tuple:
        return f"a list of {describe(get_args(option)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(option, str(option))


def _meanings(config: type[Any]) -> dict[str, str]:
    """Field → the text under it, inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed([base for base in config.__mro__ if is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, after in zip(body.body, body.body[1:], strict=False):
            match line, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
