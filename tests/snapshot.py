"""Ctrl-C at a line of lmpatch, and what of a model must be as it was afterwards."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch

import lmpatch
from lmpatch.inference.forward import current_pass
from lmpatch.models.lm import LM
from lmpatch.patches.ledger import applied
from lmpatch.provenance import hash_tensors

SOURCE = str(Path(lmpatch.__file__).parent)
Line = tuple[CodeType, int]


def bits(lm: LM) -> str:
    return hash_tensors(lm.model.state_dict().items(), exact=True)


def state(lm: LM) -> dict[str, Any]:
    """Everything about a model that a method must leave alone."""
    modules = list(lm.model.modules())
    parameters = list(lm.model.parameters())
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    tables += ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        "bits": bits(lm),
        "buffers": hash_tensors(lm.model.named_buffers(), exact=True),
        "storage": [p.data_ptr() for p in parameters],
        "asks for gradients": [p.requires_grad for p in parameters],
        "gradients": [p.grad is None for p in parameters],
        "training": [m.training for m in modules],
        "hooks": [len(vars(m)[table]) for m in modules for table in tables],
        "attributes": [sorted(key for key in vars(m) if not key.startswith("_lmpatch")) for m in modules],
        "patches": len(applied(lm)),
        "pass": current_pass(),
        "padding": (lm.tokenizer.padding_side, lm.tokenizer.truncation_side),
        "random state": torch.get_rng_state().tolist(),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [what for what in before if before[what] != after[what]]


class Lines:
    """The lines of lmpatch's own code that a call runs, and the call again with Ctrl-C before one of them."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run = run
        run()  # what is cached is there: each further call runs the same lines
        self.times: Counter[Line] = Counter()
        """How often each line ran, in the order of their first times."""

        def count(frame: Any, event: str, _: object) -> Any:
            if event == "line":
                self.times[frame.f_code, frame.f_lineno] += 1
            return count

        self._traced(lambda frame: count if frame.f_code.co_filename.startswith(SOURCE) else None)

    def interrupted(self, line: Line, time: int = 1) -> bool:
        """Whether Ctrl-C came, that time the line was to run. Other functions run without a trace, so it is fast."""
        left = time

        def stop(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            if event == "line" and frame.f_lineno == line[1]:
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return stop

        try:
            self._traced(lambda frame: stop if frame.f_code is line[0] else None)
        except KeyboardInterrupt:
            return True
        return False

    def _traced(self, local: Callable[[Any], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(lambda frame, event, arg: local(frame))
        try:
            self.run()
        finally:
            sys.settrace(before)


def name(line: Line) -> str:
    return f"{line[0].co_filename.removeprefix(SOURCE)}:{line[1]} ({line[0].co_name})"


def spread(lines: Sequence[Line], count: int) -> list[Line]:
    """That many of them, evenly from the first to the last."""
    return [lines[i * len(lines) // count] for i in range(min(count, len(lines)))] if len(lines) > count else [*lines]
