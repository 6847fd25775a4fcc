"""``rag``: does a model use relevant documents, even against its own knowledge, and ignore irrelevant ones?

Held-out articles are asked under five conditions, of the unpatched model and of patched ones, on the same items. What
is measured, and how each number is defined, stands in docs/benches.md.
"""

from ..core.runner import bound
from .bench import Config as Config
from .bench import ask as ask
from .bench import identity as identity
from .bench import load as load
from .bench import plan as plan
from .bench import record as record
from .bench import settle as settle
from .bench import texts as texts
from .rows import METRICS as METRICS
from .rows import PLOTS as PLOTS
from .rows import RagRow as Row  # noqa: F401
from .rows import Sample as Sample

CONTEXTS = True
run, read_report = bound(__name__)
