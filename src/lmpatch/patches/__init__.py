"""Changes to a model as values, and the contract of their kinds.

A kind is what a patch is made of and how it gets on a model. It is a folder here, ``patches/NAME/``, or an entry point
of another package in the group ``lmpatch.kinds``. There is no list of kinds. Its ``__init__`` names its class::

    KIND = WeightPatch          # a subclass of patches.patch.Patch

A ``Patch`` is tensors and plain JSON. Every kind says its ``kind`` (the name in files) and its ``mounts``, how it is
written, read and shown, whether it ``fits(lm)``, what ``merged(others)`` does, and ``attach(lm, mount, others)``: what
putting it on will do. ``attach`` only looks. The ledger has the handle before it calls ``Handle.enable``, which writes
and hooks, and calls ``Handle.disable`` after an error or a Ctrl-C. A kind may have ``rebuild``, ``lora`` and ``trial``.
``ledger`` puts patches on and off, ``file`` reads them, ``merge`` and ``export`` do what they say. None knows a kind.
"""
