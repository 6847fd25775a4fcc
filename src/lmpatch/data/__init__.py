"""Records and the readers that make them: facts to write, questions to ask, plain text."""

from .context import ContextRecord, read_context
from .edit import Ask, Edit, check_contradictions
from .readers import read_asks, read_edits, read_text

__all__ = [
    "Ask",
    "ContextRecord",
    "Edit",
    "check_contradictions",
    "read_asks",
    "read_context",
    "read_edits",
    "read_text",
]
