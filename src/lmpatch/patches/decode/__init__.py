"""Rules that combine two streams while a model answers."""

from .patch import DecodePatch

KIND = DecodePatch
