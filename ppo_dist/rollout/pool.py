"""All rollout workers as one, wherever they run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from ppo_dist.config import RunError
from ppo_dist.protocols import WeightsError
from ppo_dist.types import Chunk, Rollout, Weights

ATTEMPTS = 3


class WorkerError(RuntimeError):
    """A worker did not do what it was told. `replace` puts a new one in its place, if it never will
    again; `is_final` says that no other would do better there.
    """

    def __init__(
        self, reason: str, replace: Callable[[], None] | None = None, is_final: bool = False
    ) -> None:
        super().__init__(reason)
        self.replace, self.is_final = replace, is_final


class Worker(Protocol):
    """A rollout worker, here or elsewhere; `receive` may come while it generates. All raise
    WorkerError.
    """

    def receive(self, weights: Weights) -> None:
        """Keeps a version for the chunks that will ask for it."""

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], float]:
        """Rollouts of a chunk, and the seconds that they took."""

    def sleep(self) -> None:
        """Frees its device until the next chunk comes."""


class _Member:
    """A worker and the versions that it can serve; one that is out gets nothing to do any more."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.versions, self.is_out = worker, {0}, False


class Pool:
    """The RolloutPool of the system; see protocols.py. A free worker takes the next chunk, so all
    stay busy while whoever submitted does something else. A worker serves no version that it did
    not receive whole; one that is lost is replaced, and its chunk is done by another. One that
    cannot be started is left out from then on.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        keep: int,
        note: Callable[..., None] = lambda event, **details: None,
        prepare: Callable[[], object] = lambda: None,
        takes_turns: bool = False,
    ) -> None:
        """Weights of the newest `keep` versions are kept for workers that need them again. `note`
        hears of failures; `prepare` is called in every thread that a worker is driven from. Workers
        that take turns with the learners sleep when nothing is left to generate.
        """
        self._members = [_Member(worker) for worker in workers]
        self._idle = list(self._members)
        self._changed = threading.Condition()
        self._weights: dict[int, Weights] = {}
        self._keep, self._note, self._takes_turns = keep, note, takes_turns
        self._threads = ThreadPoolExecutor(len(workers), "generate", prepare)
        self._senders = ThreadPoolExecutor(len(workers), "receive")
        self._underway: dict[int, list[Future[tuple[list[Rollout], float]]]] = {}
        self._tickets = 0
        self._busy = 0.0
        self._closed = False
        self._last_reason = ""

    def load(self, weights: Weights) -> bool:
        """See RolloutPool."""
        self._weights[weights.version] = weights
        for old in sorted(self._weights)[: -self._keep]:
            del self._weights[old]
        fit = [member for member in self._members if not member.is_out]
        return any(list(self._senders.map(lambda m: self._receives(m, weights), fit)))

    def submit(self, chunks: Sequence[Chunk]) -> int:
        """See RolloutPool."""
        self._tickets += 1
        self._underway[self._tickets] = [self._threads.submit(self._run, c) for c in chunks]
        return self._tickets

    def collect(self, ticket: int) -> list[Rollout]:
        """See RolloutPool."""
        try:
            done = [future.result() for future in self._underway.pop(ticket)]
        except (WorkerError, WeightsError) as error:
            raise RunError(f"rollout workers: {error}") from None
        self._busy += sum(seconds for _, seconds in done)
        if self._takes_turns and not self._underway:
            self.sleep()
        return [rollout for rollouts, _ in done for rollout in rollouts]

    def sleep(self) -> None:
        """Has all workers free their devices; the next chunk wakes them.

        Raises:
            RunError: none is left.
        """
        list(self._threads.map(self._rests, self._members))
        if all(member.is_out for member in self._members):
            raise RunError(f"rollout workers: none is left; the last one: {self._last_reason}")

    def busy_s(self) -> float:
        """See RolloutPool."""
        busy, self._busy = self._busy, 0.0
        return busy

    def close(self) -> None:
        """Lets go of what waits."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._senders.shutdown(wait=False, cancel_futures=True)

    def _run(self, chunk: Chunk) -> tuple[list[Rollout], float]:
        for _ in range(ATTEMPTS):
            member = self._fit(chunk.version)
            try:
                return member.worker.timed(chunk)
            except WorkerError as error:
                problem = error
                self._failed(member, chunk.version, error)
            finally:
                self._release(member)
        raise WorkerError(f"a chunk failed {ATTEMPTS} times: {problem}")

    def _fit(self, version: int) -> _Member:
        """Waits for an idle worker that has a version, or can still get it."""
        for _ in range(ATTEMPTS * len(self._members)):
            member = self._take(version)
            if version in member.versions or self._receives(member, self._weights[version]):
                return member
            self._release(member)
        raise WorkerError(f"none could be given version {version}: {self._last_reason}")

    def _take(self, version: int) -> _Member:
        with self._changed:
            while True:
                if all(member.is_out for member in self._members):
                    raise WorkerError(f"none is left; the last one: {self._last_reason}")
                self._idle.sort(key=lambda member: version not in member.versions)
                weights = self._weights.get(version)
                if self._idle and (
                    version in self._idle[0].versions or (weights is not None and weights.again)
                ):
                    return self._idle.pop(0)
                if not any(version in member.versions for member in self._members):
                    raise WorkerError(f"none has version {version}: {self._last_reason}")
                self._changed.wait()

    def _release(self, member: _Member) -> None:
        with self._changed:
            if not member.is_out:
                self._idle.append(member)
            self._changed.notify_all()

    def _receives(self, member: _Member, weights: Weights) -> bool:
        try:
            member.worker.receive(weights)
        except WorkerError as error:
            self._failed(member, weights.version, error)
            return False
        member.versions = {v for v in member.versions if v in self._weights} | {weights.version}
        return True

    def _rests(self, member: _Member) -> None:
        for _ in range(ATTEMPTS):  # a new one in its place must sleep too
            if member.is_out:
                return
            try:
                return member.worker.sleep()
            except WorkerError as error:
                self._failed(member, None, error)

    def _failed(self, member: _Member, version: int | None, error: WorkerError) -> None:
        """It may serve no version any more that it is not given again."""
        with self._changed:
            member.versions, member.is_out = set(), error.is_final
            if member.is_out and member in self._idle:
                self._idle.remove(member)
        self._last_reason = str(error)
        if self._closed:
            return
        number = self._members.index(member)
        self._note("rollout_worker_failed", worker=number, version=version, reason=str(error))
        if error.replace is not None:
            error.replace()
