"""The losses of RECIPE: three that teach retrieval, three that teach the prompt vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...distributed import SINGLE, World
from ...inference.forward import head_loss, logits
from ...inference.interventions import inserted
from ...inference.tokens import Row, batches_of_tokens
from ...models.lm import LM
from ...training.losses import answer_states

BATCH_TOKENS = 1024  # of one forward with gradients, in each process


def clear(logp: Tensor, target: Tensor, margin: float | None) -> Tensor:
    """[n] bool: p(target) is at least ``margin`` times every other probability. None: never."""
    if margin is None:
        return torch.zeros(len(logp), dtype=torch.bool, device=logp.device)
    own = logp.gather(1, target[:, None])[:, 0]
    rest = logp.scatter(1, target[:, None], -torch.inf).amax(1)
    return own - rest >= torch.tensor(margin).log()


def contrast(scores: Tensor, target: Tensor, margin: float | None = None) -> Tensor:
    """Mean cross-entropy of rows [n, classes] that are not ``clear`` yet; 0 if all are."""
    logp = scores.log_softmax(-1)
    open_ = ~clear(logp.detach(), target, margin)
    each = F.nll_loss(logp, target, reduction="none")
    return (each * open_).sum() / open_.sum().clamp(min=1)


def retrieval_losses(
    keys: Tensor, sentinel: Tensor, first: Tensor, second: Tensor, unrelated: Tensor, *, margin: float | None = 1.2
) -> dict[str, Tensor]:
    """Contrastive losses of b facts.

    Args:
        keys: [b, M]; sentinel: [M].
        first, second: [b, M] queries of the two wordings of each fact; first is matched, second is warned off.
        unrelated: [b, M] queries of unrelated questions.
        margin: rows whose target is this many times likelier than every other class are left out of the two
            sentinel terms. None: no row is.
    Returns:
        ``own``, L_no: the fact's key among all keys and the sentinel; ``neighbour``, L_so1: with its own key taken
        away, the sentinel is nearest; ``unrelated``, L_so2: for an unrelated question the sentinel is nearest.
    Source: Chen et al. 2024 (arXiv:2405.03279) eq. 9-12, and the released code.
    """
    b, root = len(keys), keys.shape[1] ** 0.5
    classes = torch.cat([keys, sentinel[None]])  # [b + 1, R]
    at = torch.arange(b, device=keys.device)
    own = contrast(first @ classes.T / root, at)
    scores = second @ keys.T / root  # [b, b]
    scores = scores.index_put((at, at), second @ sentinel / root)
    neighbour = contrast(scores, at, margin)
    last = torch.full((len(unrelated),), b, device=keys.device)
    far = contrast(unrelated @ classes.T / root, last, margin)
    return {"own": own, "neighbour": neighbour, "unrelated": far}


def behind(
    lm: LM, rows: Sequence[Row], facts: Sequence[int], width: int, at: str, lengths: Sequence[int] | None = None
) -> list[Row]:
    """Each row with the virtual tokens of its fact before it: -1 - i is row i of the flattened prompt vectors
    [b * width, d] of b facts. ``lengths``: how many of each fact's vectors are used; None: all."""
    used = [width if lengths is None else lengths[fact] for fact in facts]
    return [
        inserted(lm, row, tuple(-1 - fact * width - k for k in range(count)), at)
        for row, fact, count in zip(rows, facts, used, strict=True)
    ]


def answers(
    lm: LM, rows: Sequence[Row], vectors: Tensor | None, world: World = SINGLE
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Run rows in batches of near length; the graph of one is free before the next.

    Args:
        world: each process runs its part of every batch, or the first row for nothing: the passes must be as many.
    Yields:
        for each batch: states [m, d] that predict an answer token, their labels [m], and which row each belongs to.
    """
    for batch in batches_of_tokens([len(row.ids) for row in rows], BATCH_TOKENS * world.size):
        states, labels, owners = answer_states(lm, [rows[i] for i in batch], world, vectors)
        yield states, labels, [batch[i] for i in owners]


def statement_loss(
    lm: LM, rows: Sequence[Row], vectors: Tensor, margin: float | None = 1.2, world: World = SINGLE,
    after: Sequence[tuple[int, Tensor]] = (),
) -> tuple[Tensor, int]:  # fmt: skip
    """-log p summed over the answer tokens that are not ``clear`` yet, backpropagated into ``vectors``.

    Args:
        vectors: [m, d] a leaf; its gradient is added to.
        world: sum and gradient are over this process's rows.
        after: for each row how many of its tokens are the target's, and [k, d] states of the model without the prompt
            at the k tokens behind these, which cost KL(p_base || p_with_prompt) instead.
    Returns:
        the sum in nats, without a graph, and how many tokens it is over.
    """
    total, count = torch.zeros(()), 0
    for states, labels, owners in answers(lm, rows, vectors, world):
        rows_here = list(dict.fromkeys(owners))
        own = torch.cat([_own(owners.count(i), *after[i]) if after else torch.ones(owners.count(i)) for i in rows_here])
        own = own.bool().to(states.device)
        said = labels[own]

        def loss(z: Tensor, part: slice, labels: Tensor = said) -> Tensor:
            logp = z.log_softmax(-1)
            open_ = ~clear(logp.detach(), labels[part], margin)
            return F.nll_loss(logp, labels[part], reduction="none") * open_

        each = head_loss(lm, states[own], loss)
        whole = each.sum()
        count += len(each) if margin is None else int((each > 0).sum())
        if after and (~own).any():
            drift = head_loss(lm, states[~own], _drift(lm, torch.cat([after[i][1].to(states) for i in rows_here])))
            whole, count = whole + drift.sum(), count + len(drift)
        whole.backward()
        total = total + whole.detach().cpu()
    return total, count


def _own(count: int, target: int, base: Tensor) -> Tensor:
    """[count] 1 at the tokens of a row that are to be said, 0 at those that are to stay as likely as they are."""
    at = torch.arange(count)
    return ((at < target) | (at >= target + len(base))).float()


def _drift(lm: LM, before: Tensor) -> Callable[[Tensor, slice], Tensor]:
    """KL(p_base || p) at each row, of the base's states [n, d]."""

    def loss(z: Tensor, part: slice) -> Tensor:
        p = torch.no_grad()(logits)(lm, before[part]).log_softmax(-1)
        return (p.exp() * (p - z.log_softmax(-1))).sum(-1)

    return loss


def locality_loss(
    lm: LM, rows: Sequence[Row], vectors: Tensor, base: Sequence[Tensor], world: World = SINGLE
) -> tuple[Tensor, int]:
    """KL(p_base || p_with_prompt) summed over answer tokens, backpropagated into ``vectors``; as ``statement_loss``.

    Args:
        base: for each row [answer tokens, d] states of the model without the prompt.
    """
    total, count = torch.zeros(()), 0
    for states, _, owners in answers(lm, rows, vectors, world):
        in_order = [base[i].to(states) for i in dict.fromkeys(owners)]  # as the rows of the batch
        each = head_loss(lm, states, _drift(lm, torch.cat([states.detach()[:0], *in_order])))
        each.sum().backward()
        total, count = total + each.detach().sum().cpu(), count + len(each)
    return total, count


@torch.no_grad()
def base_states(lm: LM, rows: Sequence[Row]) -> list[Tensor]:
    """States [answer tokens, d] of each row that predict its answer, in the model as it is."""
    states_of: list[list[Tensor]] = [[] for _ in rows]
    for states, _, owners in answers(lm, rows, None):
        for owner, state in zip(owners, states, strict=True):
            states_of[owner].append(state)
    return [torch.stack(own) for own in states_of]
