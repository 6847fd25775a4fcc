"""Before a patch is given away: what it does to text that has nothing to do with it.

One ROME fact of twenty multiplied the perplexity of a Llama-shaped model by 7,286 (r-ROME, Gupta et al. 2024,
arXiv:2403.07175, explains why). Nobody should ship such a patch without knowing.
"""

from __future__ import annotations

import math

from ..distributed import world
from ..errors import Harmful
from ..inference.plain_text import perplexity
from ..models.lm import LM
from .ledger import trial
from .patch import Patch

LIMIT = 1.5  # of the perplexity on plain text with the patch, over that without
LARGEST = 10.0  # |ΔW| over |W| of any weight: the edit above was 23, and a short text may miss what that does


def check_harm(lm: LM, patch: Patch, *, force: bool = False, before: float | None = None) -> None:
    """Note how far a patch moves weights and what it does to the perplexity of plain text, in ``made``. Kinds that
    write no weights pass.

    Args:
        before: the perplexity without the patch, where it is known.
    Raises:
        Harmful: the perplexity is multiplied by more than ``LIMIT``, or is no number; or a change is more than
            ``LARGEST`` times its weight (Frobenius norms). Not with ``force``.
    """
    if "bake" not in patch.mounts or world().size > 1:  # the weights of a sharded model are not written
        return
    before = perplexity(lm) if before is None else before
    with trial(lm, patch, "bake", strict=False):
        after = perplexity(lm)
    ratio = after / before
    patch.made["perplexity_ratio"] = round(ratio, 4) if math.isfinite(ratio) else None
    share = max(patch.change_norms().values(), default=0.0)
    patch.made["change_ratio"] = round(share, 4) if math.isfinite(share) else None
    harms = [] if ratio <= LIMIT else [f"multiplies the perplexity of plain text by {ratio:,.4g}; {LIMIT} is allowed"]
    if not share <= LARGEST:
        harms.append(f"changes a weight by {share:,.4g} times its norm; {LARGEST:g} is allowed")
    if harms and not force:
        raise Harmful(
            f"{patch.method} {', and '.join(harms)}. The patch was not made. Try another layer, a lower rate or a "
            "memory (recipe, rag), or take it as it is: force=True (lmpatch fit --force)."
        )
