"""``Codebook``: prompts whose query falls into a ball get that ball's value as a layer's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ....errors import BadInput, CannotMerge
from ....inference.forward import Pass, current_pass
from ....models.hooks import Hook
from ....models.lm import LM
from ...patch import Law
from ..operation import Operation, by_row, check_widths, choose, need, prompt, ready

Replace = Literal["last", "prompt", "all"]
GAP = 1e-5
"""Between two balls that were split, as released."""
SAME = 1e-3
"""Queries that are nearer than this, over their length, are of one prompt: rounding alone sets them apart."""
NEAR = 4  # keys whose distance is taken exactly: the product that finds them rounds
CHUNK = 256


@dataclass(eq=False, frozen=True)
class Codebook(Operation):
    """Edits in their order, and the balls that follow from them. A key is the query of the edit that made the ball."""

    name: ClassVar[str] = "codebook"
    law: ClassVar[Law] = Law.UNION
    module: str
    """The linear layer whose input is the query and whose output is replaced."""
    replace: Replace
    """At the last prompt token, at all tokens of the prompt, or also at those behind it."""
    queries: Tensor
    """[n, in] of each edit's prompt."""
    labels: Tensor
    """[n, m] int32 token ids of each edit's target; -1 fills short ones."""
    radii: Tensor
    """[n] ε of a ball that the edit makes."""
    known: Tensor
    """[n] bool: the model said the target without the edit."""
    values: Tensor
    """[e, out]"""
    owner: Tensor
    """[n] int32 which value belongs to the edit; -1: none, the output stays."""
    epsilon: Tensor
    """[n] ε of the ball around the edit's query as it is now; -1: it has none of its own. Follows from the others, see
    ``balls``."""

    @classmethod
    def of(cls, module: str, replace: Replace, **tensors: Tensor) -> Codebook:
        """From all tensors but ``epsilon``, copied to the CPU."""
        longest = int((tensors["labels"] >= 0).sum(1).max()) if len(tensors["labels"]) else 0
        tensors = {**tensors, "labels": tensors["labels"][:, :longest]}
        own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        return cls(module, replace, **own, epsilon=balls(**{name: own[name] for name in DECIDES})[0])

    def parts(self) -> dict[str, Any]:
        return {"module": self.module, "replace": self.replace}

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in (*DECIDES, "values", "owner", "epsilon")}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codebook:
        book = cls(**{**parts, **tensors})
        need(type(book.module) is str and book.replace in get_args(Replace), "its codebook says no place.")
        forms = {name: (t.ndim, t.dtype) for name, t in tensors.items()}
        f, i, b = torch.float32, torch.int32, torch.bool
        wanted = {"queries": (2, f), "labels": (2, i), "radii": (1, f), "known": (1, b), "values": (2, f)}
        need(forms == wanted | {"owner": (1, i), "epsilon": (1, f)}, "its codebook has no such tensors.")
        need(len({len(t) for name, t in tensors.items() if name != "values"}) == 1, "an edit lacks a part.")
        need(bool((book.owner < len(book.values)).all()), "an edit's value is missing.")
        return book

    def __len__(self) -> int:
        """Edits."""
        return len(self.queries)

    def describe(self) -> str:
        where = {"last": "at the last prompt token", "prompt": "at every token of the prompt", "all": "at every token"}
        return f"{self.module}: a codebook of {int((self.epsilon >= 0).sum())} keys, {where[self.replace]}"

    def check(self, lm: LM) -> None:
        check_widths(lm, self.module, self.queries.shape[1], self.values.shape[1])

    def joined(self, others: Sequence[Codebook]) -> Codebook:
        """The edits of all, in this order; of two with one query and one target the first stays."""
        each = (self, *others)
        if any(one.parts() != self.parts() for one in each):
            raise CannotMerge("these codebooks replace different tokens. Fit them with one replace.")
        before = [sum(len(one.values) for one in each[:i]) for i in range(len(each))]
        owner = [torch.where(one.owner < 0, one.owner, one.owner + k) for one, k in zip(each, before, strict=True)]
        labels = pad_sequence([row for one in each for row in one.labels], batch_first=True, padding_value=-1)
        rest = {name: torch.cat([getattr(one, name) for one in each]) for name in ("queries", "radii", "known")}
        values = torch.cat([one.values for one in each])
        whole = {**rest, "labels": labels, "owner": torch.cat(owner)}
        words = torch.cat([whole["queries"].view(torch.int32), labels], 1)
        first: dict[bytes, int] = {}
        for i, word in enumerate(words.numpy()):
            first.setdefault(word.tobytes(), i)
        return _compact(self, values, whole, list(first.values()))

    def without(self, places: Sequence[int]) -> Codebook:
        """The codebook as it would be had these edits never been made; values of the others stay."""
        whole = {name: getattr(self, name) for name in (*DECIDES, "owner")}
        return _compact(self, self.values, whole, [i for i in range(len(self)) if i not in set(places)])

    @torch.no_grad()
    def hooks(self, lm: LM) -> list[Hook]:
        own = self.epsilon >= 0
        finder, values = Balls(self.queries[own], self.epsilon[own], self.owner[own]), ready(self.values)
        key = object()

        def last(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            now = current_pass()
            if now is not None and key in now.row_state:
                return None  # all prompts are read: nothing is left to do
            x, y = by_row(args[0], now), by_row(output, now)
            rows, columns = _deciding(x, now).nonzero(as_tuple=True)
            if now is not None and now.decided():
                now.row_state[key] = None
            entry = finder(x[rows, columns])
            hit = entry >= 0
            if not hit.any():
                return None
            out = y.clone()
            out[rows[hit], columns[hit]] = values(y.device, y.dtype)[0][entry[hit]]
            return out.reshape(output.shape)

        def more(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            now = current_pass()
            x, y = by_row(args[0], now), by_row(output, now)
            entry = choose(now, key, lambda: finder(x[_deciding(x, now)]))
            if entry is None:
                return None
            where = (prompt(x, now) | torch.tensor(self.replace == "all", device=x.device)) & (entry >= 0)[:, None]
            out = torch.where(where[..., None], values(y.device, y.dtype)[0][entry.clamp(min=0)][:, None], y)
            return out.reshape(output.shape)

        return [Hook(lm.module(self.module), last if self.replace == "last" else more)]


DECIDES = ("queries", "labels", "radii", "known")
"""The tensors that the balls follow from."""


class Balls:
    """Looks queries up: the nearest key, if the query is inside its ball."""

    def __init__(self, keys: Tensor, epsilon: Tensor, entries: Tensor) -> None:
        self._tensors = ready(keys, epsilon, keys.square().sum(1), entries)
        self.count = len(keys)

    @torch.no_grad()
    def __call__(self, queries: Tensor) -> Tensor:
        """[m] entry of each query [m, in]; -1: it is in no ball, or in one without an entry."""
        keys, epsilon, norms, entries = self._tensors(queries.device, torch.float32)
        if not self.count:
            return torch.full((len(queries),), -1, device=queries.device)
        q = queries.float()
        near = (norms - 2 * q @ keys.T).topk(min(NEAR, self.count), largest=False).indices  # [m, 4]
        exact = (keys[near] - q[:, None]).norm(dim=-1)
        distance, place = exact.min(1)
        best = near.gather(1, place[:, None])[:, 0]
        return torch.where(distance <= epsilon[best], entries[best].long(), -1)


def balls(queries: Tensor, labels: Tensor, radii: Tensor, known: Tensor) -> tuple[Tensor, list[int]]:
    """The balls that edits make one after the other, and which edit made the ball that each belongs to.

    Returns:
        [n] ε of the ball around each edit's query, -1: it made none; [n] the edit whose ball is its own, -1: none, the
        model says its target already.
    """
    epsilon, owner = torch.full_like(radii, -1), [-1] * len(queries)
    x = queries.double()
    norms = x.square().sum(1)
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        between = (norms[part, None] + norms - 2 * x[part] @ x.T).clamp(min=0).sqrt().float()  # [c, n]
        for j, distances in enumerate(between, start):
            there = epsilon[:j] >= 0
            here, distance = -1, torch.inf
            if there.any():
                here = int(torch.where(there, distances[:j], torch.inf).argmin())
                distance = float(distances[here])
            inside = here >= 0 and distance <= float(epsilon[here])
            if bool(known[j]) and not inside:
                continue  # nothing is wrong
            if here < 0 or distance > float(radii[j] + epsilon[here]):
                epsilon[j], owner[j] = radii[j], j
            elif torch.equal(labels[j], labels[here]):
                epsilon[here], owner[j] = max(float(epsilon[here]), distance), owner[here]
            elif distance <= SAME * float(norms[j].sqrt()):  # the prompt itself: the later edit takes the ball
                epsilon[j], owner[j] = min(float(epsilon[here]), float(radii[j])), j
                epsilon[here] = -1
            else:
                epsilon[here], epsilon[j], owner[j] = min(float(epsilon[here]), distance / 2 - GAP), distance / 2, j
    return epsilon, owner


def _deciding(x: Tensor, now: Pass | None) -> Tensor:
    """[n, t] True where a query is; in a call that is not lmpatch's, at the last token of each row."""
    if now is not None:
        return now.deciding()
    where = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    where[:, -1] = True
    return where


def _compact(book: Codebook, values: Tensor, whole: Mapping[str, Tensor], kept: list[int]) -> Codebook:
    """These edits of ``whole``, with their values alone."""
    rows = {name: t[kept] for name, t in whole.items()}
    used, place = rows["owner"].unique(return_inverse=True)
    place = place.int() - int((used < 0).any())
    return Codebook.of(book.module, book.replace, **{**rows, "owner": place}, values=values[used[used >= 0].long()])


def check_replace(value: str) -> None:
    """Raise ``BadInput`` unless it is one of ``Replace``."""
    if value not in get_args(Replace):
        raise BadInput(f"replace is {value!r}. Give {', '.join(get_args(Replace))}.")


OPERATION = Codebook
