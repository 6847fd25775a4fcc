"""Every error lmpatch raises on purpose, in one tree below ``LmpatchError``.

Each class is also the builtin it resembles, so ``except ValueError`` keeps working. A message says what was
asked, what was found and what to do.
"""

from __future__ import annotations


class LmpatchError(Exception):
    """The root: the command line catches this class and prints one line."""


class BadInput(LmpatchError, ValueError):
    """A value the caller gave cannot be used."""


class BadRecord(BadInput):
    """A line of a data file cannot be read."""


class SubjectNotFound(BadInput):
    """A subject does not occur in its prompt once tokenised."""


class Contradiction(BadInput):
    """Two edits ask for different answers to the same prompt."""


class UnknownName(BadInput):
    """No method, probe, bench or model goes by that name."""


class LayerOutOfRange(BadInput):
    """A layer index the model does not have."""


class CannotWrite(LmpatchError, OSError):
    """The disk is full, or refuses. What was there is whole."""


class WrongModel(LmpatchError, ValueError):
    """A patch was made for another model, other weights or other shapes."""


class BadPatch(LmpatchError, ValueError):
    """A patch file is truncated, was altered, or is no patch at all."""


class CannotMerge(LmpatchError, ValueError):
    """Two patches whose changes have no common algebra."""


class CannotMount(LmpatchError, RuntimeError):
    """The chosen mount cannot work on this weight; the message names the other one."""


class ForeignWrite(LmpatchError, RuntimeError):
    """A weight that a patch holds was written by someone else."""


class UnknownLayout(LmpatchError, RuntimeError):
    """The parts of a transformer block could not be found by structure."""


class NotEnoughMemory(LmpatchError, MemoryError):
    """A run would need more memory than is free."""


class MissingExtra(LmpatchError, ImportError):
    """An optional package is needed for what was asked."""


class Diverged(LmpatchError, ArithmeticError):
    """An optimisation reached NaN or infinity."""


class Harmful(Diverged):
    """A patch makes the model much worse at text that has nothing to do with it."""
