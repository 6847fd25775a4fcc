"""RECIPE: each fact becomes a retrieval key and a few continuous prompt vectors; no weight of the model changes.

An editor is trained once. After that an edit is one pass of a sentence encoder, and a question is answered with the
nearest fact's vectors in front if that fact beats a learned key, the knowledge sentinel.
"""

from ...data.edits import Edit
from .config import Config as Config
from .config import Training as Training
from .data import TrainingData as TrainingData
from .method import editor_for as editor_for
from .method import example as example
from .method import example_editor as example_editor
from .method import fit as fit
from .method import train as train

AIM = "facts"
Record = Edit
