"""The command tree and its one error boundary."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import LmpatchError
from .ask import ask
from .bench import bench
from .data import data
from .demo import demo
from .doctor import doctor
from .files import export, merge, show
from .fit import fit
from .memory import memory
from .methods import methods
from .probe import probe
from .screen import complain
from .train import train

COMMANDS = (demo, fit, train, ask, probe, bench, show, merge, export, methods, doctor)


class Boundary(TyperGroup):
    """Turns an ``LmpatchError`` into one line and exit code 2, Ctrl-C into exit code 130.

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


def build() -> typer.Typer:
    """The Typer application with every command."""
    app = typer.Typer(
        cls=Boundary,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Change what a causal language model knows, as small patches that come off bit for bit.",
    )
    for command in COMMANDS:
        app.command(no_args_is_help=command is not demo and command is not methods)(command)
    app.add_typer(memory(), name="memory")
    app.add_typer(data(), name="data")
    return app
