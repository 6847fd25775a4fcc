"""RASE-ROME."""
