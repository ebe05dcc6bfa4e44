"""What a rollout worker keeps of the versions that it receives."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from ppo_dist.data.chunks import chunks
from ppo_dist.rollout.worker import RolloutWorker
from ppo_dist.types import Sampling, Weights
from tests.fakes import FakeEngine
from tests.unit.test_pool import PROMPTS


class Instant:
    """A receiver to which all has come."""

    def receive(self, weights: Weights, deadline_s: float) -> None:
        pass

    def fetch(self, weights: Weights) -> list[object]:
        return []


def worker(keep: int) -> RolloutWorker:
    made = RolloutWorker(Instant(), FakeEngine, keep)  # type: ignore[arg-type]
    made.start()
    return made


def test_versions_that_nobody_asks_for_do_not_stay() -> None:
    made = worker(keep=3)
    for version in range(1, 6):
        made.receive(Weights(version, ()))
    assert set(made._received) == {3, 4, 5}
    (chunk, *_) = chunks(PROMPTS, 1, 1, 0, 4, Sampling(1.0, 8, 0, "train"))
    assert {rollout.version for rollout in made.generate(chunk)} == {4}
    assert set(made._received) == {5}


class Slow(dict[int, Weights]):
    """Another thread has its turn between any two keys."""

    def __iter__(self) -> Iterator[int]:
        for key in super().__iter__():
            time.sleep(0.001)
            yield key


def test_versions_come_while_others_are_loaded() -> None:
    made, over = worker(keep=2), threading.Event()
    made._received = Slow()
    problems: list[Exception] = []

    def load() -> None:
        while not over.is_set():
            try:
                made._load(0)
            except RuntimeError as error:
                problems.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    for version in range(1, 100):
        made.receive(Weights(version, ()))
    over.set()
    thread.join()
    assert problems == [] and set(made._received) == {98, 99}
