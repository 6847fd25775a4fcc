"""Constants added to what modules read or return, by hooks."""
