"""Benches: each module measures a model, patched or not, on data. Rows come first, means later."""
