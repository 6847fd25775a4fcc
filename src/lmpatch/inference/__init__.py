"""Running a model: the only callers of a forward.

``tokens`` turns text into rows, ``interventions`` lets the patches on a model act on them, ``forward`` runs blocks and
head, ``replay`` recomputes only what a change can reach. On these stand ``score``, ``generate``, ``states`` and
``multiple_choice``. Two habits make them fast: prompts are sorted by length and equal ones run once, and finished rows
leave a generation batch.
"""
