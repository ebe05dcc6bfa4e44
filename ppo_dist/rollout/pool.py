"""A rollout pool of one worker in this process."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_dist.rollout.worker import RolloutWorker
from ppo_dist.types import Chunk, Rollout, Weights


class InProcessPool:
    """See RolloutPool. Chunks are generated when they are collected."""

    def __init__(self, worker: RolloutWorker) -> None:
        self._worker = worker
        self._waiting: list[Chunk] = []

    def submit(self, chunks: Sequence[Chunk]) -> None:
        """See RolloutPool."""
        self._waiting += chunks

    def collect(self) -> list[Rollout]:
        """See RolloutPool."""
        waiting, self._waiting = self._waiting, []
        return [rollout for chunk in waiting for rollout in self._worker.generate(chunk)]

    def load(self, weights: Weights) -> None:
        """See RolloutPool."""
        self._worker.load(weights)
