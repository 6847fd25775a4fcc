"""``general``: does a patch leave the model's other abilities alone?

Public tasks are read from a folder the user gives and asked before and after, on the same records, so that every
difference is paired. Each task is asked under two protocols, which are never mixed: letters of options that stand in
the prompt, as RECIPE's paper does, and the likelihood of each option's own text, which says more of a small base
model. What is measured, and how each number is defined, stands in docs/benches.md.
"""

from ..core.runner import bound
from .bench import Config as Config
from .bench import ask as ask
from .bench import group as group
from .bench import identity as identity
from .bench import load as load
from .bench import plan as plan
from .bench import record as record
from .bench import settle as settle
from .bench import texts as texts
from .rows import METRICS as METRICS
from .rows import TaskRow as Row  # noqa: F401
from .tasks import Data as Data
from .tasks import Sample as Sample

run, read_report = bound(__name__)
