"""Probes observe a model and leave it as it was."""
