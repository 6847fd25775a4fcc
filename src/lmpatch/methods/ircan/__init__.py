"""IRCAN: scale up the neurons with the highest attribution to the context.

Source: Shi et al. 2024, "IRCAN: Mitigating Knowledge Conflicts in LLM Generation via Identifying and Reweighting
Context-Aware Neurons" (arXiv:2406.18406).
"""

from .method import Config as Config
from .method import Record as Record
from .method import estimate as estimate
from .method import example as example
from .method import fit as fit

AIM = "context"
