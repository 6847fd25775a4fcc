"""What hooks add to what modules read or return, and the operations of ``operations/``."""

from .patch import HookPatch

KIND = HookPatch
