"""The Ray session of a run: starts or joins a cluster, and reserves the places of all workers in
it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import AuthenticationError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from ppo_dist.cluster.layout import Layout, Node, Slot, bundle_of, difference, layout, scattered
from ppo_dist.config import Config, InputError
from ppo_dist.config.workers import Cluster
from ppo_dist.device import DeviceKind

logger = logging.getLogger(__name__)
TOLD_AFTER_S = 5.0  # of a wait for room in the cluster
# else Ray's head would keep, for its dashboard, 3 KB of every call and hundreds of every actor and
# process that ended, up to 100,000 of each; the first counts in who calls, the others in the head
WITHOUT_DASHBOARD = {
    "RAY_task_events_report_interval_ms": "0",
    "RAY_maximum_gcs_destroyed_actor_cached_count": "10",
    "RAY_maximum_gcs_dead_worker_cached_count": "10",
}


@dataclass(frozen=True)
class Places:
    """Reserved places for workers of one kind. `bundles` says, for each bundle that a slot is in,
    which one of which placement group it is.

    Example: Places(bundles={2: (PlacementGroup(…), 0)}, slots=(Slot(2, 1.0, 1),), device="cuda")
    """

    bundles: Mapping[int, tuple[PlacementGroup, int]]
    slots: tuple[Slot, ...]
    device: DeviceKind

    def another(self) -> Places:
        """One more place like the first, in a group of its own. It waits for a node that has room,
        without end: that is what Ray's autoscaler looks at.
        """
        slot = replace(self.slots[0], bundle=0)
        group = placement_group([bundle_of(slot.cpus, slot.gpus)])
        return Places({0: (group, 0)}, (slot,), self.device)

    def give_back(self, slot: Slot) -> None:
        """Frees a place that has a group of its own, and ends who is there."""
        remove_placement_group(self.bundles[slot.bundle][0])


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
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address := cluster.joins:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (AuthenticationError, ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"cluster.address {address}: cannot join: {' '.join(str(error).split())} (is its "
                "token in RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token?)"
            ) from None
    else:
        for name, value in WITHOUT_DASHBOARD.items():
            os.environ.setdefault(name, value)
        ray.init(
            address="local",
            num_cpus=cluster.cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own would abort
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """Of the cluster that is connected."""
    return [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _node(has: Mapping[str, float]) -> Node:
    return Node(has.get("CPU", 0.0), has.get("GPU", 0.0))


def fitting(config: Config, has_learners: bool = True, has_rollouts: bool = True) -> Layout:
    """The layout in the cluster that is connected. One that was joined may lack nodes that are
    still to come: they have `cluster.wait_s`.

    Raises:
        InputError: it is too small, see `layout`.
    """
    cluster, begin, is_told = config.cluster, time.monotonic(), False
    while True:
        try:
            return layout(config, nodes(), has_learners, has_rollouts)
        except InputError as error:
            if cluster.joins is None or time.monotonic() - begin > cluster.wait_s:
                raise
            if not is_told:
                logger.warning("waiting up to %.0f s for more nodes: %s", cluster.wait_s, error)
                is_told = True
        time.sleep(0.5)


@contextlib.contextmanager
def reserved(config: Config, wanted: Layout) -> Iterator[tuple[Places, Places, list[Places]]]:
    """Places for learners, for rollout workers and for each reward model, given back at the end.
    Neighbouring ranks of learners stand on the same node where that is possible.

    Raises:
        InputError: the cluster does not free them within `cluster.wait_s`.
    """
    made: dict[int, tuple[PlacementGroup, int]] = {}
    try:
        _reserve(config.cluster, wanted, made)
        node_of = _nodes(made, [slot.bundle for slot in wanted.learners])
        learners = sorted(wanted.learners, key=lambda slot: node_of[slot.bundle])
        yield (
            Places(made, tuple(learners), wanted.device),
            Places(made, wanted.rollouts, wanted.device),
            [Places(made, slots, wanted.device) for slots in wanted.judges],
        )
    finally:
        for group in {group.id: group for group, _ in made.values()}.values():
            remove_placement_group(group)


def _reserve(cluster: Cluster, wanted: Layout, made: dict[int, tuple[PlacementGroup, int]]) -> None:
    """Reserves part by part, so that a part can be given back alone; those with the largest bundles
    first, while there is room. `made` has what is reserved so far, also after an error.
    """
    deadline = time.monotonic() + cluster.wait_s
    for part in wanted.parts:
        before = list(made)
        group = placement_group([wanted.bundles[n] for n in part], strategy="PACK")
        made.update({number: (group, index) for index, number in enumerate(part)})
        if group.wait(min(TOLD_AFTER_S, max(deadline - time.monotonic(), 0.1))):
            continue
        if (left := deadline - time.monotonic()) >= 1:
            lacking = _lacking(wanted, before)
            logger.warning("waiting up to %.0f s more for room in the cluster: %s", left, lacking)
            if group.wait(left):
                continue
        raise InputError(
            f"the cluster has no room for this run after {cluster.wait_s:.0f} s "
            f"(cluster.wait_s): {_lacking(wanted, before)}"
        )


def _lacking(wanted: Layout, reserved: Sequence[int]) -> str:
    """What the cluster has too little of, beside the bundles that are reserved already."""
    found = Counter(ray.available_resources())
    for number in reserved:
        found.update(wanted.bundles[number])
    if lacking := difference(wanted.bundles, found):
        return lacking
    rest = [bundle for number, bundle in enumerate(wanted.bundles) if number not in reserved]
    return scattered(rest, [_node(free) for free in available_resources_per_node().values()])


def _nodes(
    made: Mapping[int, tuple[PlacementGroup, int]], bundles: Sequence[int]
) -> dict[int, str]:
    """The node of each bundle. A group is asked for once: it tells of all its bundles."""
    groups = {made[number][0].id: made[number][0] for number in bundles}
    of_group = {
        name: placement_group_table(group)["bundles_to_node_id"] for name, group in groups.items()
    }
    return {number: of_group[made[number][0].id][made[number][1]] for number in bundles}
