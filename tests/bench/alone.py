"""What a run's engine takes for the same responses when there is nothing around it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from ppo_dist.build.engines import engine
from ppo_dist.config import Config
from ppo_dist.transport.memory import MemoryReceiver
from ppo_dist.types import Chunk, Rollout, Weights


class Taken(NamedTuple):
    """Seconds of the engine alone for a step's responses, and what the run lost by that."""

    alone: float
    lost: float


class EngineAlone:
    """Another engine with the same weights beside a run of one process: it generates what each step
    but the first does, right before and after it, so that a machine that is slower for a while is
    so for both.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._weights: Weights | None = None  # the run's newest; None: as they are on disk
        self._asked: list[Sequence[Chunk]] = []  # by step
        self._engine: Any = None
        self._before: list[Taken] = []  # by step after the first
        self._after: list[Taken] = []

    def listen(self, pool: Any) -> None:
        """From now on hears what the pool is asked for."""
        load, submit, collect = pool.load, pool.submit, pool.collect

        def loading(weights: Weights) -> bool:
            self._weights = weights
            is_there: bool = load(weights)
            return is_there

        def submitting(chunks: Sequence[Chunk]) -> int:
            self._asked.append(chunks)
            if self._counts():
                self._generate(chunks, self._before)
            ticket: int = submit(chunks)
            return ticket

        def collecting(ticket: int) -> list[Rollout]:
            rollouts: list[Rollout] = collect(ticket)
            if self._counts():
                again = self._generate(self._asked[-1], self._after)
                assert lengths(again) == lengths(rollouts), "not the same responses"
            return rollouts

        pool.load, pool.submit, pool.collect = loading, submitting, collecting

    def take_from(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """Its time is not the steps', and what came after a generation not that stage's. Returns
        its share of each step's generation; none if the steps have no responses.

        rows: metrics of all steps but the first
        """
        if not self._before:
            return []
        shares = []
        for row, before, after in zip(rows, self._before, self._after, strict=True):
            row["timing_s/step"] -= before.lost + after.lost
            row["timing_s/generate"] -= after.lost
            shares.append(statistics.mean((before.alone, after.alone)) / row["timing_s/generate"])
        return shares

    def _counts(self) -> bool:
        """Whether this step is after the first, and has responses at all."""
        return len(self._asked) > 1 and len(self._asked[-1]) > 0

    def _generate(self, chunks: Sequence[Chunk], taken: list[Taken]) -> list[Rollout]:
        begin = time.perf_counter()
        warm = self._engine is not None
        if not warm:
            path = self._config.model.path or f"{self._config.run.dir}/model"  # made on the spot
            self._engine = engine(self._config, path, "cpu")()
        if self._weights:
            self._engine.load(self._weights.version, MemoryReceiver().fetch(self._weights))
        if not warm:
            self._engine.generate(chunks[0])  # does not count
        ready = time.perf_counter()
        rollouts = [rollout for chunk in chunks for rollout in self._engine.generate(chunk)]
        end = time.perf_counter()
        taken.append(Taken(end - ready, end - begin))
        return rollouts


def lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """In tokens."""
    return [len(rollout.tokens_R) for rollout in rollouts]
