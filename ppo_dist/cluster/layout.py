"""Who gets which resources of a cluster: a pure function of the config and of the nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ppo_dist.config import Config, InputError, reward_models
from ppo_dist.device import DeviceKind

Bundle = dict[str, float]
TOLD_NODES = 8


@dataclass(frozen=True)
class Node:
    """What a node of the cluster has in all.

    Example: Node(cpus=96.0, gpus=8.0)
    """

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Slot:
    """A worker's place: what it takes of which bundle.

    Example: Slot(bundle=2, cpus=1.0, gpus=1)
    """

    bundle: int
    cpus: float
    gpus: int


@dataclass(frozen=True)
class Layout:
    """Bundles to reserve, each on one node, and a slot in them for every learner, by rank, for
    every rollout worker, and for every worker of each reward model (`config.reward_models`). A
    colocated rollout worker takes no GPU: it borrows those of the learners in its bundle.

    Example: Layout(bundles=({"CPU": 2.0, "GPU": 1.0},), learners=(Slot(0, 1.0, 1),),
    rollouts=(Slot(0, 1.0, 0),), judges=(), device="cuda")
    """

    bundles: tuple[Bundle, ...]
    learners: tuple[Slot, ...]
    rollouts: tuple[Slot, ...]
    judges: tuple[tuple[Slot, ...], ...]
    device: DeviceKind

    @property
    def parts(self) -> list[list[int]]:
        """Numbers of the bundles that are reserved together: that of a rollout worker which shares
        it with nobody by itself, all others as one. Those with the largest bundles come first.
        """
        shared = {slot.bundle for slots in (self.learners, *self.judges) for slot in slots}
        alone = [[slot.bundle] for slot in self.rollouts if slot.bundle not in shared]
        together = [n for n in range(len(self.bundles)) if [n] not in alone]

        def size(part: list[int]) -> tuple[float, float]:
            return max((self.bundles[n].get("GPU", 0.0), self.bundles[n]["CPU"]) for n in part)

        return sorted([part for part in (together, *alone) if part], key=size, reverse=True)


def layout(
    config: Config, nodes: Sequence[Node], has_learners: bool = True, has_rollouts: bool = True
) -> Layout:
    """The layout of a run, or of its learners or rollout workers alone; reward models go with the
    latter.

    Workers compute on GPUs if the cluster has any, unless `cluster.device` says otherwise. Split,
    every worker has a bundle of its own, and a rollout worker as many GPUs as its engine's tensor
    parallel size; colocated, a bundle is a rollout worker and the learners whose GPUs it borrows.

    Raises:
        InputError: the cluster has too little in all, or no node has room for one of the bundles;
            states what is asked for and what was found.
    """
    device = device_kind(config, nodes)
    is_colocated = config.cluster.placement == "colocated" and has_learners and has_rollouts
    made = (_colocated if is_colocated else _split)(config, device, has_learners, has_rollouts)
    if has_rollouts:
        made = _with_judges(config, made)
    total = {"CPU": sum(n.cpus for n in nodes), "GPU": sum(n.gpus for n in nodes)}
    lacking = difference(made.bundles, total) or _too_large(made.bundles, nodes)
    if lacking:
        raise InputError(
            f"the cluster is too small: {lacking}; lower learner.workers, rollout.workers or what "
            "each of them takes (`cpus`, tensor_parallel), or add nodes"
        )
    return made


def device_kind(config: Config, nodes: Sequence[Node]) -> DeviceKind:
    """Where the workers of a run compute."""
    if config.cluster.device != "auto":
        return config.cluster.device
    return "cuda" if any(node.gpus > 0 for node in nodes) else "cpu"


def difference(bundles: Sequence[Bundle], found: Mapping[str, float]) -> str:
    """What is asked for beyond what was found, in words; empty if it is enough."""
    parts = []
    for kind in ("CPU", "GPU"):
        asked = sum(bundle.get(kind, 0.0) for bundle in bundles)
        if asked > found.get(kind, 0.0):
            parts.append(f"{asked:g} {kind}s asked for, {found.get(kind, 0.0):g} found")
    return ", ".join(parts)


def scattered(bundles: Sequence[Bundle], free: Sequence[Node]) -> str:
    """What is asked for on one node and what nodes have free, in words, where it is enough in all:
    those with the most room, since a cluster may have hundreds.
    """
    largest = max(bundles, key=lambda bundle: (bundle.get("GPU", 0.0), bundle["CPU"]))
    most = sorted(free, key=lambda node: (node.gpus, node.cpus), reverse=True)[:TOLD_NODES]
    found = "; ".join(f"{node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in most)
    return (
        f"{len(bundles)} more bundles asked for, the largest of {largest['CPU']:g} CPUs and "
        f"{largest.get('GPU', 0.0):g} GPUs on one node; found free on the nodes with the most "
        f"room: {found or 'nothing'}"
    )


def _split(config: Config, device: DeviceKind, has_learners: bool, has_rollouts: bool) -> Layout:
    learner, rollout, on_gpu = config.learner, config.rollout, device == "cuda"
    each = [(learner.cpus, int(on_gpu))] * (learner.workers * has_learners)
    ranks = len(each)
    each += [(rollout.cpus, rollout.engine.gpus * on_gpu)] * (rollout.workers * has_rollouts)
    slots = tuple(Slot(number, cpus, gpus) for number, (cpus, gpus) in enumerate(each))
    bundles = tuple(bundle_of(cpus, gpus) for cpus, gpus in each)
    return Layout(bundles, slots[:ranks], slots[ranks:], (), device)


def _colocated(config: Config, device: DeviceKind, *_: bool) -> Layout:
    learner, rollout = config.learner, config.rollout
    share, on_gpu = rollout.engine.gpus, int(device == "cuda")
    bundle = bundle_of(share * learner.cpus + rollout.cpus, share * on_gpu)
    learners = tuple(Slot(r // share, learner.cpus, on_gpu) for r in range(learner.workers))
    rollouts = tuple(Slot(number, rollout.cpus, 0) for number in range(rollout.workers))
    return Layout((bundle,) * rollout.workers, learners, rollouts, (), device)


def _with_judges(config: Config, made: Layout) -> Layout:
    gpus, bundles, judges = int(made.device == "cuda"), list(made.bundles), []
    for model in reward_models(config):
        begin = len(bundles)
        bundles += [bundle_of(model.cpus, gpus)] * model.workers
        judges.append(tuple(Slot(n, model.cpus, gpus) for n in range(begin, len(bundles))))
    return replace(made, bundles=tuple(bundles), judges=tuple(judges))


def bundle_of(cpus: float, gpus: int) -> Bundle:
    """What Ray is asked for."""
    return {"CPU": cpus, "GPU": float(gpus)} if gpus else {"CPU": cpus}


def _too_large(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> str:
    for bundle in bundles:
        cpus, gpus = bundle["CPU"], bundle.get("GPU", 0.0)
        if not any(node.cpus >= cpus and node.gpus >= gpus for node in nodes):
            largest = max(nodes, key=lambda node: (node.gpus, node.cpus))
            return (
                f"no node has {cpus:g} CPUs and {gpus:g} GPUs together, which a worker needs; the "
                f"largest has {largest.cpus:g} CPUs and {largest.gpus:g} GPUs"
            )
    return ""
