"""Probes: each observes a model on data and leaves it as it was, to the bit. A probe is a module with::

    Record: type[Record]     # what it reads; ``Record.read(path)`` gives records
    Config                   # frozen dataclass of numbers, the source's as defaults
    def run(lm, data, cfg, *, progress=None) -> Result     # takes ``out``, a file it goes on from, where it takes long
    def example(lm) -> (data, Config)                      # runs in milliseconds on a tiny model

and a ``Result`` has::

    def table() -> (columns, rows)                         # one row a record
    def save(folder) -> None                               # JSON lines and pictures, into a folder that is there
"""
