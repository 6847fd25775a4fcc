"""``Layout``: where the parts of a decoder are. ``discover`` finds them."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import LayerOutOfRange, UnknownLayout


@dataclass(frozen=True)
class Layout:
    """Where the parts of a decoder are, as dotted module names. One entry per block in every plural field."""

    blocks: tuple[str, ...]
    """The decoder blocks in order, ``model.layers.0``, ..."""
    downs: tuple[str, ...]
    """Each block's MLP output projection y = W k: keys k have the block's width, values y have width ``d_model``."""
    ups: tuple[tuple[str, ...], ...]
    """Each block's MLP input projections: gate and up, or one fused that is twice as wide."""
    attn_outs: tuple[str, ...]
    """Each block's attention output projection."""
    attn_ins: tuple[tuple[str, ...], ...]
    """Each block's attention projections that read the hidden state: q, k, v, or one fused."""
    embed: str
    """Token embedding."""
    head: str
    """Language-model head."""
    final_norm: str | None
    """The norm with weights after the last block, if there is one."""
    tail: tuple[str, ...]
    """What runs after the last block, in order, ending with the head. Applied one after the other they give logits."""
    softcap: float | None
    """c of the final soft-cap: logits = c * tanh(logits / c). None: no cap."""
    d_model: int
    widths: tuple[int, ...]
    """Each block's MLP width: what its down-projection reads."""
    vocab: int
    """Width of the logits; at least the tokenizer's size."""
    transposed: bool
    """Projections store their weight as (in, out), as GPT-2's Conv1D does."""
    post_norm: bool
    """A norm stands between the down-projection and the residual stream (Gemma 2/3), so only directions survive."""
    embed_scale: float
    """What enters block 0 over the stored embedding rows, as a ratio of RMS; position embeddings do not count."""
    tied: bool
    """Head and embedding are one tensor."""

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def d_ff(self) -> int:
        """The MLP width that all blocks share. Raises ``UnknownLayout`` where they differ; see ``widths``."""
        if len(set(self.widths)) > 1:
            raise UnknownLayout(
                f"one MLP width for all blocks was asked for, and theirs are {', '.join(map(str, self.widths))}. "
                "What was asked needs blocks of one width: use a model before its blocks were cut, or another method."
            )
        return self.widths[0]

    def check_layer(self, layer: int) -> int:
        """The layer as a 0-based index; negative counts from the end. Raises ``LayerOutOfRange``."""
        n = self.n_layers
        if not -n <= layer < n:
            raise LayerOutOfRange(f"layer {layer} asked for, the model has {n}. Use 0..{n - 1}, or -1 for the last.")
        return layer % n

    def weight(self, module: str) -> str:
        """The parameter name of a module's weight."""
        return f"{module}.weight"
