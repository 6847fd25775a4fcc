"""``facts``: do edits hold, for paraphrases too, and do other facts stay as they were?

Answers are generated greedily and compared as text; nothing is taken from the wanted answer, not even its length.
Every run is scored beside the unpatched model and beside the fact simply written into the prompt. What is measured,
and how each number is defined, stands in docs/benches.md.
"""

from ..core.runner import bound
from .bench import COSTS as COSTS
from .bench import OWN as OWN
from .bench import Config as Config
from .bench import ask as ask
from .bench import baselines as baselines
from .bench import commits as commits
from .bench import fit_batch as fit_batch
from .bench import group as group
from .bench import identity as identity
from .bench import load as load
from .bench import plan as plan
from .bench import record as record
from .bench import settle as settle
from .bench import summary as summary
from .bench import texts as texts
from .bench import warm as warm
from .bench import with_unrelated as with_unrelated
from .bench import write as write
from .rows import METRICS as METRICS
from .rows import PLOTS as PLOTS
from .rows import FactRow as Row  # noqa: F401

run, read_report = bound(__name__)
