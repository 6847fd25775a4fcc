"""Facts that are looked up for each question and put before it."""

from .patch import MemoryPatch

KIND = MemoryPatch
