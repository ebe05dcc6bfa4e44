"""Learner workers as Ray actors."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ppo_dist import device
from ppo_dist.cluster import network
from ppo_dist.cluster.actors import cause, reason
from ppo_dist.cluster.layout import Slot
from ppo_dist.cluster.session import Places
from ppo_dist.config import Config, InputError, WorkersLost
from ppo_dist.learner.worker import LearnerWorker, Seat, cannot_compile, probe
from ppo_dist.protocols import WeightSender
from ppo_dist.types import Weights

R = TypeVar("R")
MakeSender = Callable[[], WeightSender]


class LearnerActor(LearnerWorker):
    """A LearnerWorker that is first asked where it stands and opens its end of the transport, and
    then started: rank 0's address is needed by all.
    """

    def __init__(self) -> None:
        """Loads nothing yet; `start` does what LearnerWorker's constructor does."""
        network.use_own_interface()

    def meeting_point(self) -> tuple[str, int]:
        """This node's address and a port that is free there."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port: int = probe.getsockname()[1]
        return network.address(), port

    def open(self, make_sender: MakeSender) -> int | None:
        """Opens the sending end of the transport; returns its port if it has one."""
        self._opened = make_sender()
        return getattr(self._opened, "port", None)

    def gpus(self) -> str:
        """Those that this worker sees, as CUDA_VISIBLE_DEVICES."""
        return device.visible()

    def cannot_compile(self, kind: device.DeviceKind) -> str | None:
        """See models.compiled.why_not."""
        return cannot_compile(kind)

    def probe(self, nbytes: int, version: int) -> Weights:
        """Publishes that much without a model."""
        return self._opened.publish(version, probe(nbytes))

    def start(self, config: Config, model_path: str, seat: Seat, resume: Path | None) -> None:
        """Loads the models and joins the others."""
        LearnerWorker.__init__(self, config, model_path, self._opened, seat, resume)


class RayRanks:
    """Learner workers as Ray actors; see learner.group.Ranks. They load their models when `start`
    is called. All methods raise WorkersLost when one of them is dead, hangs or fails: the others
    wait for it in vain, so the group is of no use any more.

    Raises:
        InputError: torch cannot compile where one of them is, and should.
    """

    def __init__(self, config: Config, places: Places, make_sender: MakeSender) -> None:
        self._config, self._places = config, places
        self.world = len(places.slots)
        actor = ray.remote(LearnerActor)
        self._actors = [actor.options(**place(places, s)).remote() for s in places.slots]
        address, _ = self._meeting_point()
        ports = self._begun([worker.open.remote(make_sender) for worker in self._actors])
        self.sends_from: tuple[str, int | None] = address, ports[0]
        if config.learner.compile:
            self._check_compiler()

    def gpus(self, bundle: int) -> str:
        """Those of the workers in a bundle, as CUDA_VISIBLE_DEVICES."""
        there = zip(self._actors, self._places.slots, strict=True)
        return ",".join(self._begun([a.gpus.remote() for a, s in there if s.bundle == bundle]))

    def probe(self, nbytes: int, version: int = -1) -> Weights:
        """Publishes about that much from rank 0 without a model."""
        weights: Weights = self._begun([self._actors[0].probe.remote(nbytes, version)])[0]
        return weights

    def start(self, model_path: str, resume: Path | None) -> None:
        """Has all load their models and join the group."""
        world, device = self.world, self._places.device
        address, port = self._meeting_point()  # the port is looked for as late as possible
        seats = [Seat(r, world, address, port, device) for r in range(world)]
        self._begun(
            [
                worker.start.remote(self._config, model_path, seat, resume)
                for worker, seat in zip(self._actors, seats, strict=True)
            ]
        )

    def call(self, method: Callable[..., R], args: Sequence[tuple[Any, ...]]) -> list[R]:
        """See Ranks."""
        try:
            answers = [
                _bound(a, method).remote(*rest) for a, rest in zip(self._actors, args, strict=True)
            ]
        except RayError as error:  # its store, and the disk beneath, take nothing more
            raise WorkersLost(f"learners: {reason(error)}") from error
        return self._all(answers, self._config.learner.deadline_s)

    def _check_compiler(self) -> None:
        answers = [a.cannot_compile.remote(self._places.device) for a in self._actors]
        for rank, said in enumerate(self._begun(answers)):
            if said is not None:
                raise InputError(f"learner.compile, learner {rank}: {said}")

    def _meeting_point(self) -> tuple[str, int]:
        found: tuple[str, int] = self._begun([self._actors[0].meeting_point.remote()])[0]
        return found

    def _begun(self, answers: Sequence[ray.ObjectRef]) -> list[Any]:
        return self._all(answers, self._config.cluster.start_deadline_s)

    def _all(self, answers: Sequence[ray.ObjectRef], deadline_s: float) -> list[Any]:
        try:
            return list(ray.get(list(answers), timeout=deadline_s))
        except RayError as error:
            raise WorkersLost(f"learners: {cause(answers)}") from error


def place(places: Places, slot: Slot) -> dict[str, Any]:
    """The actor options of a worker in one of the reserved places."""
    group, index = places.bundles[slot.bundle]
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": slot.cpus, "num_gpus": slot.gpus, "scheduling_strategy": strategy}


def _bound(actor: Any, method: Callable[..., Any]) -> Any:
    return getattr(actor, method.__name__)
