"""Changes to a model as values, and the contract of their kinds.

A kind is what a patch is made of and how it gets on a model. It is a folder here, ``patches/NAME/``, or an entry point
of another package in the group ``lmpatch.kinds``. There is no list of kinds. Its ``__init__`` names its class::

    KIND = WeightPatch          # a subclass of patches.patch.Patch

A ``Patch`` is tensors and plain JSON. Every kind says

- ``kind``, ``mounts``: its name in files (best that of its folder), and how it can be put on, the default first;
- ``parts``, ``tensors``, ``from_parts``, ``describe``: how it is written, read and shown;
- ``fits(lm)``: an error unless the model has the shapes it needs;
- ``attach(lm, mount, others) -> Handle``: what putting it on will do. It only looks. The ledger has the handle before
  it calls ``Handle.enable``, which writes and hooks, and calls ``Handle.disable`` after an error or a Ctrl-C;
- ``merged(others)``, ``law()``: several as one, and what the tests hold that to.

A kind may say more: ``rebuild(lm)`` makes a new model (such a kind has no mounts), ``lora(lm, rank)`` an adapter,
``trial(lm, layer, strength)`` a small patch for proofs on a user's model; ``change_norms`` and ``needs_context``.
``ledger`` puts patches on and off, ``file`` reads them, ``merge`` and ``export`` do what they say. None knows a kind.
"""
