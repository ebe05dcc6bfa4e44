"""All rollout workers as one, wherever they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait

from ppo_dist.config import RunError, WorkersLost
from ppo_dist.config.workers import Cluster
from ppo_dist.protocols import WeightsError
from ppo_dist.reports import Vitals
from ppo_dist.rollout.health import Life
from ppo_dist.rollout.members import Member, Members, Worker, WorkerError
from ppo_dist.types import Chunk, Rollout, Weights

ATTEMPTS = 3
ON_DISK = 0  # the version that an engine starts with
Done = tuple[list[Rollout], Vitals, int]  # and the worker that did it


def _a_thread_each(workers: int) -> Executor:
    return ThreadPoolExecutor(workers, "generate")


class Pool:
    """The RolloutPool of the system; see protocols.py. A free worker takes the next chunk, so all
    stay busy while whoever submitted does something else. A worker serves no version that it did
    not receive whole; the chunk of one that is lost is done by another.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        keep: int,
        note: Callable[..., None] = lambda event, **details: None,
        takes_turns: bool = False,
        limits: Cluster = Cluster(),  # noqa: B008 (frozen)
        another: Callable[[], Worker] | None = None,
        late_s: float = 60.0,
        generators: Callable[[int], Executor] = _a_thread_each,
    ) -> None:
        """Weights of the newest `keep` versions are kept for workers that need them again. `note`
        hears of failures. Workers that take turns with the learners sleep when nothing is left to
        generate. Workers that are lost are started anew within `limits`; with `another` their
        number can change. Those that have not received a version after `late_s` are not waited for
        if others have. `generators` makes what drives that many workers.
        """
        self._weights: dict[int, Weights] = {}
        self._keep, self._takes_turns, self._late_s = keep, takes_turns, late_s
        self._asked = len(workers)
        self._another = another
        self._generators, self._made = generators, list[Executor]()
        self._threads, self._senders = self._executors(len(workers))
        self._underway: dict[int, list[Future[Done]]] = {}
        self._waiting: Counter[int] = Counter()  # chunks of a version that no worker has begun
        self._tickets = 0
        self._vitals: dict[int, Vitals] = {}  # by worker
        self._members = Members(workers, limits, note, self._refit)
        self._members.begin()

    def resize(self, workers: int) -> None:
        """See RolloutPool."""
        if self._another is None or workers == self._asked:
            return
        self._asked = workers
        with self._members.changed:
            stay = [m for m in self._members.all if not (m.life.is_out or m.leaves)]
        for _ in range(workers - len(stay)):
            self._members.add(self._another())
        # rather those that serve nothing, and then the latest
        stay.sort(key=lambda m: (m.life.state == "healthy", -m.number))
        for member in stay[: max(len(stay) - workers, 0)]:
            self._members.remove(member)
        before = self._threads, self._senders
        self._threads, self._senders = self._executors(workers)
        for executor in before:
            executor.shutdown(wait=False)  # they do what they have been asked

    def load(self, weights: Weights) -> bool:
        """See RolloutPool."""
        with self._members.changed:
            self._weights[weights.version] = weights
            for old in sorted(self._weights)[: -self._keep]:
                del self._weights[old]
        left = self._members.left
        fit = [m for m in left() if m.life.takes_weights and not m.owes_answer]
        asked = [self._senders.submit(self._sends, member, weights) for member in fit]
        done, _ = wait(asked, timeout=self._late_s)
        if not any(answer.result() for answer in (*done, *asked)):
            # who was starting is given the newest version, or will take the next attempt
            self._members.wait(lambda: any(member.life.is_settled for member in left()))
        return any(weights.version in member.life.versions for member in self._members.all)

    def submit(self, chunks: Sequence[Chunk]) -> int:
        """See RolloutPool."""
        self._tickets += 1
        with self._members.changed:
            self._waiting.update(chunk.version for chunk in chunks)
        self._underway[self._tickets] = [self._threads.submit(self._run, c) for c in chunks]
        return self._tickets

    def collect(self, ticket: int) -> list[Rollout]:
        """See RolloutPool."""
        try:
            done = [future.result() for future in self._underway.pop(ticket)]
        except (WorkerError, WeightsError) as error:
            raise RunError(f"rollout workers: {error}") from None
        for _, new, number in done:
            self._vitals[number] = self._vitals.get(number, Vitals()) + new
        if self._takes_turns and not self._underway:
            self.sleep()
        return [rollout for rollouts, *_ in done for rollout in rollouts]

    def sleep(self) -> None:
        """Has all workers free their devices, also those that are starting; the next chunk wakes
        them.

        Raises:
            RunError: none is left.
        """
        list(self._threads.map(self._rests, self._members.all))
        self._members.left()

    def vitals(self) -> dict[int, Vitals]:
        """See RolloutPool."""
        told, self._vitals = self._vitals, {}
        left = [member.number for member in self._members.all if not member.life.is_out]
        return {number: told.get(number, Vitals()) for number in left}

    def close(self) -> None:
        """Ends all workers, and what waits for them: a thread that is left would keep the process
        from ending until its worker's deadline.
        """
        self._members.close()
        for executor in self._made:
            executor.shutdown(wait=False, cancel_futures=True)
        for member in self._members.all:
            if not member.life.is_out:
                member.worker.end()
        for executor in self._made:
            executor.shutdown()

    def _executors(self, workers: int) -> tuple[Executor, Executor]:
        generate = self._generators(workers)
        receive = ThreadPoolExecutor(workers, "receive")
        self._made += [generate, receive]
        return generate, receive

    def _run(self, chunk: Chunk) -> Done:
        for attempt in range(ATTEMPTS):
            if attempt > 0:  # the first one waits since it came
                with self._members.changed:
                    self._waiting[chunk.version] += 1
            member, life = self._fit(chunk.version)
            try:
                return *member.worker.timed(chunk), member.number
            except WorkerError as error:
                problem = error
                self._members.failed(member, life, chunk.version, error)
            finally:
                self._members.release(member, life)
        raise WorkerError(f"a chunk failed {ATTEMPTS} times: {problem}")

    def _fit(self, version: int) -> tuple[Member, Life]:
        """Waits for an idle worker that has a version, or can still get it."""
        try:
            for _ in range(ATTEMPTS * len(self._members.all)):
                member, life = self._members.wait(lambda: self._take(version))
                if life.serves(version) or self._receives(member, self._weights[version]):
                    return member, life
                self._members.release(member, life)
            raise WorkersLost(  # who sends it may be the one that is lost
                f"rollout workers: none could be given version {version}: "
                f"{self._members.last_reason}"
            )
        finally:
            with self._members.changed:
                self._waiting[version] -= 1
                if self._waiting[version] == 0:
                    del self._waiting[version]  # a run has very many versions
                self._members.changed.notify_all()

    def _take(self, version: int) -> tuple[Member, Life] | None:
        """The worker that has been idle for longest, if there is one for this version; better one
        that has it than one that can get it. Older versions come first: an engine that has loaded a
        newer one cannot go back.

        Raises:
            WorkersLost: none has it any more, and none can get it.
        """
        if any(older < version for older in self._waiting):
            return None
        weights = self._weights.get(version)
        can_be_given = weights is not None and weights.again
        first = next((m for m in self._members.free() if m.life.serves(version)), None)
        if first is None and can_be_given:
            first = next(self._members.free(), None)
        if first is not None:
            del self._members.idle[first.number]
            first.life = first.life.taken(version)
            return first, first.life
        left, will_have = self._members.left(), can_be_given or self._starts_with(version)
        if not will_have and not any(version in member.life.versions for member in left):
            raise WorkersLost(
                f"rollout workers: none has version {version} any more, which cannot be sent "
                f"again: {self._members.last_reason}"
            )
        return None

    def _starts_with(self, version: int) -> bool:
        return version == ON_DISK and not self._weights

    def _sends(self, member: Member, weights: Weights) -> bool:
        member.owes_answer = True
        try:
            return self._receives(member, weights)
        finally:
            member.owes_answer = False

    def _receives(self, member: Member, weights: Weights) -> bool:
        life = member.life
        try:
            member.worker.receive(weights)
        except WorkerError as error:
            self._members.failed(member, life, weights.version, error)
            return False
        with self._members.changed:
            if not member.still_leads(life):
                return False
            member.life = member.life.received(weights.version, self._weights)
            self._members.changed.notify_all()
        return True

    def _refit(self, member: Member, life: Life) -> None:
        """A worker's engine has come up: a later one is given the newest version at once."""
        with self._members.changed:
            if not member.still_leads(life):
                return  # it is lost again
            if self._starts_with(ON_DISK):
                member.life = member.life.received(ON_DISK)
            member.life = member.life.started()
            newest = self._weights[max(self._weights)] if self._weights else None
            self._members.changed.notify_all()
        if life.is_late and newest is not None and newest.again:
            self._receives(member, newest)

    def _rests(self, member: Member) -> None:
        for _ in range(ATTEMPTS):  # a new one in its place must sleep too
            self._members.wait(lambda: member.life.is_settled)
            life = member.life
            if life.is_out:
                return
            try:
                return member.worker.sleep()
            except WorkerError as error:
                self._members.failed(member, life, None, error)
