"""LTE: a model is taught once to use updated information before a question; facts are then kept as text.

No edit trains anything. The alignment is a LoRA that acts behind a fact, so a question that fires none is answered by
the model as it was, to the bit.
"""

from ...data.edits import Edit
from ..recipe.data import TrainingData as TrainingData
from .config import Config as Config
from .config import Training as Training
from .method import alignment as alignment
from .method import editor_for as editor_for
from .method import estimate as estimate
from .method import example as example
from .method import example_editor as example_editor
from .method import fit as fit
from .method import fit_each as fit_each
from .train import train as train

AIM = "facts"
Record = Edit
