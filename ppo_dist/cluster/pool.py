"""Rollout workers as Ray actors."""

from __future__ import annotations

import ray

from ppo_dist.cluster.groups import place
from ppo_dist.cluster.session import Places
from ppo_dist.config import Config
from ppo_dist.protocols import WeightReceiver
from ppo_dist.rollout.worker import RolloutWorker
from ppo_dist.types import Chunk, Rollout, Weights


class RemoteWorker:
    """See rollout.pool.Worker: one that is a Ray actor."""

    def __init__(
        self, config: Config, model_path: str, receiver: WeightReceiver, places: Places, bundle: int
    ) -> None:
        actor = ray.remote(concurrency_groups={"weights": 1})(RolloutWorker)
        self._actor = actor.options(**place(places, bundle)).remote(
            config, model_path, receiver, places.device
        )

    def receive(self, weights: Weights) -> None:
        """See Worker."""
        call = self._actor.receive.options(concurrency_group="weights")
        ray.get(call.remote(weights))

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], float]:
        """See Worker."""
        answer: tuple[list[Rollout], float] = ray.get(self._actor.timed.remote(chunk))
        return answer
