"""Which worker does what: never one that has not received the version, and none waits for one that
failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ppo_dist.config import RunError, WorkersLost
from ppo_dist.config.workers import Cluster
from ppo_dist.data.chunks import chunks
from ppo_dist.reports import Vitals
from ppo_dist.rollout.members import WorkerError
from ppo_dist.rollout.pool import Pool
from ppo_dist.types import Chunk, Prompt, Rollout, Sampling, Weights
from tests.fakes import FakeEngine

FAILED, RESTARTED, LEFT_OUT = (
    f"rollout_worker_{what}" for what in ("failed", "restarted", "left_out")
)
PROMPTS = [Prompt(f"p:{i}", "verifiable", "", np.arange(3, 5 + i)) for i in range(6)]


def work(version: int) -> list[Chunk]:
    return chunks(PROMPTS, 1, 1, 0, version, Sampling(1.0, 8, 0, "train"))


class Fragile:
    """A worker that refuses what it is told to refuse, and says which versions it was asked for
    without having them.
    """

    def __init__(self) -> None:
        self.received: set[int] = {0}
        self.loaded = 0  # loading it drops older ones, and another in its place drops it
        self.refuses: set[int] = set()
        self.crashes = 0
        self.wrong: list[int] = []
        self.starts: list[bool] = []
        self.naps = self.ends = 0
        self.breaks = self.is_unfit = False
        self.gate: threading.Event | None = None
        self.opens = threading.Event()  # before that no engine starts
        self.opens.set()
        self.served: list[int] = []
        self.asked = threading.Event()
        self.hangs_at: set[int] = set()  # versions that it is lost over, once
        self.late: threading.Event | None = None  # before that it receives nothing

    def start(self, anew: bool) -> None:
        self.starts.append(anew)
        if self.is_unfit:
            raise WorkerError("the engine does not load new weights right", is_final=True)
        self.opens.wait(10)
        if anew:
            self.received, self.loaded = {0}, 0

    def receive(self, weights: Weights) -> None:
        if self.late is not None:
            self.late.wait(10)
        if weights.version in self.refuses:
            raise WorkerError("refused")
        if weights.version in self.hangs_at:
            self.hangs_at.remove(weights.version)
            raise WorkerError("no answer", is_lost=True)
        self.received.add(weights.version)

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], Vitals]:
        self.asked.set()
        if self.gate is not None:
            self.gate.wait(10)
        if self.ends:
            raise WorkerError("ended", is_lost=True)
        if self.breaks:
            raise WorkerError("no engine", is_final=True)
        if chunk.version not in self.received:
            self.wrong.append(chunk.version)
        if self.crashes:
            self.crashes -= 1
            raise WorkerError("crashed", is_lost=True)
        self.served.append(chunk.version)
        newer = {version for version in self.received if version > chunk.version}
        self.received = {chunk.version, *(newer - {self.loaded})}
        self.loaded = chunk.version
        engine = FakeEngine()
        engine.version = chunk.version
        return engine.generate(chunk), Vitals(0.5, 1.0, 2.0, 3)

    def sleep(self) -> None:
        if self.crashes:
            self.crashes -= 1
            raise WorkerError("crashed", is_lost=True)
        if self.breaks:
            raise WorkerError("no engine", is_final=True)
        self.naps += 1

    def end(self) -> None:
        self.ends += 1
        for held_up in (self.opens, self.gate, self.late):
            if held_up is not None:
                held_up.set()

    @property
    def replaced(self) -> int:
        return sum(self.starts)


AT_ONCE = Cluster(backoff_s=0)


def pool(
    count: int, keep: int = 2, limits: Cluster = AT_ONCE
) -> tuple[Pool, list[Fragile], list[dict[str, Any]]]:
    workers, events = [Fragile() for _ in range(count)], []

    def note(event: str, **details: Any) -> None:
        events.append({"event": event, **details})

    def another() -> Fragile:
        workers.append(Fragile())
        return workers[-1]

    return Pool(workers.copy(), keep, note, limits=limits, another=another), workers, events


def eventually(is_so: Callable[[], bool]) -> None:
    """For what the pool does beside what it is asked."""
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def uids(rollouts: list[Rollout]) -> list[str]:
    return [rollout.prompt.uid for rollout in rollouts]


def wanted(version: int = 0) -> list[str]:
    return [request.prompt.uid for chunk in work(version) for request in chunk.requests]


def test_a_version_that_a_worker_refused_is_done_by_the_others() -> None:
    made, workers, events = pool(2)
    workers[0].refuses = {1}
    assert made.load(Weights(1, (), again=False))
    rollouts = made.collect(made.submit(work(1)))
    assert uids(rollouts) == wanted(1)
    assert workers[0].served == [] and workers[1].served == [1] * 6
    assert events == [
        {"event": "rollout_worker_failed", "worker": 0, "version": 1, "reason": "refused"}
    ]


def test_what_can_be_had_again_is_given_again_before_the_worker_serves() -> None:
    made, workers, _ = pool(1)
    workers[0].refuses = {1}
    assert not made.load(Weights(1, ()))
    workers[0].refuses = set()
    rollouts = made.collect(made.submit(work(1)))
    assert uids(rollouts) == wanted(1) and workers[0].wrong == []


def test_the_others_do_not_wait_for_a_late_one() -> None:
    workers = [Fragile(), Fragile()]
    made = Pool(workers, keep=3, late_s=0.2)
    late = workers[0].late = threading.Event()
    for version in (1, 2, 3):
        begin = time.monotonic()
        assert made.load(Weights(version, (), again=False))
        assert time.monotonic() - begin < 1, "it is asked once, and then left alone"
        assert uids(made.collect(made.submit(work(version)))) == wanted(version)
    assert workers[0].served == [] and workers[0].received == {0}
    late.set()
    eventually(lambda: workers[0].received == {0, 1})
    assert made.load(Weights(4, (), again=False))
    assert workers[0].received == {0, 1, 4}
    made.close()


def test_one_that_never_receives_is_replaced() -> None:
    """Else all would wait for it with every version."""
    made, workers, events = pool(2)
    workers[0].refuses = {1, 2, 3, 4}
    for version in (1, 2, 3):
        assert workers[0].replaced == 0
        assert made.load(Weights(version, (), again=False))
    eventually(lambda: workers[0].replaced == 1)
    assert [event["event"] for event in events][:3] == [FAILED] * 3
    workers[0].refuses = set()
    eventually(lambda: len(events) == 4)
    assert made.load(Weights(5, (), again=False))
    assert 5 in workers[0].received
    made.close()


def test_failures_in_between_replace_nobody() -> None:
    made, workers, events = pool(2)
    workers[0].refuses = {1, 2, 4, 5}
    for version in range(1, 7):
        assert made.load(Weights(version, (), again=False))
    assert {3, 6} <= workers[0].received and workers[0].replaced == 0
    assert [event["event"] for event in events] == [FAILED] * 4
    made.close()


def test_closing_waits_for_no_worker() -> None:
    """What waits for one would keep the process from ending until the worker's deadline."""
    before = {*threading.enumerate()}
    made, workers, _ = pool(2)
    for worker in workers:
        worker.gate = threading.Event()
    made.submit(work(0))
    assert all(worker.asked.wait(10) for worker in workers)
    begin = time.monotonic()
    made.close()
    assert time.monotonic() - begin < 5
    assert [worker.ends for worker in workers] == [1, 1]
    assert {*threading.enumerate()} <= before


def test_nobody_has_a_version_that_was_sent_once() -> None:
    made, workers, _ = pool(2)
    for worker in workers:
        worker.refuses = {1}
    assert not made.load(Weights(1, (), again=False))
    with pytest.raises(WorkersLost, match="none has version 1"):
        made.collect(made.submit(work(1)))


def test_a_crashed_worker_is_replaced_and_its_chunk_done_again() -> None:
    made, workers, events = pool(1)
    assert made.load(Weights(1, ()))
    workers[0].crashes = 1
    rollouts = made.collect(made.submit(work(1)))
    assert uids(rollouts) == wanted(1)
    assert workers[0].starts == [False, True] and workers[0].wrong == []
    eventually(lambda: len(events) == 2)
    assert [event["event"] for event in events] == [FAILED, RESTARTED]
    assert events[0]["reason"] == "crashed" and events[0]["version"] == 1
    assert events[1]["state"] == "healthy" and 0 <= events[1]["seconds"] < 10


def test_those_that_have_loaded_a_newer_version_are_given_an_older_one_again() -> None:
    made, workers, events = pool(3, keep=3)
    assert made.load(Weights(1, ()))
    gates = [threading.Event() for _ in workers]
    for worker, gate in zip(workers, gates, strict=True):
        worker.gate = gate
    first = made.submit(work(1)[:1])
    eventually(lambda: any(worker.asked.is_set() for worker in workers))
    (late,) = [n for n, worker in enumerate(workers) if worker.asked.is_set()]
    assert made.load(Weights(2, ()))
    for n, gate in enumerate(gates):
        if n != late:
            gate.set()
    assert uids(made.collect(made.submit(work(2)))) == wanted(2)
    workers[late].crashes = 1
    gates[late].set()
    made.collect(first)
    assert uids(made.collect(made.submit(work(2)))) == wanted(2)
    assert [worker.wrong for worker in workers] == [[], [], []]
    assert [event["event"] for event in events].count(FAILED) == 1


def test_a_chunk_that_always_fails_ends_it() -> None:
    made, workers, _ = pool(2)
    assert made.load(Weights(1, ()))
    for worker in workers:
        worker.crashes = 100
    with pytest.raises(RunError, match="failed 3 times: crashed"):
        made.collect(made.submit(work(1)[:1]))


def test_versions_are_kept_apart_while_older_chunks_wait() -> None:
    made, workers, _ = pool(2)
    gate = threading.Event()
    for worker in workers:
        worker.gate = gate
    assert made.load(Weights(1, ()))
    first = made.submit(work(1))
    assert made.load(Weights(2, ()))
    second = made.submit(work(2))
    gate.set()
    assert {r.version for r in made.collect(second)} == {2}
    assert {r.version for r in made.collect(first)} == {1}
    assert not made._waiting, "what has been done leaves nothing behind"
    told = made.vitals()
    assert sum(each.busy_s for each in told.values()) == 6.0 and told.keys() == {0, 1}
    assert all(each.memory == 3 and each.cpu_s == 4 * each.busy_s for each in told.values())
    assert made.vitals() == {0: Vitals(), 1: Vitals()}, "once"
    assert all(worker.wrong == [] for worker in workers)


def test_closing_replaces_nobody() -> None:
    made, workers, _ = pool(1)
    gate = threading.Event()
    workers[0].gate, workers[0].crashes = gate, 1
    ticket = made.submit(work(0)[:1])
    made.close()
    gate.set()
    with pytest.raises(RunError):
        made.collect(ticket)
    assert workers[0].replaced == 0


def test_a_worker_that_cannot_start_is_left_out() -> None:
    own, workers, events = pool(2)
    workers[0].breaks = True
    for version in range(2):  # the later one could still be given to it
        assert own.load(Weights(version, ()))
        workers[1].gate = threading.Event()
        ticket = own.submit(work(version))
        threading.Timer(0.1, workers[1].gate.set).start()  # until then the other alone is free
        assert len(own.collect(ticket)) == 6
    assert [e["event"] for e in events if e["worker"] == 0] == [FAILED, LEFT_OUT], "asked once"
    workers[1].breaks = True
    with pytest.raises(RunError, match="none is left; the last one: no engine"):
        own.collect(own.submit(work(1)))
    with pytest.raises(RunError, match="none is left"):
        own.load(Weights(2, ()))
    own.close()


def test_a_worker_whose_engine_fails_its_proof_serves_nothing_and_the_run_says_so() -> None:
    workers, events = [Fragile(), Fragile()], []
    workers[0].is_unfit = True

    def note(event: str, **details: Any) -> None:
        events.append((event, details["worker"], details["reason"]))

    own = Pool(workers, 2, note, limits=AT_ONCE)
    assert own.load(Weights(1, ()))
    assert len(own.collect(own.submit(work(1)))) == 6
    eventually(lambda: len(events) == 2)
    own.close()
    why = "the engine does not load new weights right"
    assert events == [(FAILED, 0, why), (LEFT_OUT, 0, why)]
    assert not workers[0].served and workers[0].starts == [False], "nor is it tried again"


def test_workers_that_take_turns_sleep_when_nothing_is_left_to_do() -> None:
    workers = [Fragile(), Fragile()]
    own = Pool(workers, 2, takes_turns=True, limits=AT_ONCE)
    first, second = own.submit(work(0)[:1]), own.submit(work(0)[1:])
    own.collect(first)
    assert [w.naps for w in workers] == [0, 0], "there is still something to generate"
    own.collect(second)
    assert [w.naps for w in workers] == [1, 1]
    workers[0].crashes = 1
    own.sleep()
    assert [w.naps for w in workers] == [2, 2], "the one in its place sleeps too"
    workers[0].breaks = True
    own.sleep()
    assert len(own.collect(own.submit(work(0)))) == 6, "the other does it"
    workers[1].breaks = True
    with pytest.raises(RunError, match="no engine"):
        own.sleep()
    own.close()


def test_the_others_go_on_while_a_new_worker_starts() -> None:
    own, workers, events = pool(2)
    assert own.load(Weights(1, ()))
    workers[0].crashes = 1
    workers[0].opens.clear()
    assert uids(own.collect(own.submit(work(1)))) == wanted(1)
    assert own.load(Weights(2, ())) and 2 not in workers[0].received, "it is not there yet"
    assert uids(own.collect(own.submit(work(2)))) == wanted(2)
    workers[0].opens.set()
    eventually(lambda: events[-1]["event"] == RESTARTED)
    assert 2 in workers[0].received, "it has been given the newest before anybody asks"
    workers[1].gate = threading.Event()
    ticket = own.submit(work(2))
    eventually(lambda: len(workers[0].served) >= 5)
    workers[1].gate.set()
    own.collect(ticket)
    assert all(worker.wrong == [] for worker in workers)
    own.close()


def test_a_version_waits_for_the_only_worker_to_be_back() -> None:
    own, workers, _ = pool(1)
    assert own.load(Weights(1, (), again=False))
    workers[0].crashes = 1
    with pytest.raises(WorkersLost, match="none has version 1 any more"):
        own.collect(own.submit(work(1)[:1]))
    workers[0].refuses = {2}
    assert not own.load(Weights(2, (), again=False)), "it is there, and can be sent it once more"
    workers[0].refuses = set()
    assert own.load(Weights(2, (), again=False))
    own.collect(own.submit(work(2)))
    assert workers[0].wrong == []
    own.close()


def test_a_version_that_nobody_can_be_given_is_for_new_workers() -> None:
    own, workers, _ = pool(2)
    assert own.load(Weights(1, ()))
    for worker in workers:
        worker.crashes, worker.refuses = 1, {1}
    with pytest.raises(WorkersLost, match="none could be given version 1: refused"):
        own.collect(own.submit(work(1)[:2]))
    own.close()


def test_a_worker_whose_restarts_are_used_up_is_left_out() -> None:
    own, workers, events = pool(2, limits=Cluster(backoff_s=0, restarts=1))
    assert own.load(Weights(1, ()))
    workers[0].crashes, workers[1].gate = 100, threading.Event()
    ticket = own.submit(work(1)[:2])
    eventually(lambda: bool(events) and events[-1]["event"] == LEFT_OUT)
    workers[1].gate.set()
    assert uids(own.collect(ticket)) == wanted(1)[:2], "the other does it"
    assert [e["event"] for e in events] == [FAILED, RESTARTED, FAILED, LEFT_OUT]
    assert own.load(Weights(2, ())) and 2 not in workers[0].received
    workers[1].crashes = 100
    with pytest.raises(RunError, match="none is left; the last one: crashed"):
        own.collect(own.submit(work(2)[:1]))
    own.close()


def test_a_new_worker_serves_the_version_on_disk_where_none_was_loaded() -> None:
    own, workers, _ = pool(1)
    workers[0].crashes = 1
    assert uids(own.collect(own.submit(work(0)))) == wanted(0)
    assert workers[0].replaced == 1
    own.close()


def test_what_nobody_expects_while_a_worker_starts_is_raised_where_somebody_waits() -> None:
    own, workers, _ = pool(1)
    workers[0].crashes = 1

    def full(event: str, **details: Any) -> None:
        if event == RESTARTED:
            raise OSError("no space left on device")

    own._members._note = full
    ticket = own.submit(work(0)[:1])
    with pytest.raises(OSError, match="no space left"):
        own.collect(ticket)
        own.sleep()
        own._members.wait(lambda: False)
    own.close()


def test_late_news_of_a_process_that_is_gone_change_nothing() -> None:
    own, workers, events = pool(1)
    assert own.load(Weights(0, ()))
    workers[0].gate, workers[0].hangs_at = threading.Event(), {1}
    ticket = own.submit(work(0)[:1])
    assert workers[0].asked.wait(10)
    assert own.load(Weights(1, ())), "the new one has been given it"
    eventually(lambda: events[-1]["event"] == RESTARTED)
    workers[0].crashes = 1  # what the old one was asked fails too
    workers[0].gate.set()
    assert len(own.collect(ticket)) == 1
    assert [e["event"] for e in events] == [FAILED, RESTARTED]
    assert workers[0].starts == [False, True] and workers[0].wrong == []
    own.close()


def test_more_workers_are_given_the_newest_version_and_share_the_work() -> None:
    made, workers, events = pool(1)
    assert made.load(Weights(1, ()))
    made.resize(3)
    assert len(workers) == 3
    eventually(lambda: all(1 in worker.received for worker in workers))
    gates = threading.Barrier(3, timeout=10)  # passed only by three at once
    for worker in workers:
        worker.gate = gates  # type: ignore[assignment]
    made.collect(made.submit(work(1)[:3]))
    assert all(worker.served == [1] for worker in workers)
    assert [e["worker"] for e in events if e["event"] == "rollout_worker_added"] == [1, 2]
    made.resize(3)
    assert len(workers) == 3


@pytest.mark.parametrize("restarts", [0, 1])
def test_nobody_comes_for_one_that_is_left_out_until_another_number_is_asked_for(
    restarts: int,
) -> None:
    """Else the budget of restarts would end nothing."""
    made, workers, events = pool(2, limits=Cluster(backoff_s=0, restarts=restarts))
    assert made.load(Weights(1, ()))
    made.resize(2)
    workers[0].breaks, workers[0].crashes = restarts == 0, 100
    workers[1].gate = threading.Event()  # else it may do all there is before the first comes back
    ticket = made.submit(work(1)[:2])
    eventually(lambda: LEFT_OUT in [e["event"] for e in events])
    workers[1].gate.set()
    made.collect(ticket)
    assert workers[0].ends == 1, "its place is free"
    made.resize(2)
    assert len(workers) == 2
    made.resize(3)
    assert len(workers) == 4
    made.close()


def test_a_worker_leaves_when_it_is_done_and_gets_nothing_more() -> None:
    made, workers, events = pool(3)
    assert made.load(Weights(1, ()))
    gate = threading.Event()
    for worker in workers:
        worker.gate = gate
    ticket = made.submit(work(1))
    eventually(lambda: all(worker.asked.is_set() for worker in workers))
    made.resize(1)
    assert [worker.ends for worker in workers] == [0, 0, 0]
    gate.set()
    assert len(made.collect(ticket)) == len(PROMPTS)
    eventually(lambda: [worker.ends for worker in workers] == [0, 1, 1])
    assert [len(worker.served) for worker in workers[1:]] == [1, 1]
    assert made.load(Weights(2, ()))
    assert {r.version for r in made.collect(made.submit(work(2)))} == {2}
    assert 2 not in workers[1].received | workers[2].received
    assert sorted(e["worker"] for e in events if e["event"] == "rollout_worker_removed") == [1, 2]
    made.resize(2)
    eventually(lambda: len(workers) == 4 and 2 in workers[3].received)


def test_one_that_waits_for_a_place_is_the_first_to_leave() -> None:
    made, workers, _ = pool(1)
    made.load(Weights(1, ()))
    held = threading.Event()

    def another() -> Fragile:
        workers.append(Fragile())
        workers[-1].opens = held
        return workers[-1]

    made._another = another
    made.resize(2)
    eventually(lambda: workers[1].starts == [False])
    made.resize(1)
    eventually(lambda: workers[1].ends == 1)
    assert workers[0].ends == 0
    assert len(made.collect(made.submit(work(1)))) == len(PROMPTS)
    assert workers[1].served == []


def test_one_that_is_lost_does_not_come_back_once_it_shall_leave() -> None:
    made, workers, _ = pool(2, limits=Cluster(backoff_s=0.2))
    made.load(Weights(1, ()))
    workers[0].crashes = workers[1].crashes = 1
    made.collect(made.submit(work(1)[:2]))  # by then both were lost, and one is back
    made.resize(1)
    eventually(lambda: workers[0].ends + workers[1].ends == 1)
    time.sleep(0.3)
    assert len(made._members.left()) == 1


def test_older_versions_come_first_when_workers_come_and_go() -> None:
    """An engine that has loaded a newer version cannot go back."""
    made, workers, _ = pool(1)
    assert made.load(Weights(1, ()))
    gate = threading.Event()
    workers[0].gate = gate
    first = made.submit(work(1))
    made.resize(2)
    made.resize(1)
    assert made.load(Weights(2, ()))
    second = made.submit(work(2))
    gate.set()
    made.collect(first), made.collect(second)
    for worker in workers:
        assert worker.served == sorted(worker.served)


def test_older_versions_come_first_when_a_worker_is_lost() -> None:
    made, workers, _ = pool(2, limits=Cluster(restarts=0))
    assert made.load(Weights(1, ()))
    workers[1].crashes = 1
    made.collect(made.submit(work(1)[:2]))
    assert made.load(Weights(2, ()))
    gate = threading.Event()
    workers[0].gate = gate
    workers[0].served.clear()
    tickets = [made.submit(work(v)) for v in (1, 2)]
    gate.set()
    for ticket in tickets:
        made.collect(ticket)
    assert workers[0].served == sorted(workers[0].served)
