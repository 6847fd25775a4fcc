"""``lmpatch doctor``: will patching work on this model, and what fits?"""

from __future__ import annotations

import typer

from .options import Device, Download, Dtype, Model, open_model
from .screen import progress, table


def doctor(model: Model, dtype: Dtype = "auto", device: Device = "auto", download: Download = False) -> None:
    """Prove on a model of yours that patches work on it, and print what fits in memory.

    Every hook fires, a patch of zeros changes no bit, both mounts agree, removal restores every bit, padding moves
    nothing, replay equals the plain forward. Exit code 1 if one of these fails.

    \b
    Examples:
      lmpatch doctor gemma-3-270m
      lmpatch doctor ./my-model --dtype bfloat16
    """
    from ..doctor import examine, footprint

    lm = open_model(model, dtype, device, download)
    with progress("examining") as bar:
        findings = examine(lm, progress=bar)
    table(
        ["", "proof", "figure"],
        [("yes" if f.holds else "NO", f.claim, f.detail) for f in findings],
        title=lm.name,
        key="proofs",
    )
    table(["memory", "needed"], footprint(lm), key="memory")
    if not all(finding.holds for finding in findings):
        raise typer.Exit(1)
