"""``general``: does a patch leave the model's other abilities alone?

Public tasks are read from a folder the user gives and asked before and after, on the same records, so that every
difference is paired. Each task is asked under two protocols, which are never mixed: letters of options that stand in
the prompt, as RECIPE's paper does, and the likelihood of each option's own text, which says more of a small base
model. What is measured, and how each number is defined, stands in docs/benches.md.
"""

from ..core.runner import bound
from .bench import METRICS, Config, Row, ask, group, identity, load, plan, record, settle, texts
from .tasks import Data, Sample

__all__ = [
    "METRICS", "Config", "Data", "Row", "Sample", "ask", "group", "identity", "load", "plan", "read_report", "record",
    "run", "settle", "texts",
]  # fmt: skip

run, read_report = bound(__name__)
