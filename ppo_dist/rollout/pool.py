"""All rollout workers as one, wherever they run."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ppo_dist.types import Chunk, Rollout, Weights


class Worker(Protocol):
    """A rollout worker, here or elsewhere; `receive` may come while it generates."""

    def receive(self, weights: Weights) -> None:
        """Keeps a version for the chunks that will ask for it."""

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], float]:
        """Rollouts of a chunk, and the seconds that they took."""


class Pool:
    """The RolloutPool of the system; see protocols.py. A free worker takes the next chunk, so all
    stay busy while whoever submitted does something else.
    """

    def __init__(self, workers: Sequence[Worker], prepare: Callable[[], object] = lambda: None):
        """`prepare` is called in every thread that a worker is driven from."""
        self._workers = workers
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(workers), "generate", prepare)
        self._senders = ThreadPoolExecutor(len(workers), "receive")
        self._underway: dict[int, list[Future[tuple[list[Rollout], float]]]] = {}
        self._tickets = 0
        self._busy = 0.0

    def load(self, weights: Weights) -> None:
        """See RolloutPool."""
        list(self._senders.map(lambda worker: worker.receive(weights), self._workers))

    def submit(self, chunks: Sequence[Chunk]) -> int:
        """See RolloutPool."""
        self._tickets += 1
        self._underway[self._tickets] = [self._threads.submit(self._run, c) for c in chunks]
        return self._tickets

    def collect(self, ticket: int) -> list[Rollout]:
        """See RolloutPool."""
        done = [future.result() for future in self._underway.pop(ticket)]
        self._busy += sum(seconds for _, seconds in done)
        return [rollout for rollouts, _ in done for rollout in rollouts]

    def busy_s(self) -> float:
        """See RolloutPool."""
        busy, self._busy = self._busy, 0.0
        return busy

    def close(self) -> None:
        """Lets go of what waits."""
        self._threads.shutdown(cancel_futures=True)
        self._senders.shutdown()

    def _run(self, chunk: Chunk) -> tuple[list[Rollout], float]:
        worker = self._idle.get()
        try:
            return worker.timed(chunk)
        finally:
            self._idle.put(worker)
