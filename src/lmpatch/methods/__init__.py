"""Methods make patches. Each is a file or folder here, or an entry point ``lmpatch.methods`` of another package.

A method is a module with::

    AIM = "facts"            # or "context", "documents": what it is for, a literal
    Record: type[Record]     # what it reads; ``Record.read(path)`` gives records. None: it learns from nothing
    Config                   # frozen dataclass of its numbers: no paths, devices, dtypes, model names
    def fit(lm, records, cfg, *, progress=None) -> Patch          # the model is as it was afterwards, to the bit

and, where it has them::

    def fit_each(lm, records, cfg) -> list[Patch]                 # many single edits in one go
    def estimate(lm, count, cfg) -> int                           # bytes a fit takes on top of the model
    def train(lm, data, cfg, *, out, progress) -> Editor          # what it learns once; cfg is a ``Training``
    TrainingData                                                  # dataclass: records and whatever else ``train`` reads
    def editor_for(lm) -> Editor                                  # for a method that keeps facts in a ``Memory``
    def example(lm) -> (records, Config)                          # runs in milliseconds on a tiny model
    needs_records = False                                         # records may be left out

``fit`` may take more by keyword: ``text``, ``anchors``, ``editor``, ``out``. A module of several methods has a literal
``ENTRIES = {name: what it does}`` and ``entry(name)``. A literal ``ALIASES = {name: [what papers also call it]}`` is
for names that mean several methods: asked for one, the registry refuses and lists them. ``registry.method`` gives all
of this as one value.
"""
