"""``facts``: do edits hold, for paraphrases too, and do other facts stay as they were?

Answers are generated greedily and compared as text; nothing is taken from the wanted answer, not even its length.
Every run is scored beside the unpatched model and beside the fact simply written into the prompt. What is measured,
and how each number is defined, stands in docs/benches.md.
"""

from ..core.runner import bound
from .bench import ask, baselines, commits, fit_batch, group, identity, plan, record, size, summary, texts, warm, write
from .cases import COSTS, OWN, Config, load, settle, with_unrelated
from .rows import METRICS, PLOTS, Row

__all__ = [
    "COSTS", "METRICS", "OWN", "PLOTS", "Config", "Row", "ask", "baselines", "commits", "fit_batch", "group",
    "identity", "load", "plan", "read_report", "record", "run", "settle", "size", "summary", "texts", "warm",
    "with_unrelated", "write",
]  # fmt: skip

run, read_report = bound(__name__)
