"""The command line. ``main`` is the entry point; one file per group of commands, one public call per command."""

from __future__ import annotations


def main() -> None:
    """Run ``lmpatch``; exit code 0 done, 1 a promise failed, 2 bad input, 130 stopped by Ctrl-C."""
    from .app import build

    build()()
