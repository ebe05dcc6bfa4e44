"""A run over several nodes, each with a network of its own, whose cables are cut and which die: the
numbers are those of a run on one machine.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppo_dist.coordinator.scale import Scale
from ppo_dist.inspect import rescale
from tests.conftest import raw_config
from tests.nodes.net import network, why_not
from tests.nodes.rig import Cluster, environment, training, wait_for

pytestmark = pytest.mark.slow
# learners take 3 and rollout workers 1, so that they fill a, b and c; d is for one that is lost
CPUS = {"a": 3, "b": 4, "c": 1, "d": 1}
HEAD, LEARNERS, VICTIM, SPARE = "a", "b", "c", "d"
KINDS = ["store", "collective"]
CHECKPOINT_EVERY = 20
STEPS = 150  # a worker that is lost should be back before the last one
START_S, RESTART_S, END_S = 180, 120, 300
CUT_S = 12.0  # shorter than Ray needs to take the node for dead, see rig.RAY


def config(folder: Path, kind: str, is_hasty: bool = False, **cluster: Any) -> dict[str, Any]:
    """A run with two learners and two rollout workers; a hasty one has deadlines that a cut cable
    makes it miss.
    """
    return raw_config(
        folder,
        train={"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY},
        learner={"workers": 2, "cpus": 3, "optimizer": "sgd", "lr": 0.005, "critic_lr": 0.005},
        rollout={
            "workers": 2,
            "group_size": 2,
            "max_new_tokens": 6,
            "chunk": 2,
            "deadline_s": 8 if is_hasty else 600,
        },
        # by collective a sixth of it for an answer, which a cut of 12 s may delay by 25: TCP tries
        # again after 12.6 s, and then after 25.4
        transport={"kind": kind, "deadline_s": 4 if is_hasty else 240},
        cluster={"kind": "ray", "wait_s": 60, **cluster},
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run on one machine."""
    raw = config(tmp_path_factory.mktemp("one") / "run", "store", cpus=8)
    with training(raw, environment()) as run:
        run.end(END_S)
        return run.numbers()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"no network namespaces here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="nodes-"))  # sockets have short names
    with network(list(CPUS)) as hosts:
        yield Cluster(hosts, CPUS, folder)
    shutil.rmtree(folder)


@pytest.fixture
def cluster(nodes: Cluster) -> Iterator[Cluster]:
    """Three nodes, all well."""
    for name in CPUS:
        nodes.hosts[name].heal()
        if name != SPARE and not nodes.runs(name):
            nodes.start(name)
    yield nodes
    for name in (VICTIM, SPARE):  # Ray may have taken it for dead, so that it is about to end
        if nodes.runs(name):
            nodes.kill(name)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_on_three_nodes(
    cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]], kind: str
) -> None:
    with cluster.train(config(tmp_path / "run", kind)) as run:
        run.wait(run.rows, START_S)
        assert cluster.actors() == {
            "a": {"LearnerActor": 1},
            "b": {"LearnerActor": 1, "RolloutActor": 1},
            "c": {"RolloutActor": 1},
            "d": {},
        }
        run.end(END_S)
        assert run.numbers() == expected
        assert not run.events("rollout_worker_failed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_hasty", [False, True])
def test_a_cable_is_cut_and_healed(
    cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]], kind: str, is_hasty: bool
) -> None:
    """The run waits for the worker, or gives its work to the other."""
    with cluster.train(config(tmp_path / "run", kind, is_hasty)) as run:
        run.wait(lambda: len(run.rows()) > 3, START_S)
        cluster.hosts[VICTIM].cut()
        time.sleep(CUT_S / 2)
        steps = len(run.rows())
        time.sleep(CUT_S / 2)
        assert (len(run.rows()) == steps < STEPS) or is_hasty, "it waits"
        cluster.hosts[VICTIM].heal()
        run.end(END_S)
        assert run.numbers() == expected
        assert bool(run.events("rollout_worker_failed")) == is_hasty


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_node_is_lost(
    cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]], kind: str, how: str
) -> None:
    """Its worker is started anew on a node that has joined meanwhile."""
    with cluster.train(config(tmp_path / "run", kind, is_hasty=True)) as run:
        run.wait(lambda: cluster.actors()[VICTIM], START_S)
        cluster.start(SPARE)
        run.wait(lambda: len(run.rows()) > 3, START_S)
        if how == "killed":
            cluster.kill(VICTIM)
        else:
            cluster.hosts[VICTIM].cut()
        run.wait(lambda: run.events("rollout_worker_restarted"), RESTART_S)
        assert cluster.actors()[SPARE] == {"RolloutActor": 1}
        run.end(END_S)
        assert run.numbers() == expected


def test_the_node_of_a_learner_is_lost(
    cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    """A rollout worker was on it too. The run begins anew from its last checkpoint as soon as
    another node has room for both.
    """
    with cluster.train(config(tmp_path / "run", "store", is_hasty=True)) as run:
        run.wait(lambda: len(run.rows()) > CHECKPOINT_EVERY + 3, START_S)
        cluster.kill(LEARNERS)
        cluster.start(LEARNERS)
        run.wait(lambda: run.events("learners_rebuilt"), RESTART_S)
        assert cluster.actors()[LEARNERS] == {"LearnerActor": 1, "RolloutActor": 1}
        run.end(END_S)
        assert run.numbers() == expected
        (lost,) = run.events("learners_lost")
        (rebuilt,) = run.events("learners_rebuilt")
        assert rebuilt["step"] >= CHECKPOINT_EVERY, "not from the beginning"
        assert lost["step"] > rebuilt["step"]


def test_the_head_is_lost(cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]]) -> None:
    """With the coordinator on it. What is left elsewhere ends by itself; on new nodes the run is
    resumed from its last checkpoint.
    """
    raw = config(tmp_path / "run", "store")
    with cluster.train(raw) as run:
        run.wait(lambda: len(run.rows()) > CHECKPOINT_EVERY + 3, START_S)
        cluster.kill(HEAD)
    wait_for(lambda: not any(cluster.actors().values()), RESTART_S, cluster.actors)
    for name in (LEARNERS, VICTIM):
        if cluster.runs(name):
            cluster.kill(name)
    for name in (HEAD, LEARNERS, VICTIM):
        cluster.start(name)
    with cluster.train(raw, "--resume") as run:
        run.end(END_S)
        assert run.numbers() == expected
        (resumed,) = run.events("resumed")
        assert resumed["step"] >= CHECKPOINT_EVERY, "not from the beginning"


def test_a_worker_without_room_joins_on_a_new_node(
    cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    """As where Ray's autoscaler starts one; the run goes on meanwhile."""
    with cluster.train(config(tmp_path / "run", "store")) as run:
        run.wait(lambda: len(run.rows()) > 3, START_S)
        rescale(run.folder, Scale(rollout_workers=3), Console(quiet=True))
        run.wait(lambda: run.events("rollout_worker_added"), RESTART_S)
        steps = len(run.rows())
        run.wait(lambda: len(run.rows()) > steps + 3, START_S)
        cluster.start(SPARE)
        run.wait(lambda: cluster.actors()[SPARE] == {"RolloutActor": 1}, RESTART_S)
        run.end(END_S)
        assert run.numbers() == expected
        assert not run.events("rollout_worker_failed")


def test_the_doctor_asks_every_node(cluster: Cluster, tmp_path: Path) -> None:
    """Also one whose cable is cut, which is named."""
    raw = config(tmp_path / "run", "store")
    code, told = cluster.doctor(raw)
    assert code == 0, told
    addresses = [cluster.hosts[name].address for name in ("a", "b", "c")]
    for address in addresses:
        for what in ("versions", "run folder", "clock"):
            assert re.search(rf"node {address}: {what} .* ok ", told), told
    assert re.search(r"gloo between 3 node\(s\) .* ok ", told), told
    cluster.hosts[VICTIM].cut()
    code, told = cluster.doctor(raw)
    assert code == 1 and re.search(rf"{cluster.hosts[VICTIM].address}.* wrong ", told), told
