"""The losses of RECIPE: three that teach retrieval, three that teach the prompt vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...distributed import SINGLE, World
from ...inference.forward import head_loss
from ...inference.tokens import Row, batches_of_tokens
from ...models.lm import LM
from ...training.losses import answer_states, divergence

BATCH_TOKENS = 2048  # of one forward with gradients, in each process


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
    keys: Tensor, sentinel: Tensor, first: Tensor, second: Tensor, unrelated: Tensor, own: Tensor, *,
    margin: float | None = 1.2,
) -> dict[str, Tensor]:  # fmt: skip
    """Contrastive losses of b facts.

    Args:
        keys: [n, M], of which ``own`` [b] are those of the b facts; published: no others. sentinel: [M].
        first, second: [b, M] queries of the two wordings of each fact; first is matched, second is warned off.
        unrelated: [b, M] queries of questions that the facts do not touch.
        margin: rows whose target is this many times likelier than every other class are left out of the two
            sentinel terms. None: no row is.
    Returns:
        ``own``, L_no: the fact's key among all keys and the sentinel; ``neighbour``, L_so1: with its own key taken
        away, the sentinel is nearest; ``unrelated``, L_so2: for an unrelated question the sentinel is nearest.
    Source: Chen et al. 2024 (arXiv:2405.03279) eq. 9-12, and the released code.
    """
    n, root = len(keys), keys.shape[1] ** 0.5
    classes = torch.cat([keys, sentinel[None]])  # [n + 1, M]
    found = contrast(first @ classes.T / root, own)
    scores = second @ keys.T / root  # [b, n]
    scores = scores.index_put((torch.arange(len(own), device=own.device), own), second @ sentinel / root)
    neighbour = contrast(scores, own, margin)
    last = torch.full((len(unrelated),), n, device=keys.device)
    far = contrast(unrelated @ classes.T / root, last, margin)
    return {"own": found, "neighbour": neighbour, "unrelated": far}


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
    lm: LM, rows: Sequence[Row], vectors: Tensor, margin: float | None = 1.2, world: World = SINGLE
) -> tuple[Tensor, int]:
    """-log p summed over the answer tokens that are not ``clear`` yet, backpropagated into ``vectors``.

    Args:
        vectors: [m, d] a leaf; its gradient is added to.
        world: sum and gradient are over this process's rows.
    Returns:
        the sum in nats, without a graph, and how many tokens it is over.
    """
    total, count = torch.zeros(()), 0
    for states, labels, _ in answers(lm, rows, vectors, world):

        def loss(z: Tensor, part: slice, labels: Tensor = labels) -> Tensor:
            logp = z.log_softmax(-1)
            open_ = ~clear(logp.detach(), labels[part], margin)
            return F.nll_loss(logp, labels[part], reduction="none") * open_

        each = _backward(lm, states, loss)
        total, count = total + each.sum(), count + (len(each) if margin is None else int((each > 0).sum()))
    return total, count


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
        before = torch.cat([states.detach()[:0], *in_order])
        each = _backward(lm, states, divergence(lm, before))
        total, count = total + each.sum(), count + len(each)
    return total, count


def _backward(lm: LM, states: Tensor, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The loss at each state, once it has gone backwards."""
    each = head_loss(lm, states, loss)
    each.sum().backward()
    return each.detach().cpu()


@torch.no_grad()
def base_states(lm: LM, rows: Sequence[Row]) -> list[Tensor]:
    """States [answer tokens, d] of each row that predict its answer, in the model as it is."""
    states_of: list[list[Tensor]] = [[] for _ in rows]
    for states, _, owners in answers(lm, rows, None):
        for owner, state in zip(owners, states, strict=True):
            states_of[owner].append(state)
    return [torch.stack(own) for own in states_of]
