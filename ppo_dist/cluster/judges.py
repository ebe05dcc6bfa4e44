"""Reward models as Ray actors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ppo_dist.cluster.actors import reason
from ppo_dist.cluster.groups import place
from ppo_dist.cluster.session import Places
from ppo_dist.config import InputError, RunError
from ppo_dist.config.reward import ModelReward
from ppo_dist.config.workers import Cluster
from ppo_dist.learner.worker import cannot_compile
from ppo_dist.rewards.model import Exchange, Judgement, RewardModel, Traces
from ppo_dist.rollout.health import Restarts


class Judges:
    """The workers of one reward model. They load it while others start. One that is lost is started
    anew, as often as `limits` allow, and asked again.
    """

    def __init__(
        self,
        section: ModelReward,
        policy_path: str,
        places: Places,
        limits: Cluster,
        note: Callable[..., None],
        traces: Sequence[Traces],
    ) -> None:
        """`note` hears of failures; `traces` are the workers'.

        Raises:
            InputError: torch cannot compile where one is to be, and should.
        """
        self._section, self._policy_path, self._places = section, policy_path, places
        if section.compile:
            self._check_compiler()
        self._note, self._traces = note, traces
        self._restarts = [Restarts(limits) for _ in places.slots]
        self._actors = [self._new(number) for number in range(len(places.slots))]

    def __call__(self, shares: list[list[list[Exchange]]]) -> list[Judgement]:
        """What each worker says of its exchanges.

        Raises:
            RunError: a worker was lost too often.
        """
        answers = [a.judge.remote(share) for a, share in zip(self._actors, shares, strict=True)]
        return [
            self._answer(n, *asked) for n, asked in enumerate(zip(answers, shares, strict=True))
        ]

    def _check_compiler(self) -> None:
        tried = ray.remote(cannot_compile)
        asked = [place(self._places, slot) for slot in self._places.slots]
        answers = [tried.options(**options).remote(self._places.device) for options in asked]
        for number, said in enumerate(ray.get(answers, timeout=self._section.deadline_s)):
            if said is not None:
                path = self._section.path
                raise InputError(f"compile of the reward model {path}, worker {number}: {said}")

    def _new(self, number: int) -> Any:
        options = place(self._places, self._places.slots[number])
        device = self._places.device
        return (
            ray.remote(RewardModel)
            .options(**options)
            .remote(self._section, self._policy_path, device, self._traces[number])
        )

    def _answer(self, number: int, answer: ray.ObjectRef, share: list[list[Exchange]]) -> Judgement:
        lost_at = None
        while True:
            try:
                found: Judgement = ray.get(answer, timeout=self._section.deadline_s)
            except RayError as error:
                lost_at = lost_at or time.monotonic()
                self._replace(number, error)
                answer = self._actors[number].judge.remote(share)
                continue
            if lost_at is not None:
                seconds = round(time.monotonic() - lost_at, 3)
                self._tell("restarted", number, seconds=seconds)
            return found

    def _replace(self, number: int, error: RayError) -> None:
        self._tell("failed", number, reason=reason(error))
        pause = self._restarts[number].pause(time.monotonic())
        if pause is None:
            path = self._section.path
            raise RunError(f"the reward model {path} failed: {reason(error)}") from error
        time.sleep(pause)
        with contextlib.suppress(RayActorError):
            ray.kill(self._actors[number])
        self._actors[number] = self._new(number)

    def _tell(self, what: str, number: int, **details: Any) -> None:
        self._note(f"reward_worker_{what}", model=self._section.path, worker=number, **details)
