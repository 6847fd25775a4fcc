"""Integrated gradients: the attribution of a context's effect on the answer to single neurons.

A neuron is one input of a block's down-projection. The model reads a question with and without its context; on the way
from the one value to the other each neuron is credited with its part of the change of p(answer).

Source: Shi et al. 2024, "IRCAN" (arXiv:2406.18406), sec. 3.1; after Dai et al. 2022, "Knowledge Neurons in Pretrained
Transformers" (arXiv:2104.08696), and Sundararajan et al. 2017 (arXiv:1703.01365).
"""

from .probe import Config as Config
from .probe import Record as Record
from .probe import example as example
from .probe import run as run
from .scores import Scores as Scores
