"""A search that spends a given number of tries, and what ``parenting.py`` gives it, method by method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

Settings = dict[str, Any]
RATES = tuple(2.5e-4 * 2.0**k for k in range(-4, 6))


@dataclass(frozen=True)
class Space:
    """The settings of one method: one number in steps, and single changes of other settings."""

    fixed: Settings
    """What makes it this method; not searched."""
    name: str = "lr"
    """The number."""
    values: tuple[Any, ...] = RATES
    start: Any = 2.5e-4
    changes: tuple[Settings, ...] = ()
    """Tried in this order on the best so far, and kept if better."""
    tries: int | None = None
    """Fewer than the others have. None: as many."""


SPACES: dict[str, Space] = {
    "parenting": Space({}, changes=({"threshold": -0.4}, {"delta": 0.5})),
    "mixed": Space({"mode": "mixed"}, changes=({"delta": 0.5}, {"delta": 1.0})),
    "plain": Space({"mode": "plain"}, changes=({"mean": "examples"}, {"rows_extraction": 0})),
    "format_only": Space(
        {"mode": "plain", "rows_adherence": 5, "rows_robustness": 0, "rows_extraction": 0},
        changes=({"mean": "examples"}, {"bare": 0.5}),
    ),
}
"""Methods that tune weights. ``format_only`` learns from ``consistent`` records alone; ``bare`` is its data's."""
PROMPTED: dict[str, Space] = {
    "cad": Space({}, "alpha", (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0), 0.5),
    "ircan": Space(
        {"neurons": 32}, "factor", (1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 8.0), 2.0, ({"neurons": 8}, {"neurons": 64})
    ),
}
"""Methods that are asked behind the examples of the few-shot prompt, on dev and after."""
SHOTS = Space({}, "shots", (2, 4, 6), 2, tries=3)
"""The few-shot prompt itself: how many examples."""


@dataclass
class Search:
    """Tries of one method, the next one chosen by what came before."""

    space: Space
    tried: list[tuple[Settings, float]] = field(default_factory=list)

    def run(self, tries: int, score: Callable[[Settings], float | None]) -> Settings:
        """Spend the tries; the best settings. ``score``: None for settings that cannot be run."""
        for _ in range(self.space.tries or tries):
            if (settings := self.following()) is None:
                break
            value = score({**self.space.fixed, **settings})
            self.tried.append((settings, float("-inf") if value is None else value))
        return self.best[0]

    @property
    def best(self) -> tuple[Settings, float]:
        """The highest, the first of equals."""
        return max(self.tried, key=lambda one: one[1])

    def following(self) -> Settings | None:
        """First the number's optimum with values tried on both sides, then the changes, then its neighbours again under
        the changes that were kept, then values between."""
        if not self.tried:
            return {self.space.name: self.space.start}
        alone = max((one for one in self.tried if len(one[0]) == 1), key=lambda one: one[1])[0]
        best, known = self.best[0], [settings for settings, _ in self.tried]
        changed = [best | change for change in self.space.changes if not self._was_tried(change)]
        options = [*self._beside(alone), *changed, *self._beside(best), *self._between(best)]
        return next((one for one in options if one not in known), None)

    def inside(self) -> bool:
        """The best value of the number has tried neighbours on both sides, or ends where it cannot go on."""
        value = self.best[0][self.space.name]
        seen = [settings[self.space.name] for settings, _ in self.tried]
        ends = value in (self.space.values[0], self.space.values[-1])
        return ends or min(seen) < value < max(seen)

    def _was_tried(self, change: Settings) -> bool:
        return any(change.items() <= settings.items() for settings, _ in self.tried)

    def _beside(self, settings: Settings) -> list[Settings]:
        """One step up and one down."""
        name, values = self.space.name, self.space.values
        if settings[name] not in values:
            return []
        at = values.index(settings[name])
        return [settings | {name: values[i]} for i in (at + 1, at - 1) if 0 <= i < len(values)]

    def _between(self, settings: Settings) -> Iterable[Settings]:
        """Half way, in ratio, to the nearest values tried on either side, the better side first."""
        name, value = self.space.name, settings[self.space.name]
        if not isinstance(value, float):
            return
        alike = {own[name]: score for own, score in self.tried if {**own, name: value} == settings}
        below, above = ([v for v in alike if v < value], [v for v in alike if v > value])
        sides = [*([max(below)] if below else []), *([min(above)] if above else [])]
        for side in sorted(sides, key=lambda v: -alike[v]):
            yield settings | {name: sqrt(value * side)}
