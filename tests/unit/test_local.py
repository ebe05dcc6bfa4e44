"""Where a local run computes."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from ppo_dist.build.local import InTurn, Later, LocalWorker
from ppo_dist.rollout.pool import Pool
from ppo_dist.transport.memory import MemorySender
from ppo_dist.types import Chunk, Rollout, Sampling
from tests.fakes import FakeEngine


class Watched(FakeEngine):
    """Notes who asks, with how many threads, for which version."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int]] = []

    def generate(self, chunk: Chunk) -> list[Rollout]:
        name = threading.current_thread().name
        self.seen.append((name, torch.get_num_threads(), chunk.version))
        return super().generate(chunk)


def of(version: int) -> Chunk:
    return Chunk(version, 0, version, (), Sampling(1.0, 4, 0, "train"))


def test_rollouts_are_written_in_the_main_thread_with_the_versions_asked_for() -> None:
    """When they are collected, whatever was published since."""
    engine, sender, before = Watched(), MemorySender(), torch.get_num_threads()
    worker = LocalWorker(engine, keep=3, run=InTurn("cpu", 1))
    try:
        with contextlib.closing(Pool([worker], 3, generators=lambda _: Later())) as pool:
            tickets = []
            for version in (0, 1, 2):
                pool.load(sender.publish(version, [("a", torch.ones(2) * version)]))
                tickets.append(pool.submit([of(version)]))
            torch.set_num_threads(2)
            for ticket in reversed(tickets):  # as an evaluation is collected before later steps
                pool.collect(ticket)
    finally:
        torch.set_num_threads(before)
    assert engine.seen == [("MainThread", 1, version) for version in (0, 1, 2)]


def test_what_is_asked_for_is_done_once_and_late_and_in_order() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        if number == 2:
            raise ValueError("two")
        return number

    later = Later()
    one, two, three = (later.submit(work, number) for number in (1, 2, 3))
    assert done == []
    assert [three.result(), one.result()] == [3, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="two"):
            two.result()
    assert done == [1, 2, 3]
