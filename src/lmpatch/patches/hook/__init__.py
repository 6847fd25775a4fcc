"""Constants added to what modules read, by hooks."""
