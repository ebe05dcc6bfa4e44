"""The Ray session of a run: starts or joins a cluster, and reserves the places of all workers in
it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ppo_dist.config import Config, InputError
from ppo_dist.config.workers import Cluster
from ppo_dist.device import DeviceKind

Bundle = dict[str, float]


@dataclass(frozen=True)
class Places:
    """Reserved places for workers of one kind, a bundle each.

    Example: Places(group=PlacementGroup(…), count=2, cpus=1.0, device="cuda")
    """

    group: PlacementGroup
    count: int
    cpus: float
    device: DeviceKind


@contextlib.contextmanager
def session(cluster: Cluster) -> Iterator[None]:
    """A Ray connection. A Ray that is already connected in this process is used as it is and left
    running.

    Raises:
        InputError: the cluster at `cluster.address` cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"cluster.address {address}: cannot join: {' '.join(str(error).split())}"
            ) from None
    else:
        ray.init(
            address="local",
            num_cpus=cluster.cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        yield
    finally:
        ray.shutdown()


def device_kind(config: Config) -> DeviceKind:
    """Where workers of this run compute: on GPUs if the cluster has any, unless the config says
    which.
    """
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def layout(count: int, cpus: float, device: DeviceKind) -> list[Bundle]:
    """What workers of one kind reserve; on GPUs one each."""
    gpu: Bundle = {"GPU": 1.0} if device == "cuda" else {}
    return [{"CPU": cpus, **gpu}] * count


def demand(config: Config) -> None:
    """Compares what a whole training run asks for with what the cluster has in all.

    Raises:
        InputError: the cluster has less.
    """
    device = device_kind(config)
    bundles = layout(config.learner.workers, config.learner.cpus, device)
    bundles += layout(config.rollout.workers, config.rollout.cpus, device)
    lacking = difference(bundles, ray.cluster_resources())
    if lacking:
        raise InputError(
            f"the cluster is too small: {lacking}; lower learner.workers, rollout.workers or their "
            "`cpus`, or add nodes"
        )


@contextlib.contextmanager
def places(config: Config, count: int, cpus: float) -> Iterator[Places]:
    """Places for some workers, given back at the end.

    Raises:
        InputError: the cluster does not free them within `cluster.wait_s`.
    """
    device = device_kind(config)
    bundles = layout(count, cpus, device)
    group = placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=config.cluster.wait_s)
    except GetTimeoutError:
        remove_placement_group(group)
        lacking = difference(bundles, ray.available_resources())
        raise InputError(
            f"the cluster has no room for this run after {config.cluster.wait_s:.0f} s "
            f"(cluster.wait_s): {lacking or 'no single node has room for one of the workers'}"
        ) from None
    try:
        yield Places(group, count, cpus, device)
    finally:
        remove_placement_group(group)


def difference(bundles: list[Bundle], found: dict[str, float]) -> str:
    """What is asked for beyond what was found, in words; empty if it is enough."""
    parts = []
    for kind in ("CPU", "GPU"):
        asked = sum(bundle.get(kind, 0.0) for bundle in bundles)
        if asked > found.get(kind, 0.0):
            parts.append(f"{asked:g} {kind}s asked for, {found.get(kind, 0.0):g} found")
    return ", ".join(parts)
