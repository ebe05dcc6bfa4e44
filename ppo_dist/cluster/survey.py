"""The same question to every node of a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ppo_dist.cluster.actors import reason


@dataclass(frozen=True)
class Host:
    """A node that is alive.

    Example: Host(id="4fe…", address="10.0.0.5", gpus=8)
    """

    id: str
    address: str
    gpus: int


@dataclass(frozen=True)
class Answer:
    """What came from a node, or why nothing did; and when, by this machine's clock, it was asked
    and had answered.

    Example: Answer(host=Host(…), value={…}, problem=None, asked=1764.2, answered=1764.3)
    """

    host: Host
    value: Any
    problem: str | None
    asked: float
    answered: float


def hosts() -> list[Host]:
    """Of the cluster that is connected."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Host(n["NodeID"], n["NodeManagerAddress"], int(n["Resources"].get("GPU", 0))) for n in alive
    ]


def free_gpus() -> int:
    """GPUs of the cluster that nobody has."""
    return int(ray.available_resources().get("GPU", 0))


def ask(
    question: Callable[..., Any],
    those: Sequence[Host],
    arguments: Sequence[tuple[Any, ...]],
    deadline_s: float,
    with_gpu: bool = False,
) -> list[Answer]:
    """`question(*arguments)` at each of those nodes, all at once; with a GPU if asked for."""
    asked = time.time()
    answers = []
    for host, own in zip(those, arguments, strict=True):
        strategy = NodeAffinitySchedulingStrategy(host.id, soft=False)
        gpus = int(with_gpu and host.gpus > 0)
        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=strategy)(
            question
        )
        answers.append(task.remote(*own))
    end, found = time.monotonic() + deadline_s, []
    for host, answer in zip(those, answers, strict=True):
        value, problem = None, None
        try:
            value = ray.get(answer, timeout=max(end - time.monotonic(), 0.1))
        except RayError as error:
            problem = reason(error)
        found.append(Answer(host, value, problem, asked, time.time()))
    return found
