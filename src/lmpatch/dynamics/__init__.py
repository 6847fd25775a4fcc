"""Dynamics: what training, an edit or a smaller model does to single tokens, which a mean loss hides.

``losses`` runs a model over a text once and keeps a few bytes for every token. All else reads those: ``counts`` says
how frequent a token is, ``audit`` who pays (losses by frequency, with intervals over documents), ``diff`` what one
model loses beside another on the same text.

Source: "The Fair Language Model Paradox" (arXiv:2410.11985).
"""
