"""Workers as Ray actors: a group of learners, a pool of rollout workers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ppo_dist.cluster.session import Places
from ppo_dist.config import Config
from ppo_dist.learner.worker import LearnerWorker, Seat
from ppo_dist.protocols import WeightReceiver, WeightSender
from ppo_dist.rollout.worker import RolloutWorker
from ppo_dist.types import Chunk, Rollout, Weights

R = TypeVar("R")


class LearnerActor(LearnerWorker):
    """A LearnerWorker that is first asked where it stands, and then started: rank 0's address is
    needed by all.
    """

    def __init__(self) -> None:
        """Does nothing yet; `start` does what LearnerWorker's constructor does."""

    def meeting_point(self) -> tuple[str, int]:
        """This node's address and a port that is free there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
        return ray.util.get_node_ip_address(), port

    def start(
        self, config: Config, model_path: str, sender: WeightSender, seat: Seat, resume: Path | None
    ) -> None:
        """Loads the models and joins the others."""
        LearnerWorker.__init__(self, config, model_path, sender, seat, resume)


class RayRanks:
    """Learner workers as Ray actors; see learner.group.Ranks."""

    def __init__(
        self,
        config: Config,
        model_path: str,
        sender: WeightSender,
        places: Places,
        resume: Path | None,
    ) -> None:
        self.world = places.count
        actor = ray.remote(LearnerActor)
        self._actors = [actor.options(**_place(places, r)).remote() for r in range(self.world)]
        address, port = ray.get(self._actors[0].meeting_point.remote())
        seats = [Seat(r, self.world, address, port, places.device) for r in range(self.world)]
        self._started = [
            worker.start.remote(config, model_path, sender, seat, resume)
            for worker, seat in zip(self._actors, seats, strict=True)
        ]

    def call(self, method: Callable[..., R], args: Sequence[tuple[Any, ...]]) -> list[R]:
        """See Ranks."""
        ray.get(
            self._started
        )  # a worker that could not start says so here, and not in what it is asked next
        answers = [
            _bound(a, method).remote(*rest) for a, rest in zip(self._actors, args, strict=True)
        ]
        return list(ray.get(answers))


class RayPool:
    """Rollout workers as Ray actors; see RolloutPool. A free worker takes the next chunk."""

    def __init__(
        self, config: Config, model_path: str, receiver: WeightReceiver, places: Places
    ) -> None:
        actor = ray.remote(RolloutWorker)
        self._workers = [
            actor.options(**_place(places, i)).remote(config, model_path, receiver, places.device)
            for i in range(places.count)
        ]
        self._waiting: list[tuple[int, Chunk]] = []
        self._running: dict[ray.ObjectRef, tuple[int, Any]] = {}
        self._idle = list(self._workers)
        self._submitted = 0

    def submit(self, chunks: Sequence[Chunk]) -> None:
        """See RolloutPool."""
        self._waiting += enumerate(chunks, start=self._submitted)
        self._submitted += len(chunks)
        self._dispatch()

    def collect(self) -> list[Rollout]:
        """See RolloutPool."""
        done: dict[int, list[Rollout]] = {}
        while self._running:
            finished, _ = ray.wait(list(self._running), num_returns=1)
            for reference in finished:
                number, worker = self._running.pop(reference)
                done[number] = ray.get(reference)
                self._idle.append(worker)
            self._dispatch()
        self._submitted = 0
        return [rollout for number in sorted(done) for rollout in done[number]]

    def load(self, weights: Weights) -> None:
        """See RolloutPool. An actor does what it is told in order, so what is submitted later finds
        the new weights.
        """
        ray.get([worker.load.remote(weights) for worker in self._workers])

    def _dispatch(self) -> None:
        while self._waiting and self._idle:
            number, chunk = self._waiting.pop(0)
            worker = self._idle.pop(0)
            self._running[worker.generate.remote(chunk)] = (number, worker)


def _place(places: Places, bundle: int) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(places.group, placement_group_bundle_index=bundle)
    return {
        "num_cpus": places.cpus,
        "num_gpus": int(places.device == "cuda"),
        "scheduling_strategy": strategy,
    }


def _bound(actor: Any, method: Callable[..., Any]) -> Any:
    return getattr(actor, method.__name__)
