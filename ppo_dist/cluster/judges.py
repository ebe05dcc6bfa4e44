"""Reward models as Ray actors."""

from __future__ import annotations

import ray
from ray.exceptions import RayActorError, RayTaskError

from ppo_dist.cluster.groups import place
from ppo_dist.cluster.session import Places
from ppo_dist.config import RunError
from ppo_dist.config.reward import ModelReward
from ppo_dist.rewards.model import Exchange, RewardModel


class Judges:
    """The workers of one reward model. They load it while others start."""

    def __init__(self, section: ModelReward, policy_path: str, places: Places) -> None:
        actor = ray.remote(RewardModel)
        self._path = section.path
        self._actors = [
            actor.options(**place(places, slot)).remote(section, policy_path, places.device)
            for slot in places.slots
        ]

    def __call__(self, shares: list[list[list[Exchange]]]) -> list[list[list[float]]]:
        """The numbers of exchanges by worker and batch.

        Raises:
            RunError: a worker is dead or failed.
        """
        pairs = zip(self._actors, shares, strict=True)
        try:
            found: list[list[list[float]]] = ray.get([a.judge.remote(share) for a, share in pairs])
        except (RayActorError, RayTaskError) as error:
            reason = str(getattr(error, "cause", None) or error).splitlines()[-1]
            raise RunError(f"the reward model {self._path} failed: {reason}") from error
        return found
