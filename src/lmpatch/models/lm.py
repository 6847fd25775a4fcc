"""``LM``: a causal language model, its tokenizer, and the map of where its parts are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..provenance import hash_tensors
from .layout import Layout


@dataclass(eq=False)
class LM:
    """A model in evaluation mode with its tokenizer and layout. Make one with ``load`` or ``wrap``.

    ``model`` is an ordinary transformers model: nothing is subclassed or replaced.
    """

    model: Any
    tokenizer: Any
    layout: Layout
    name: str = "model"
    _fingerprint: str | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the embedding is, hence where token ids go."""
        return self.module(self.layout.embed).weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations have."""
        return self.module(self.layout.final_norm or self.layout.embed).weight.dtype  # type: ignore[return-value]

    @property
    def window(self) -> int | None:
        """Tokens it reads at most, those it generates included; None where its config sets no limit."""
        found: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found

    def module(self, name: str) -> nn.Module:
        """The submodule of that dotted name; the model itself for ``""``."""
        module: nn.Module = self.model.get_submodule(name)
        return module

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that dotted name, as in ``state_dict``."""
        parameter: nn.Parameter = self.model.get_parameter(name)
        return parameter

    def fingerprint(self) -> str:
        """SHA-256 over every weight rounded to bf16, of the model *without* patches.

        Rounding first makes the fp32 and the bf16 copy of one model the same model: a patch fitted on one is
        accepted by the other. Computed once (0.4 s for 270M weights), before the first patch goes on.
        """
        if self._fingerprint is None:
            ledger = getattr(self.model, "_lmpatch_ledger", None)  # see patches.ledger
            originals = ledger.originals if ledger else {}
            self._fingerprint = hash_tensors(
                (name, originals.get(name, p.detach())) for name, p in sorted(self.model.named_parameters())
            )
        return self._fingerprint
