"""Learners and rollout workers, as Ray actors or in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_dist.config import Config
from ppo_dist.protocols import LearnerGroup, RolloutPool

ANY_PORT = 0  # a rank that is alone meets nobody

if TYPE_CHECKING:
    from ppo_dist.device import DeviceKind


@contextlib.contextmanager
def cluster(config: Config) -> Iterator[None]:
    """Whatever the workers run on: a Ray connection, or nothing.

    Raises:
        InputError: the cluster cannot be joined, or is too small for a training run of this config.
    """
    if config.cluster.kind == "local":
        yield
        return
    from ppo_dist.cluster.session import demand, session

    with session(config.cluster):
        demand(config)
        yield


@contextlib.contextmanager
def learners(config: Config, model_path: str, resume: Path | None) -> Iterator[LearnerGroup]:
    """The learners, started inside `cluster`; from a checkpoint if one is given.

    Raises:
        InputError: the cluster has no room for them.
    """
    from ppo_dist.learner.group import InProcess, Learners

    budget, shared = config.learner.micro_batch_tokens, config.critic.shared
    if config.cluster.kind == "local":
        from ppo_dist.learner.worker import LearnerWorker, Seat
        from ppo_dist.transport.memory import MemorySender

        seat = Seat(0, 1, "127.0.0.1", ANY_PORT, _local_device(config))
        worker = LearnerWorker(config, model_path, MemorySender(), seat, resume)
        yield Learners(InProcess(worker), budget, shared)
        return
    from ppo_dist.cluster.groups import RayRanks
    from ppo_dist.cluster.session import places
    from ppo_dist.transport.store import StoreSender

    with places(config, config.learner.workers, config.learner.cpus) as reserved:
        sender = StoreSender(config.transport.bucket_mb * 2**20)
        yield Learners(RayRanks(config, model_path, sender, reserved, resume), budget, shared)


@contextlib.contextmanager
def rollout_pool(config: Config, model_path: str) -> Iterator[RolloutPool]:
    """The rollout workers, started inside `cluster` with the model as it is on disk (version 0).

    Raises:
        InputError: the cluster has no room for them.
    """
    from ppo_dist.rollout.pool import Pool

    if config.cluster.kind == "local":
        from ppo_dist.device import prepare
        from ppo_dist.rollout.worker import RolloutWorker
        from ppo_dist.transport.memory import MemoryReceiver

        receiver = MemoryReceiver()
        kind, threads = _local_device(config), config.rollout.threads
        worker = RolloutWorker(config, model_path, receiver, kind)
        with contextlib.closing(Pool([worker], lambda: prepare(kind, threads))) as pool:
            yield pool
        return
    from ppo_dist.cluster.pool import RemoteWorker
    from ppo_dist.cluster.session import places
    from ppo_dist.transport.store import StoreReceiver

    with places(config, config.rollout.workers, config.rollout.cpus) as reserved:
        workers = [
            RemoteWorker(config, model_path, StoreReceiver(), reserved, bundle)
            for bundle in range(reserved.count)
        ]
        with contextlib.closing(Pool(workers)) as pool:
            yield pool


def _local_device(config: Config) -> DeviceKind:
    from ppo_dist import device

    return device.available() if config.cluster.device == "auto" else config.cluster.device
