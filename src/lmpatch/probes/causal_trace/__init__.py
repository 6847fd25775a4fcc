"""Causal tracing: which states, restored one at a time, bring back a fact that noise has destroyed.

Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv:2202.05262), sec. 2.
"""

from .probe import Config as Config
from .probe import Record as Record
from .probe import example as example
from .probe import run as run
from .trace import Trace as Trace
from .trace import Traces as Traces
