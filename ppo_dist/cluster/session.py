"""The Ray session of a run: starts or joins a cluster, and reserves the places of all workers in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ppo_dist.config import Config, InputError
from ppo_dist.device import DeviceKind

Bundle = dict[str, float]


@dataclass(frozen=True)
class Places:
    """Reserved places: learners first, then rollout workers, one bundle each.

    Example: Places(group=PlacementGroup(…), learners=2, rollouts=2, device="cuda")
    """

    group: PlacementGroup
    learners: int
    rollouts: int
    device: DeviceKind


@contextlib.contextmanager
def session(config: Config) -> Iterator[None]:
    """A Ray connection. A Ray that is already connected in this process is used as it is and left running."""
    if ray.is_initialized():
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
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
            num_cpus=config.cluster.cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def places(config: Config) -> Iterator[Places]:
    """Places for every worker, given back at the end.

    Raises:
        InputError: the cluster has less than the run asks for, or does not free it within `cluster.wait_s`.
    """
    found = ray.cluster_resources()
    device: DeviceKind = "cpu"
    if config.cluster.device == "cuda" or (
        config.cluster.device == "auto" and found.get("GPU", 0) > 0
    ):
        device = "cuda"
    bundles = layout(config, device)
    lacking = difference(bundles, found)
    if lacking:
        raise InputError(
            f"the cluster is too small: {lacking}; lower learner.workers or rollout.workers, or add nodes"
        )
    group = placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=config.cluster.wait_s)
    except GetTimeoutError:
        remove_placement_group(group)
        lacking = (
            difference(bundles, ray.available_resources())
            or "no single node has room for one of the workers"
        )
        raise InputError(
            f"the cluster has no room for this run after {config.cluster.wait_s:.0f} s (cluster.wait_s): {lacking}"
        ) from None
    try:
        yield Places(group, config.learner.workers, config.rollout.workers, device)
    finally:
        remove_placement_group(group)


def layout(config: Config, device: DeviceKind) -> list[Bundle]:
    """What each worker reserves: learners first, then rollout workers. On GPUs one each."""
    gpu: Bundle = {"GPU": 1.0} if device == "cuda" else {}
    learner = {"CPU": config.learner.cpus, **gpu}
    rollout = {"CPU": config.rollout.cpus, **gpu}
    return [learner] * config.learner.workers + [rollout] * config.rollout.workers


def difference(bundles: list[Bundle], found: dict[str, float]) -> str:
    """What is asked for beyond what was found, in words; empty if it is enough."""
    parts = []
    for kind in ("CPU", "GPU"):
        asked = sum(bundle.get(kind, 0.0) for bundle in bundles)
        if asked > found.get(kind, 0.0):
            parts.append(f"{asked:g} {kind}s asked for, {found.get(kind, 0.0):g} found")
    return ", ".join(parts)
