"""Settings of Parenting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...training.adapter import Modules
from .units import Mean, Units

Cue = Literal["rate", "count", "none"]


@dataclass(frozen=True)
class Config:
    """Parenting. LoRA, β and δ1 are the paper's; rates and sizes are for a model of 270M parameters on a CPU."""

    units: Units = "matrix"
    """What is scored and typed as one: A and B of a projection together (``matrix``), each alone (``factor``, as
    released), a row of A with its column of B (``lora_rank``), or a full weight without LoRA (``full_matrix``)."""
    modules: Modules = "attention"
    """Projections that have units; the paper's are those of attention."""
    rank: int = 8
    """Of the LoRA."""
    alpha: float = 16.0
    """The LoRA is multiplied by alpha / rank."""
    mode: Literal["masked", "merge", "mixed", "plain"] = "masked"
    """``masked``: each type of unit has its own losses, as the paper says. ``merge``: three adapters trained apart and
    averaged unit by unit, as the released code does. ``mixed``: no units, one mix of the three losses for all.
    ``plain``: no units and no mix, one mean over all rows of a step: fine-tuning on the rows together."""
    mean: Mean = "tokens"
    """What the losses of a step are means over: its answer ``tokens``, or its ``examples``, each with the mean of its
    own tokens. By tokens, a row whose answer is long outweighs the others: document extraction, in ``plain``."""
    merge_space: Literal["factors", "delta"] = "delta"
    """What ``merge`` averages: A and B apart, as released, or their product."""
    cue: Cue = "rate"
    """Layer weights from shares of active tokens, from counts as released, or none."""
    cue_rows: int = 100
    """Rows of each set whose activations are counted at most."""
    mine_steps: int = 30
    """Steps of the short tuning that scores units, on each of the two sets."""
    mine_rows: int = 4
    """Rows of such a step."""
    mine_lr: float = 1e-4
    """Its rate."""
    mine_warmup: int = 10
    """Its steps of rising rate."""
    beta1: float = 0.85
    """Smoothing of sensitivity."""
    beta2: float = 0.85
    """Smoothing of uncertainty."""
    update_point: Literal["before_step", "after_step"] = "before_step"
    """When scores are taken: before the optimiser's step on unclipped gradients; after it on clipped, as released."""
    threshold: float = 0.0
    """τ: a unit is important for a skill if its z-score is above."""
    rule: Literal["z", "variance"] = "z"
    """``variance``: important is what exceeds mean + variance of the raw scores, as released; threshold is not used."""
    delta: float = 0.8
    """δ1, weight of the two skills; document extraction has the rest. 1: no document extraction, in any mode."""
    boundary: bool = True
    """Each type of unit learns from its own losses. False: all that are not ``others`` from one mix."""
    steps: int = 80
    """Steps of tailored tuning."""
    rows_adherence: int = 2
    """Rows of a step whose document answers. ``mixed`` and ``plain`` can do without one of the three sorts: 0."""
    rows_robustness: int = 2
    """Rows of a step whose documents do not."""
    rows_extraction: int = 1
    """Rows of a step that tell documents apart."""
    lr: float = 2.5e-4
    """AdamW's rate at its height, the best of three on dev articles; it falls to 0 in a line."""
    warmup: int = 10
    """Steps of rising rate."""
    decay: float = 0.01
    """AdamW's weight decay."""
    clip: float = 1.0
    """Norm that gradients are cut to."""
    known_share: float = 0.5
    """Share of robustness rows whose closed-book answer is right, as far as there are such records."""
    refusals: bool = False
    """Train closed-book answers that are empty, refused or cut off too, as "I do not know."; otherwise they are left
    out and counted."""
    validate_every: int = 20
    """Steps between validation losses, checkpoints, and looks at whether the run still converges."""
    seed: int = 0
    """Of A and of the order of rows."""
