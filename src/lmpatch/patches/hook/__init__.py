"""Constants added to what modules read or return, by hooks."""

from .patch import HookPatch

KIND = HookPatch
