"""Parenting: use relevant documents and ignore irrelevant ones, by tuning each kind of parameter with its own losses.

Source: Xu et al. 2025, "Parenting: Optimizing Knowledge Selection of Retrieval-Augmented Language Models with Parameter
Decoupling and Tailored Tuning" (arXiv:2410.10360).
"""

from ...data.rag.reader import RagRecord
from .config import Config as Config
from .method import estimate as estimate
from .method import example as example
from .method import fit as fit
from .plot import plots as plots

AIM = "documents"
Record = RagRecord
