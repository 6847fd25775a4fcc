"""Search among the keys that hold: exactly in memory, beside an index once there are many."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import BadInput, LmpatchError
from . import _near
from ._log import TRIES, Log
from ._state import State

if TYPE_CHECKING:
    import numpy as np

    from ..retrieval.index import KeyBlock

SPARE = 64  # rows of the index beyond k: all scores are computed again, since the index knows them roughly


class Search:
    """The live keys that no index covers, as one block, and the index. Both are brought up to date by a search."""

    def __init__(self, log: Log, state: State, exact: int) -> None:
        self._log, self._state, self._exact = log, state, exact
        self._block: KeyBlock | None = None
        self._index: _near.Near | None = None
        self._covered = 0  # rows of the log that the index answers for
        self._loaded = self._ended = 0  # rows, and ended facts, that the block has seen

    def __call__(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [m, k'] float64 and row numbers [m, k'] int64, best first, the lower number of equals first."""
        for left in reversed(range(TRIES)):
            self._state.refresh()
            try:
                return self._search(queries, k)
            except BadInput:
                raise
            except LmpatchError:  # another process has compacted, or replaced the index
                self._block = None
                if not left:
                    raise
        raise AssertionError

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np
        import torch

        block = self._ready()
        scores, seqs = (part.numpy() for part in block.search(torch.from_numpy(queries), k))
        if self._index is None:
            return scores, seqs
        lines = []
        for query, own, numbers in zip(queries, scores, seqs, strict=True):
            more = self._indexed(self._index, query, k)
            all_scores, all_seqs = np.concatenate([own, more[0]]), np.concatenate([numbers, more[1]])
            best = np.lexsort((all_seqs, -all_scores))[:k]
            lines.append((all_scores[best], all_seqs[best]))
        width = min((len(line) for line, _ in lines), default=0)  # an index may find fewer than k
        both = [np.array([line[i][:width] for line in lines]).reshape(len(queries), width) for i in (0, 1)]
        return both[0], both[1].astype(np.int64)

    def _indexed(self, index: _near.Near, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best ``k`` facts of the index that still hold."""
        import numpy as np
        import torch

        from ..retrieval.index import inner

        count = k + SPARE
        while True:
            seqs, vectors = index.search(query, count)
            keys = self._state.texts["key"].take(seqs).to_pylist()
            holds = np.array([self._state.live.get(key) == seq for key, seq in zip(keys, seqs, strict=True)], bool)
            if holds.sum() >= k or len(seqs) < count:
                scores = inner(torch.from_numpy(query), torch.from_numpy(vectors[holds]))
                return scores.numpy(), seqs[holds]
            count *= 4

    def _ready(self) -> KeyBlock:
        from ..retrieval.index import KeyBlock

        state = self._state
        covered = _near.newest(self._log.path) if len(state.live) > self._exact else 0
        if self._block is None or covered != self._covered:
            self._index = _near.Near(self._log.path, covered) if covered else None
            self._block = KeyBlock(self._log.matched)
            self._covered = self._loaded = covered
            self._ended = len(state.ended)
        for seq in state.ended[self._ended :]:
            if seq in self._block:
                self._block.drop(seq)
        self._ended = len(state.ended)
        if self._loaded < state.count:
            self._load(self._block)
        return self._block

    def _load(self, block: KeyBlock) -> None:
        import torch

        alive = self._state.alive()
        for seqs, vectors in self._log.batches(self._loaded, self._state.count):
            keep = alive[seqs]
            block.add(torch.from_numpy(vectors[keep, : self._log.matched]), seqs[keep].tolist())
        self._loaded = self._state.count
