"""Models: loading them, finding their parts, running them."""
