"""The workers of a pool, and a new one in the place of each that is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from ppo_dist.config import RunError
from ppo_dist.config.workers import Cluster
from ppo_dist.reports import Vitals
from ppo_dist.rollout.health import Life, Restarts
from ppo_dist.types import Chunk, Rollout, Weights

T = TypeVar("T")


class WorkerError(RuntimeError):
    """A worker did not do what it was told. One that `is_lost` never will again; `is_final` says
    that no other would do better in its place.
    """

    def __init__(self, reason: str, is_lost: bool = False, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_lost, self.is_final = is_lost or is_final, is_final


class Worker(Protocol):
    """A rollout worker, here or elsewhere; `receive` may come while it generates, and while it
    starts for the first time. All raise WorkerError.
    """

    def start(self, anew: bool) -> None:
        """Waits for its engine; `anew`: in a new process, whatever has become of the last one."""

    def receive(self, weights: Weights) -> None:
        """Keeps a version for the chunks that will ask for it."""

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], Vitals]:
        """Rollouts of a chunk, and what they took."""

    def sleep(self) -> None:
        """Frees its device until the next chunk comes."""

    def end(self) -> None:
        """Ends it for good, and frees its place; raises nothing."""


class Member:
    """A worker and its life so far; since when it is lost, if it is; whether it has still to answer
    a version that was sent; and whether it is on its way out.
    """

    def __init__(self, worker: Worker, number: int, limits: Cluster) -> None:
        self.worker, self.number, self.restarts = worker, number, Restarts(limits)
        self.life = Life()
        self.lost_at: float | None = None
        self.owes_answer = False
        self.leaves = False

    def still_leads(self, life: Life) -> bool:
        """Whether news of a worker that led `life` are about the one that is there."""
        return self.life.starts == life.starts and self.life.state != "dead"


class Members:
    """Starts workers, and starts those that are lost anew, as often as `limits` allow, each in a
    thread of its own beside what the others do; then they are left out. Lives change while
    `changed` is held.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        limits: Cluster,
        note: Callable[..., None],
        refit: Callable[[Member, Life], None],
    ) -> None:
        """`note` hears of failures; `refit` is told of a worker whose engine has come up, and gives
        it what it needs to serve, before it is idle.
        """
        self.all = [Member(worker, number, limits) for number, worker in enumerate(workers)]
        self.idle: dict[int, Member] = {}  # by number; first who has been idle for longest
        self.changed = threading.Condition()
        self.last_reason = ""
        self._limits, self._note, self._refit = limits, note, refit
        self._closed = threading.Event()
        self._bug: Exception | None = None

    def begin(self) -> None:
        """Starts them all."""
        for member in self.all:
            self._apart(self._start, member)

    def add(self, worker: Worker) -> None:
        """Starts one more."""
        with self.changed:
            member = Member(worker, len(self.all), self._limits)
            member.life = Life(joins=True)
            self.all = [*self.all, member]
        self._tell(member, "added")
        self._apart(self._start, member)

    def remove(self, member: Member) -> None:
        """Ends one for good, as soon as it is idle or is not there at all."""
        member.leaves = True
        self._apart(self._end, member)

    def left(self) -> list[Member]:
        """Those that are not out.

        Raises:
            RunError: there are none.
        """
        left = [member for member in self.all if not member.life.is_out]
        if not left:
            raise RunError(f"rollout workers: none is left; the last one: {self.last_reason}")
        return left

    def free(self) -> Iterator[Member]:
        """Those that are idle and stay; first who has been idle for longest."""
        return (member for member in self.idle.values() if not member.leaves)

    def wait(self, ask: Callable[[], T | None]) -> T:
        """The first answer that is not None or false, asked for again with every change."""
        with self.changed:
            while not (found := ask()):
                if self._closed.is_set():
                    raise WorkerError("they were let go")
                if self._bug is not None:
                    raise self._bug
                self.changed.wait()
            return found

    def release(self, member: Member, life: Life) -> None:
        """It has done what it did in `life`, and may be asked for something else."""
        with self.changed:
            if member.still_leads(life):
                self.idle[member.number] = member
            self.changed.notify_all()

    def failed(self, member: Member, life: Life, version: int | None, error: WorkerError) -> None:
        """A worker that led `life` failed: it serves no version that it is not given again."""
        with self.changed:
            if not member.still_leads(life):
                return  # somebody else has seen it too
            after = member.life.failed(version)
            lost = error.is_lost or after.is_hopeless
            member.life = after.lost(error.is_final) if lost else after
            if lost:
                self.idle.pop(member.number, None)
            self.last_reason = str(error)
            self.changed.notify_all()
        if self._closed.is_set():
            return
        self._tell(member, "failed", version=version, reason=str(error))
        if error.is_final:
            self._leave_out(member, str(error))
        elif lost:
            member.lost_at = member.lost_at or time.monotonic()
            self._apart(self._restart, member)

    def close(self) -> None:
        """Wakes who waits, and starts nobody any more."""
        self._closed.set()
        with self.changed:
            self.changed.notify_all()

    def _end(self, member: Member) -> None:
        self.wait(lambda: self._can_end(member))
        with self.changed:
            life, _ = member.life, self.idle.pop(member.number, None)
            if life.is_out:
                return  # it was left out already
            member.life = life.left_out() if life.state == "dead" else life.lost(for_good=True)
            self.changed.notify_all()
        member.worker.end()
        self._tell(member, "removed")

    def _can_end(self, member: Member) -> bool:
        return member.number in self.idle or not member.life.is_settled or member.life.is_out

    def _restart(self, member: Member) -> None:
        """Puts a new worker in the place of one that is lost, or leaves it out."""
        pause = member.restarts.pause(time.monotonic())
        if pause is not None and self._closed.wait(pause):
            return
        with self.changed:
            life = member.life
            if life.is_out:
                return  # it was removed meanwhile
            member.life = life.left_out() if pause is None else life.restarted()
            self.changed.notify_all()
        if pause is None:
            self._leave_out(member, self.last_reason)
        else:
            self._start(member)

    def _leave_out(self, member: Member, reason: str) -> None:
        member.worker.end()
        self._tell(member, "left_out", reason=reason)

    def _start(self, member: Member) -> None:
        life = member.life
        try:
            member.worker.start(anew=life.starts > 0)
        except WorkerError as error:
            return self.failed(member, life, None, error)
        self._refit(member, life)
        self.release(member, life)
        if member.lost_at is not None and member.still_leads(life):
            seconds, member.lost_at = time.monotonic() - member.lost_at, None
            self._tell(member, "restarted", state=member.life.state, seconds=round(seconds, 3))

    def _tell(self, member: Member, what: str, **details: Any) -> None:
        self._note(f"rollout_worker_{what}", worker=member.number, **details)

    def _apart(self, work: Callable[[Member], None], member: Member) -> None:
        """Does something in a thread of its own, which keeps no process from ending. What nobody
        expects there is raised where somebody waits.
        """

        def run() -> None:
            try:
                work(member)
            except Exception as error:
                with self.changed:
                    self._bug = error
                    self.changed.notify_all()

        threading.Thread(target=run, daemon=True, name=f"start-{member.number}").start()
