"""The command tree and its one error boundary."""

from __future__ import annotations

import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import version
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from ..errors import LmpatchError
from . import data, memory
from .ask import ask
from .audit import audit, diff
from .check import check
from .compare import compare
from .demo import demo, example
from .files import cache, export, merge, show
from .fit import fit, train
from .measure import bench, doctor, probe
from .methods import methods
from .options import usable
from .screen import complain, output

COMMANDS = (
    demo, example, fit, train, ask, probe, bench, compare, check, audit, diff, show, merge, export, methods, doctor,
    cache,
)  # fmt: skip
GROUPS = {"memory": memory, "data": data}
HINTS = {
    "help": "lmpatch COMMAND --help explains one.",
    "apply": "A patch acts where -p names it: lmpatch ask MODEL -p PATCH PROMPT.",
    "undo": "A patch is on only while a command runs: leave -p out.",
    "list": "lmpatch methods lists what makes patches, lmpatch memory list STORE the facts of a memory.",
}
"""What is meant by words that are no commands."""
ABOUT = "Change what a causal language model knows, as small patches that come off bit for bit."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables and text.")]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]


class Boundary(TyperGroup):
    """Turns an ``LmpatchError`` and a command line that cannot be read into one line and exit code 2, Ctrl-C into exit
    code 130, a reader of stdout that went away into exit code 0. A stdout that cannot be written gets one line, too.

    Any other exception is a mistake of this library and keeps its traceback.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # one that is not UTF-8 has no sign for many a letter
                stream.reconfigure(errors="replace")
        return super().main(*args, **options)

    def make_context(self, *args: Any, **options: Any) -> Any:
        with one_line({}):
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with one_line(ctx.meta):
            return super().invoke(ctx)


@contextmanager
def one_line(meta: Mapping[str, Any]) -> Iterator[None]:
    """What ``Boundary`` promises, for the block."""
    try:
        yield
    except LmpatchError as error:
        complain(str(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        complain(f"stopped. {meta.get('kept', 'Nothing was written.')}")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # `| head` has read enough; Python must not flush into the pipe once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        try:
            print(flush=True)  # an empty line tells whether it was stdout
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            complain(f"stdout cannot be written: {error.strerror}.")
            raise typer.Exit(2) from None
        raise
    except (MemoryError, OverflowError, RuntimeError) as error:  # torch has no class of its own for the first two
        if isinstance(error, RuntimeError) and not re.search("allocate|out of memory|overflow", str(error)):
            raise
        complain(f"this is more than the machine has room for ({str(error)[:100]}). Give less at a time.")
        raise typer.Exit(2) from None
    except Exception as error:  # usage errors of Click, which newer versions of Typer have a copy of
        if not hasattr(error, "format_message") or type(error).__name__ == "NoArgsIsHelpError":
            raise
        where = getattr(getattr(error, "ctx", None), "command_path", "lmpatch")
        text = error.format_message()
        hint = next((f" {HINTS[word]}" for word in HINTS if text.startswith(f"No such command '{word}'")), "")
        complain(f"{text}{'' if text[-1] in '.?!' else '.'}{hint} See {where} --help.")
        raise typer.Exit(2) from None


def build() -> typer.Typer:
    """The Typer application with every command."""
    app = typer.Typer(
        cls=Boundary,
        no_args_is_help=True,
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help=ABOUT,
    )
    app.callback()(root)
    for command in COMMANDS:
        app.command(no_args_is_help=command not in (demo, example, methods, cache))(spread(command))
    for name, module in GROUPS.items():
        group = typer.Typer(no_args_is_help=True, help=_help(module.HELP))
        for word, command in module.COMMANDS.items():
            group.command(word, no_args_is_help=True)(spread(command))
        app.add_typer(group, name=name)
    return app


def root(show_version: Version = False) -> None:
    if show_version:
        typer.echo(f"lmpatch {version('lmpatch')}")
        raise typer.Exit()


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it: with ``--json``, and with the fields of a parameter that is a dataclass
    (``Source``, ``Material``) as arguments in its place and options at the end.
    """
    first: list[inspect.Parameter] = []
    last: list[inspect.Parameter] = []
    bundles: dict[str, tuple[Any, list[str]]] = {}
    for p in inspect.signature(command, eval_str=True).parameters.values():
        if not is_dataclass(p.annotation):
            first.append(p.replace(kind=p.KEYWORD_ONLY))
            continue
        hints, known = get_type_hints(p.annotation, include_extras=True), fields(p.annotation)
        bundles[p.name] = p.annotation, [field.name for field in known]
        for field in known:
            has = field.default is not MISSING
            default = field.default if has else p.empty
            part = inspect.Parameter(field.name, p.KEYWORD_ONLY, default=default, annotation=hints[field.name])
            (last if has else first).append(part)
    json = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)

    @functools.wraps(command)
    def run(as_json: bool = False, **given: Any) -> None:
        given = {name: usable(value) for name, value in given.items()}
        values = {name: of(**{field: given.pop(field) for field in own}) for name, (of, own) in bundles.items()}
        try:
            with output(as_json):
                command(**given, **values)
        except OSError as error:
            if (out := given.get("out")) and out.exists() and not isinstance(error, LmpatchError):
                error.strerror = f"{error.strerror}. {out} was written"
            raise

    run.__doc__ = _help(command.__doc__ or "")
    parameters = [*first, *last, json]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _help(text: str) -> str:
    """The text, with its last lines, command lines all of them, set as examples."""
    what, _, examples = inspect.cleandoc(text).partition("\n\nlmpatch ")
    what = "\n\n".join(paragraph.replace("\n", " ") for paragraph in what.split("\n\n"))
    return f"{what}\n\n\b\nExamples:\n  lmpatch " + examples.replace("\n", "\n  ")
