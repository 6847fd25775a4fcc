"""Records for retrieval-augmented answers: read, built from SQuAD-format files or logs, written.

A built file is JSON lines of ``RagRecord``s (``kind`` is among the keys). A raw one (see ``_rag_source``) is built on
the way in, always in the same way: training takes the articles of one part, settings are chosen on another, the bench
asks the third.
"""

from .reader import Build as Build
from .reader import Question as Question
from .reader import RagRecord as RagRecord
from .reader import Sets as Sets
from .reader import build as build
from .reader import closed_book as closed_book
from .reader import counts as counts
from .reader import f1 as f1
from .reader import holds as holds
from .reader import is_built as is_built
from .reader import known as known
from .reader import normalise as normalise
from .reader import read_built as read_built
from .reader import read_questions as read_questions
from .reader import read_rag as read_rag
from .reader import refused as refused
from .reader import render as render
from .reader import whole as whole
from .reader import write as write
