"""Rollout workers as Ray actors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from ppo_dist import device
from ppo_dist.cluster import network
from ppo_dist.cluster.actors import reason
from ppo_dist.cluster.groups import place
from ppo_dist.cluster.layout import Slot
from ppo_dist.cluster.session import Places
from ppo_dist.config import Config
from ppo_dist.protocols import RolloutEngine, WeightReceiver, WeightsError
from ppo_dist.reports import Vitals
from ppo_dist.rollout.members import WorkerError
from ppo_dist.rollout.worker import RolloutWorker
from ppo_dist.types import Chunk, Rollout, Weights

MakeEngine = Callable[[], RolloutEngine]
MakeReceiver = Callable[[], WeightReceiver]
Ask = Callable[[], ray.ObjectRef]  # it may fail by itself, where Ray's store is full


class RolloutActor(RolloutWorker):
    """A RolloutWorker that opens its end of the transport by itself."""

    def __init__(self, make_receiver: MakeReceiver, make_engine: MakeEngine, keep: int) -> None:
        network.use_own_interface()
        super().__init__(make_receiver(), make_engine, keep)

    def probe(self, weights: Weights, deadline_s: float) -> None:
        """Takes weights from end to end without a model."""
        self._receiver.receive(weights, deadline_s)
        for _ in self._receiver.fetch(weights):
            pass


@dataclass(frozen=True)
class Crew:
    """What all rollout workers have in common. `lent` says which GPUs those in a bundle borrow, if
    they do. Where the run begins with them, `is_first`, an engine that does not start never will.
    `added` are places beyond those that were reserved together.
    """

    config: Config
    places: Places
    make_engine: MakeEngine
    make_receiver: MakeReceiver
    lent: Callable[[int], str] | None = None
    is_first: bool = True
    added: list[Places] = field(default_factory=list)

    def another(self) -> RemoteWorker:
        """One more worker, as soon as a node has room for it."""
        places = self.places.another()
        self.added.append(places)
        return RemoteWorker(self, places.slots[0], places)

    def close(self) -> None:
        """Gives the places of those that were added back."""
        for places in self.added:
            places.give_back(places.slots[0])


class RemoteWorker:
    """See rollout.members.Worker: one that is a Ray actor."""

    def __init__(self, crew: Crew, slot: Slot, places: Places | None = None) -> None:
        """The actor is made at once; `start` has it load its model. `places` are those that the
        slot is in, if it is none of the crew's.
        """
        self.crew, self._slot, self._config = crew, slot, crew.config
        self._places = places or crew.places
        self._lent = crew.lent(slot.bundle) if crew.lent else None
        self._actor = self._new()

    def _new(self) -> Any:
        actor = ray.remote(concurrency_groups={"weights": 1})(RolloutActor)
        options = place(self._places, self._slot)
        if self._lent is not None:  # before the process begins: torch looks once
            options["runtime_env"] = {"env_vars": device.seeing(self._lent)}
        crew, keep = self.crew, self._config.stream.kept_versions
        return actor.options(**options).remote(crew.make_receiver, crew.make_engine, keep)

    def wait(self) -> None:
        """Waits until the actor is there. Raises WorkerError."""
        self._tried(
            lambda: self._actor.__ray_ready__.remote(), self._config.cluster.start_deadline_s
        )

    def probe(self, weights: Weights) -> None:
        """Takes weights from end to end without a model. Raises WorkerError."""
        limits = self._config.transport
        self._tried(lambda: self._actor.probe.remote(weights, limits.half_s), limits.deadline_s)

    def start(self, anew: bool = False) -> None:
        """See Worker."""
        if anew:
            with contextlib.suppress(RayActorError):
                ray.kill(self._actor)
            self._actor = self._new()
        try:
            ray.get(self._actor.start.remote(), timeout=self._config.cluster.start_deadline_s)
        except RayError as error:
            # of a later one: what those before it held may not be free yet
            is_first = self.crew.is_first and not anew
            is_final = isinstance(error, RayTaskError) and is_first
            text = f"its engine does not start: {reason(error)}"
            raise WorkerError(text, is_lost=True, is_final=is_final) from error

    def receive(self, weights: Weights) -> None:
        """See Worker."""
        limits = self._config.transport
        receive = self._actor.receive.options(concurrency_group="weights")
        # the actor itself gives up after half of the deadline; if it does not say so, it hangs
        self._call(lambda: receive.remote(weights, limits.half_s), limits.deadline_s)

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], Vitals]:
        """See Worker."""
        deadline_s = self._config.rollout.deadline_s
        answer: tuple[list[Rollout], Vitals] = self._call(
            lambda: self._actor.timed.remote(chunk), deadline_s
        )
        return answer

    def sleep(self) -> None:
        """See Worker."""
        self._call(lambda: self._actor.sleep.remote(), self._config.rollout.deadline_s)

    def end(self) -> None:
        """See Worker."""
        with contextlib.suppress(RayActorError):
            ray.kill(self._actor)
        if self._lent is None:  # else the learners are there too
            self._places.give_back(self._slot)

    def _tried(self, ask: Ask, deadline_s: float) -> None:
        """One that says what is wrong is not lost: another in its place would say so too."""
        try:
            self._call(ask, deadline_s)
        except WorkerError as error:
            why = error.__cause__
            has_told = isinstance(why, RayTaskError) or (
                isinstance(why, RayActorError) and why.actor_init_failed
            )
            raise WorkerError(str(error), error.is_lost and not has_told) from why

    def _call(self, ask: Ask, deadline_s: float) -> Any:
        try:
            answer = ask()
        except RayError as error:
            raise WorkerError(f"it could not be asked: {reason(error)}") from error
        try:
            return ray.get(answer, timeout=deadline_s)
        except WeightsError as error:
            raise WorkerError(str(getattr(error, "cause", error))) from None
        except RayError as error:  # if it lives, its engine may be dead or half loaded
            raise WorkerError(reason(error), is_lost=True) from error
