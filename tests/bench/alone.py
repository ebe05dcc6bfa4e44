"""What a run's engine takes for the same responses when there is nothing around it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ppo_dist.build.engines import engine
from ppo_dist.config import Config
from ppo_dist.transport.memory import MemoryReceiver
from ppo_dist.types import Chunk, Rollout, Weights


class EngineAlone:
    """Another engine with the same weights beside a run of one process: it generates what the run's
    last step does, right before and after it, so that a machine that is slower for a while is so
    for both.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._weights: Weights | None = None  # the run's newest; None: as they are on disk
        self.taken: list[float] = []  # seconds for all chunks
        self._between: list[float] = []  # what the run lost by it, in seconds: before, after

    def listen(self, pool: Any) -> None:
        """From now on hears what the pool is asked for."""
        load, submit, collect = pool.load, pool.submit, pool.collect
        asked: list[Sequence[Chunk]] = []  # by step

        def loading(weights: Weights) -> bool:
            self._weights = weights
            is_there: bool = load(weights)
            return is_there

        def submitting(chunks: Sequence[Chunk]) -> int:
            asked.append(chunks)
            if self._is_last(asked):
                self._generate(chunks)
            ticket: int = submit(chunks)
            return ticket

        def collecting(ticket: int) -> list[Rollout]:
            rollouts: list[Rollout] = collect(ticket)
            if self._is_last(asked):
                again = self._generate(asked[-1])
                assert lengths(again) == lengths(rollouts), "not the same responses"
            return rollouts

        pool.load, pool.submit, pool.collect = loading, submitting, collecting

    def take_from(self, row: dict[str, Any]) -> None:
        """Its time is not the step's, and what came after the generation not that stage's."""
        row["timing_s/step"] -= sum(self._between)
        row["timing_s/generate"] -= self._between[-1]

    def _is_last(self, asked: Sequence[Sequence[Chunk]]) -> bool:
        """Whether the last step was asked for, and has responses at all."""
        return len(asked) == self._config.train.steps and len(asked[-1]) > 0

    def _generate(self, chunks: Sequence[Chunk]) -> list[Rollout]:
        begin = time.perf_counter()
        path = self._config.model.path or f"{self._config.run.dir}/model"  # made on the spot
        made = engine(self._config, path, "cpu")()
        if self._weights:
            made.load(self._weights.version, MemoryReceiver().fetch(self._weights))
        made.generate(chunks[0])  # does not count
        warm = time.perf_counter()
        rollouts = [rollout for chunk in chunks for rollout in made.generate(chunk)]
        end = time.perf_counter()
        self.taken.append(end - warm)
        self._between.append(end - begin)
        return rollouts


def lengths(rollouts: Sequence[Rollout]) -> list[int]:
    """In tokens."""
    return [len(rollout.tokens_R) for rollout in rollouts]
