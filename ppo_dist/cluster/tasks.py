"""Independent pieces of work as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray

T = TypeVar("T")
R = TypeVar("R")


def completed(work: Callable[[T], R], items: Sequence[T], cpus: float) -> Iterator[tuple[T, R]]:
    """(item, work(item)) of all items as they are done, as many at a time as the cluster has room
    for.
    """
    task = ray.remote(num_cpus=cpus)(work)
    waiting = {task.remote(item): item for item in items}
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        yield waiting.pop(done), ray.get(done)
