"""Learners and rollout workers, as Ray actors or, by local.py, in this process."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_dist.build import transports
from ppo_dist.build.data import absolute
from ppo_dist.build.engines import engine
from ppo_dist.build.parts import reward_source, traces
from ppo_dist.config import Config, reward_models
from ppo_dist.config.workers import Cluster
from ppo_dist.protocols import LearnerGroup, Rewards, RolloutPool
from ppo_dist.tracking.local import record_event

if TYPE_CHECKING:
    from ppo_dist.cluster.groups import RayRanks
    from ppo_dist.cluster.pool import RemoteWorker
    from ppo_dist.cluster.session import Places
    from ppo_dist.learner.group import Ranks


def before_ray(cluster: Cluster) -> None:
    """Settings that Ray reads when it is imported: a Ray of this machine alone listens on the
    loopback (it would take the machine's outer address, where a head of launch/ray_head.sh is not);
    a cluster is shown the token, where there is one.
    """
    address = cluster.joins
    kept = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if address and (os.environ.get("RAY_AUTH_TOKEN") or kept.is_file()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    is_here = not address or address.startswith(("127.0.0.1:", "localhost:"))
    if is_here and "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@contextlib.contextmanager
def cluster(
    config: Config, has_learners: bool = True, has_rollouts: bool = True
) -> Iterator[Config]:
    """Whatever the workers run on: a Ray connection, or nothing. Yields the config with
    `cluster.device` settled for as long: a run that loses its GPUs shall not go on on CPUs.

    Raises:
        InputError: the cluster cannot be joined, or is too small for those workers.
    """
    if config.cluster.kind == "local":
        yield config
        return
    before_ray(config.cluster)
    from ppo_dist.cluster.driver import long_lived
    from ppo_dist.cluster.session import fitting, session

    with session(config.cluster), long_lived():
        settled = {"device": fitting(config, has_learners, has_rollouts).device}
        section = config.cluster.model_copy(update=settled)
        yield config.model_copy(update={"cluster": section})


@contextlib.contextmanager
def workers(
    config: Config, model_path: str, resume: Path | None
) -> Iterator[tuple[LearnerGroup, RolloutPool, Rewards]]:
    """Learners, rollout workers and what judges, connected, started inside `cluster`. That weights
    get from learners to rollout workers is tried before any of them loads its model.

    Raises:
        InputError: the cluster has no room for them, or they cannot reach each other.
    """
    if config.cluster.kind == "local":
        with (
            learners(config, model_path, resume) as group,
            rollout_pool(config, model_path) as (own, reward),
        ):
            yield group, own, reward
        return
    takes_turns = config.cluster.placement == "colocated"
    with (
        connected(config, model_path, is_first=resume is None) as (ranks, remote, reward),
        _started(config, remote, takes_turns) as pool,
    ):
        ranks.start(model_path, resume)
        yield _group(config, ranks), pool, reward


@contextlib.contextmanager
def connected(
    config: Config, model_path: str, is_first: bool = True
) -> Iterator[tuple[RayRanks, list[RemoteWorker], Rewards]]:
    """Learners and rollout workers as Ray actors that have loaded nothing yet, and what judges,
    started inside `cluster`. They are the run's first unless it goes on from a checkpoint.

    Raises:
        InputError: the cluster has no room for them, or weights do not get from one to the other.
    """
    from ppo_dist.cluster.groups import RayRanks
    from ppo_dist.cluster.pool import Crew, RemoteWorker
    from ppo_dist.cluster.session import fitting, reserved

    with reserved(config, fitting(config)) as (of_learners, of_rollouts, of_judges):
        ranks = RayRanks(config, of_learners, transports.sender(config, of_learners.device))
        receiver = transports.receiver(config, of_rollouts.device, *ranks.sends_from)
        make_engine = engine(config, model_path, of_rollouts.device)
        lent = ranks.gpus if config.cluster.placement == "colocated" else None
        crew = Crew(config, of_rollouts, make_engine, receiver, lent, is_first)
        remote = [RemoteWorker(crew, slot) for slot in of_rollouts.slots]
        transports.preflight(config, ranks, remote)
        with contextlib.closing(crew):
            yield ranks, remote, _remote_rewards(config, model_path, of_judges)


@contextlib.contextmanager
def learners(config: Config, model_path: str, resume: Path | None) -> Iterator[LearnerGroup]:
    """The learners alone, started inside `cluster`; from a checkpoint if one is given.

    Raises:
        InputError: the cluster has no room for them.
    """
    if config.cluster.kind == "local":
        from ppo_dist.build import local

        yield _group(config, local.ranks(config, model_path, resume))
        return
    from ppo_dist.cluster.groups import RayRanks
    from ppo_dist.cluster.session import fitting, reserved

    with reserved(config, fitting(config, has_rollouts=False)) as (places, *_):
        ranks = RayRanks(config, places, transports.sender(config, places.device))
        ranks.start(model_path, resume)
        yield _group(config, ranks)


@contextlib.contextmanager
def rollout_pool(config: Config, model_path: str) -> Iterator[tuple[RolloutPool, Rewards]]:
    """The rollout workers alone, started inside `cluster` with the model as it is on disk
    (version 0), and what judges.

    Raises:
        InputError: the cluster has no room for them.
    """
    if config.cluster.kind == "local":
        from ppo_dist.build import local

        with local.rollout_pool(config, model_path) as both:
            yield both
        return
    from ppo_dist.cluster.pool import Crew, RemoteWorker
    from ppo_dist.cluster.session import fitting, reserved
    from ppo_dist.transport.store import StoreReceiver

    with reserved(config, fitting(config, has_learners=False)) as (_, places, of_judges):
        make_engine = engine(config, model_path, places.device)
        crew = Crew(config, places, make_engine, StoreReceiver)
        remote = [RemoteWorker(crew, slot) for slot in places.slots]
        with _started(config, remote) as pool:
            yield pool, _remote_rewards(config, model_path, of_judges)


def _remote_rewards(config: Config, model_path: str, places: Sequence[Places]) -> Rewards:
    if not places:
        return reward_source(config)
    from ppo_dist.cluster.judges import Judges
    from ppo_dist.rewards.model import ModelScores

    made, left = {}, traces(config)
    for section, own in zip(reward_models(config), places, strict=True):
        there = section.model_copy(update={"path": absolute(section.path)})
        of_workers, left = left[: section.workers], left[section.workers :]
        judges = Judges(there, model_path, own, config.cluster, _events(config), of_workers)
        made[section] = ModelScores(section, judges)
    return reward_source(config, made)


def _group(config: Config, ranks: Ranks) -> LearnerGroup:
    from ppo_dist.learner.group import Learners

    return Learners(ranks, config.learner.micro_batch_tokens, config.critic.shared)


@contextlib.contextmanager
def _started(
    config: Config, remote: Sequence[RemoteWorker], takes_turns: bool = False
) -> Iterator[RolloutPool]:
    from ppo_dist.rollout.pool import Pool

    made = Pool(
        remote,
        config.stream.kept_versions,
        _events(config),
        takes_turns=takes_turns,
        limits=config.cluster,
        another=None if takes_turns else remote[0].crew.another,
        late_s=config.transport.half_s,
    )
    with contextlib.closing(made) as pool:
        if takes_turns:
            pool.sleep()  # once their models are there: the learners load theirs next
        yield pool


def _events(config: Config) -> Callable[..., None]:
    """Records what happens to workers beside the steps."""
    return functools.partial(record_event, Path(config.run.dir))
