"""The Ray session of a run: starts or joins a cluster, and reserves the places of all workers in
it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from ppo_dist.cluster.layout import Layout, Node, Slot, difference
from ppo_dist.config import Config, InputError
from ppo_dist.config.workers import Cluster
from ppo_dist.device import DeviceKind


@dataclass(frozen=True)
class Places:
    """Reserved places for workers of one kind.

    Example: Places(group=PlacementGroup(…), slots=(Slot(0, 1.0, 1),), device="cuda")
    """

    group: PlacementGroup
    slots: tuple[Slot, ...]
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
        except (AuthenticationError, ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"cluster.address {address}: cannot join: {' '.join(str(error).split())} (is its "
                "token in RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token?)"
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


def nodes() -> list[Node]:
    """Of the cluster that is connected."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(has.get("CPU", 0.0), has.get("GPU", 0.0)) for has in found]


@contextlib.contextmanager
def reserved(config: Config, wanted: Layout) -> Iterator[tuple[Places, Places, list[Places]]]:
    """Places for learners, for rollout workers and for each reward model, given back at the end.
    Neighbouring ranks of learners stand on the same node where that is possible.

    Raises:
        InputError: the cluster does not free them within `cluster.wait_s`.
    """
    group = placement_group(list(wanted.bundles), strategy="PACK")
    try:
        ray.get(group.ready(), timeout=config.cluster.wait_s)
    except GetTimeoutError:
        remove_placement_group(group)
        lacking = difference(wanted.bundles, ray.available_resources())
        raise InputError(
            f"the cluster has no room for this run after {config.cluster.wait_s:.0f} s "
            f"(cluster.wait_s): {lacking or 'what is free is spread over too many nodes'}"
        ) from None
    node_of = placement_group_table(group)["bundles_to_node_id"]
    learners = sorted(wanted.learners, key=lambda slot: node_of[slot.bundle])
    try:
        yield (
            Places(group, tuple(learners), wanted.device),
            Places(group, wanted.rollouts, wanted.device),
            [Places(group, slots, wanted.device) for slots in wanted.judges],
        )
    finally:
        remove_placement_group(group)
