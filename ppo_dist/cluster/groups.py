"""Learner workers as Ray actors."""

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
from ppo_dist.protocols import WeightSender

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
        self._actors = [actor.options(**place(places, r)).remote() for r in range(self.world)]
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


def place(places: Places, bundle: int) -> dict[str, Any]:
    """The actor options of a worker in one of the reserved places."""
    strategy = PlacementGroupSchedulingStrategy(places.group, placement_group_bundle_index=bundle)
    return {
        "num_cpus": places.cpus,
        "num_gpus": int(places.device == "cuda"),
        "scheduling_strategy": strategy,
    }


def _bound(actor: Any, method: Callable[..., Any]) -> Any:
    return getattr(actor, method.__name__)
