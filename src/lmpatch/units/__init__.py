"""Addresses of things inside a model."""
