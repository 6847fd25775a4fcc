"""Records for retrieval-augmented answers: read, built from SQuAD-format files or logs, written.

A built file is JSON lines of ``RagRecord``s (``kind`` is among the keys). A raw one is built on the way in, always in
the same way: training takes the articles of one part, settings are chosen on another, the bench asks the third.
"""

from .reader import *  # noqa: F403  its __all__ are the public names
