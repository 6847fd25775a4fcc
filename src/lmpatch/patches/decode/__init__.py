"""Rules that combine two streams while a model answers."""
