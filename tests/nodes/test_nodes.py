"""A run over several nodes, each with a network of its own, whose cables are cut and which die: the
numbers are those of a run on one machine.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import raw_config
from tests.nodes.net import network, why_not
from tests.nodes.rig import Cluster, environment, training

pytestmark = pytest.mark.slow
# learners take 3, rollout workers 1, so that they fill a, b and c; d is for a worker that is lost
CPUS = {"a": 3, "b": 4, "c": 1, "d": 1}
SPARE = "d"
KINDS = ["store", "collective"]
STEPS = 40
START_S, RESTART_S, END_S = 120, 90, 150


def config(folder: Path, **sections: Any) -> dict[str, Any]:
    return raw_config(
        folder,
        train={"steps": STEPS},
        learner={"workers": 2, "cpus": 3, "lr": 0.005, "critic_lr": 0.005, "optimizer": "sgd"},
        rollout={"workers": 2, "group_size": 2, "max_new_tokens": 6, "chunk": 2},
        cluster={"kind": "ray", "wait_s": 60, **sections.pop("cluster", {})},
        **sections,
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of the run on one machine."""
    raw = config(tmp_path_factory.mktemp("one") / "run", cluster={"cpus": 8})
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
    if nodes.runs(SPARE):
        nodes.kill(SPARE)


@pytest.mark.parametrize("kind", KINDS)
def test_workers_on_three_nodes(
    cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]], kind: str
) -> None:
    with cluster.train(config(tmp_path / "run", transport={"kind": kind})) as run:
        run.wait(run.rows, START_S)
        assert cluster.actors() == {
            "a": {"LearnerActor": 1},
            "b": {"LearnerActor": 1, "RolloutActor": 1},
            "c": {"RolloutActor": 1},
            "d": {},
        }
        run.end(END_S)
        assert run.numbers() == expected
        assert not run.events()


@pytest.mark.parametrize(("kind", "deadline_s"), [("store", 60), ("collective", 4)])
def test_a_cable_is_cut_and_healed(
    cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]], kind: str, deadline_s: float
) -> None:
    """For less than the deadline of weights, which then come late, and for more."""
    transport = {"kind": kind, "deadline_s": deadline_s}
    with cluster.train(config(tmp_path / "run", transport=transport)) as run:
        run.wait(lambda: len(run.rows()) > 3, START_S)
        cluster.hosts["c"].cut()
        time.sleep(8)
        cluster.hosts["c"].heal()
        run.end(END_S)
        assert run.numbers() == expected
        assert bool(run.events()) == (deadline_s < 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_a_node_is_lost(
    cluster: Cluster, tmp_path: Path, expected: list[dict[str, Any]], kind: str, how: str
) -> None:
    """Its worker is started anew on a node that has joined meanwhile."""
    transport = {"kind": kind, "deadline_s": 8}
    with cluster.train(config(tmp_path / "run", transport=transport)) as run:
        run.wait(run.rows, START_S)
        cluster.start(SPARE)
        cluster.kill("c") if how == "killed" else cluster.hosts["c"].cut()
        run.wait(lambda: run.events("rollout_worker_restarted"), RESTART_S)
        assert cluster.actors()[SPARE] == {"RolloutActor": 1}
        run.end(END_S)
        assert run.numbers() == expected
