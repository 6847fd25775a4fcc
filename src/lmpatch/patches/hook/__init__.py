"""Constants added to what modules read, by hooks."""

from .patch import SteerPatch

KIND = SteerPatch
