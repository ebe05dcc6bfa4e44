"""Where the next prompts and labelled examples come from: shuffled passes over the data that can be
resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from ppo_dist.config.base import Origin
from ppo_dist.types import LabelledExample, MixPlan, Prompt

T = TypeVar("T")


class Cursor(Generic[T]):
    """An endless walk over items, in a new order each epoch; all it remembers is how many were
    taken.
    """

    def __init__(self, items: Sequence[T], seed: int, salt: int) -> None:
        self._items, self._seed, self._salt = items, seed, salt
        self._taken = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, count: int) -> list[T]:
        """The next `count` items; crosses the end of an epoch without leaving any out."""
        return [self._next() for _ in range(count)]

    def _next(self) -> T:
        epoch, offset = divmod(self._taken, len(self._items))
        if self._order[0] != epoch:
            generator = np.random.default_rng([self._seed, self._salt, epoch])
            self._order = (epoch, generator.permutation(len(self._items)).tolist())
        self._taken += 1
        return self._items[self._order[1][offset]]

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and over how many items."""
        return {"taken": self._taken, "items": len(self._items)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Raises:
            ValueError: the data has another size than it had then.
        """
        if state["items"] != len(self._items):
            raise ValueError(f"the data had {state['items']} rows, now it has {len(self._items)}")
        self._taken = state["taken"]


class Stream:
    """Prompts by origin and labelled examples, as a plan asks for them."""

    def __init__(
        self,
        prompts: Mapping[Origin, Sequence[Prompt]],
        examples: Sequence[LabelledExample],
        seed: int,
    ) -> None:
        self._prompts = {
            origin: Cursor(p, seed, salt)
            for salt, (origin, p) in enumerate(sorted(prompts.items()))
        }
        self._examples = Cursor(examples, seed, salt=len(prompts))

    def prompts(self, plan: MixPlan) -> list[Prompt]:
        """The prompts of a step."""
        return [
            p
            for origin, count in plan.prompts.items()
            if count
            for p in self._prompts[origin].take(count)
        ]

    def examples(self, plan: MixPlan) -> list[LabelledExample]:
        """The labelled examples of one update."""
        return self._examples.take(plan.labelled)

    def state_dict(self) -> dict[str, Any]:
        """The cursors."""
        cursors = {str(origin): cursor.state_dict() for origin, cursor in self._prompts.items()}
        return {**cursors, "examples": self._examples.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there. Raises ValueError as Cursor does."""
        for origin, cursor in self._prompts.items():
            cursor.load_state_dict(state[origin])
        self._examples.load_state_dict(state["examples"])
