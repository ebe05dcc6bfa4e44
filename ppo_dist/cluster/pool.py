"""Rollout workers as Ray actors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ppo_dist import device
from ppo_dist.cluster import network
from ppo_dist.cluster.groups import place
from ppo_dist.cluster.layout import Slot
from ppo_dist.cluster.session import Places
from ppo_dist.protocols import RolloutEngine, WeightReceiver, WeightsError
from ppo_dist.rollout.pool import WorkerError
from ppo_dist.rollout.worker import RolloutWorker
from ppo_dist.types import Chunk, Rollout, Weights

MakeEngine = Callable[[], RolloutEngine]
MakeReceiver = Callable[[], WeightReceiver]


class RolloutActor(RolloutWorker):
    """A RolloutWorker that opens its end of the transport by itself."""

    def __init__(self, make_receiver: MakeReceiver) -> None:
        network.use_own_interface()
        super().__init__(make_receiver())

    def probe(self, weights: Weights, deadline_s: float) -> None:
        """Takes weights from end to end without a model."""
        self._receiver.receive(weights, deadline_s)
        for _ in self._receiver.fetch(weights):
            pass


@dataclass(frozen=True)
class Crew:
    """What all rollout workers have in common. `lent` says which GPUs those in a bundle borrow, if
    they do.
    """

    places: Places
    make_engine: MakeEngine
    make_receiver: MakeReceiver
    deadline_s: float
    lent: Callable[[int], str] | None = None


class RemoteWorker:
    """See rollout.pool.Worker: one that is a Ray actor."""

    def __init__(self, crew: Crew, slot: Slot) -> None:
        """The actor is there, without its model, when `start` is called."""
        self._crew, self._slot = crew, slot
        self._lent = crew.lent(slot.bundle) if crew.lent else None
        self._actor, self._is_replacement = self._new(), False

    def _new(self) -> Any:
        actor = ray.remote(concurrency_groups={"weights": 1})(RolloutActor)
        options = place(self._crew.places, self._slot)
        if self._lent is not None:  # before the process begins: torch looks once
            options["runtime_env"] = {"env_vars": device.seeing(self._lent)}
        return actor.options(**options).remote(self._crew.make_receiver)

    def start(self) -> None:
        """Has the model loaded; does not wait for it."""
        self._started = self._actor.start.remote(self._crew.make_engine)

    def wait(self) -> None:
        """Waits until the actor is there."""
        ray.get(self._actor.__ray_ready__.remote())

    def probe(self, weights: Weights) -> None:
        """Takes weights from end to end without a model. Raises WorkerError."""
        deadline_s = self._crew.deadline_s
        self._call(self._actor, self._actor.probe.remote(weights, deadline_s), 2 * deadline_s)

    def receive(self, weights: Weights) -> None:
        """See Worker."""
        actor, deadline_s = self._actor, self._crew.deadline_s
        receive = actor.receive.options(concurrency_group="weights")
        # the actor itself gives up after the deadline; if it does not even say so, it hangs
        self._call(actor, receive.remote(weights, deadline_s), 2 * deadline_s)

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], float]:
        """See Worker."""
        actor = self._actor
        self._wait_for_engine(actor)
        answer: tuple[list[Rollout], float] = self._call(actor, actor.timed.remote(chunk))
        return answer

    def sleep(self) -> None:
        """See Worker."""
        actor = self._actor
        self._wait_for_engine(actor)
        self._call(actor, actor.sleep.remote())

    def _wait_for_engine(self, actor: Any) -> None:
        try:
            ray.get(self._started)
        except RayActorError as error:
            raise self._lost(actor, error) from None
        except RayTaskError as error:
            reason = f"its engine does not start: {error.cause}"
            if self._is_replacement:  # what the lost one held may not be free yet
                raise WorkerError(reason, lambda: self._replace(actor)) from error
            raise WorkerError(reason, is_final=True) from error

    def _call(self, actor: Any, answer: ray.ObjectRef, deadline_s: float | None = None) -> Any:
        try:
            return ray.get(answer, timeout=deadline_s)
        except (RayActorError, GetTimeoutError) as error:
            raise self._lost(actor, error) from None
        except WeightsError as error:
            raise WorkerError(str(getattr(error, "cause", error))) from None
        except RayTaskError as error:  # its engine may be dead or half loaded
            raise self._lost(actor, error.cause) from error

    def _lost(self, actor: Any, error: Exception) -> WorkerError:
        reason = str(error).splitlines() or [type(error).__name__]
        return WorkerError(reason[0], lambda: self._replace(actor))

    def _replace(self, lost: Any) -> None:
        if self._actor is not lost:
            return  # somebody else has seen it too
        with contextlib.suppress(RayActorError):
            ray.kill(lost)
        self._actor, self._is_replacement = self._new(), True
        self.start()
