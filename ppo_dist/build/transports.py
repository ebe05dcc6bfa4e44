"""The two ends of the way that weights travel, and whether it is open."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_dist.config import Config, InputError, WorkersLost
from ppo_dist.protocols import WeightReceiver, WeightSender

if TYPE_CHECKING:
    from ppo_dist.cluster.groups import RayRanks
    from ppo_dist.cluster.pool import RemoteWorker
    from ppo_dist.device import DeviceKind

MEGABYTE = 2**20


def sender(config: Config, kind: DeviceKind) -> Callable[[], WeightSender]:
    """Makes the sending end, in the process that sends."""
    transport = config.transport
    size = transport.bucket_mb * MEGABYTE
    match transport.kind:
        case "store":
            from ppo_dist.transport.store import StoreSender

            return functools.partial(StoreSender, size)
        case "collective":
            from ppo_dist.transport.collective import CollectiveSender

            return functools.partial(CollectiveSender, kind, size, transport.half_s)
        case "disk":
            from ppo_dist.transport.disk import DiskSender

            return functools.partial(DiskSender, _folder(config), size, config.stream.kept_versions)


def receiver(
    config: Config, kind: DeviceKind, address: str, port: int | None
) -> Callable[[], WeightReceiver]:
    """Makes a receiving end, in the process that receives; the sender is at `address`."""
    match config.transport.kind:
        case "store":
            from ppo_dist.transport.store import StoreReceiver

            return StoreReceiver
        case "collective":
            from ppo_dist.transport.collective import CollectiveReceiver

            assert port is not None, "this sender has one"
            half_s, keep = config.transport.half_s, config.stream.kept_versions
            return functools.partial(CollectiveReceiver, kind, address, port, half_s, keep)
        case "disk":
            from ppo_dist.transport.disk import DiskReceiver

            return DiskReceiver


def preflight(config: Config, ranks: RayRanks, workers: Sequence[RemoteWorker]) -> None:
    """Sends a megabyte to every rollout worker.

    Raises:
        InputError: it does not arrive; names the worker and the reason.
        WorkersLost: a worker died or hung meanwhile.
    """
    with ThreadPoolExecutor(len(workers)) as threads:
        _came(config, [threads.submit(worker.wait) for worker in workers])
        weights = ranks.probe(MEGABYTE)
        _came(config, [threads.submit(worker.probe, weights) for worker in workers])


def _came(config: Config, answers: Sequence[Future[None]]) -> None:
    from ppo_dist.rollout.members import WorkerError

    for number, answer in enumerate(answers):
        try:
            answer.result()
        except WorkerError as error:
            kind = WorkersLost if error.is_lost else InputError
            raise kind(
                f"transport.kind {config.transport.kind}: rollout worker {number} did not get a "
                f"megabyte from the learners: {error}"
            ) from error.__cause__


def _folder(config: Config) -> Path:
    return Path(config.run.dir) / "weights"
