"""The command tree and its one error boundary."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import LmpatchError
from .ask import ask
from .bench import bench
from .data import data
from .demo import demo
from .doctor import doctor
from .example import example
from .files import export, merge, show
from .fit import fit
from .memory import memory
from .methods import methods
from .probe import probe
from .screen import complain, output
from .train import train

COMMANDS = (demo, example, fit, train, ask, probe, bench, show, merge, export, methods, doctor)
GROUPS: dict[str, tuple[str, dict[str, Callable[..., Any]]]] = {"memory": memory, "data": data}
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables and text.")]
Version = Annotated[bool, typer.Option("--version", help="Show the version and exit.")]


class Boundary(TyperGroup):
    """Turns an ``LmpatchError`` into one line and exit code 2, Ctrl-C into exit code 130, a reader of stdout that went
    away into exit code 0.

    Any other exception is a mistake of this library and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LmpatchError as error:
            complain(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            complain(f"stopped. {ctx.meta.get('kept', 'Nothing was written.')}")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `| head` has read enough; Python must not flush into the pipe once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


def build() -> typer.Typer:
    """The Typer application with every command."""
    app = typer.Typer(
        cls=Boundary,
        no_args_is_help=True,
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Change what a causal language model knows, as small patches that come off bit for bit.",
    )
    app.callback()(root)
    for command in COMMANDS:
        app.command(no_args_is_help=command not in (demo, example, methods))(with_json(command))
    for name, (text, commands) in GROUPS.items():
        group = typer.Typer(no_args_is_help=True, help=text)
        for word, command in commands.items():
            group.command(word, no_args_is_help=True)(with_json(command))
        app.add_typer(group, name=name)
    return app


def root(show_version: Version = False) -> None:
    """Change what a causal language model knows, as small patches that come off bit for bit."""
    if show_version:
        typer.echo(f"lmpatch {version('lmpatch')}")
        raise typer.Exit()


def with_json(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option more, ``--json``, which no command has to know of."""

    @functools.wraps(command)
    def run(*args: Any, as_json: bool = False, **options: Any) -> None:
        with output(as_json):
            command(*args, **options)

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*signature.parameters.values(), option)}
    return run
