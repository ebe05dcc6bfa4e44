"""Who sees which GPUs, on clusters of 1, 2 and 4 nodes that say they have some."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import raw_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
TENSOR_PARALLEL = {"engine": {"kind": "vllm", "tensor_parallel": 2}, "cpus": 1}


def seen(
    folder: Path, nodes: int, gpus: int, raw: dict[str, Any], *more: str
) -> tuple[list[Any], list[Any]]:
    """(node, GPUs) of every learner and of every rollout worker."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "tests.ray.fake_cluster", str(nodes), str(gpus), str(path)]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "error" not in found, found["error"]
    return tuple(
        [(node, tuple(own.split(","))) for node, own in found[kind]]
        for kind in ("learners", "rollouts")
    )  # type: ignore[return-value]


@pytest.mark.parametrize(("nodes", "gpus"), [(2, 4), (1, 8), (4, 2)])
def test_split_workers_share_no_gpu(tmp_path: Path, nodes: int, gpus: int) -> None:
    raw = raw_config(
        tmp_path,
        cluster={"kind": "ray"},
        learner={"workers": 4},
        rollout={"workers": 2, **TENSOR_PARALLEL},
    )
    learners, rollouts = seen(tmp_path, nodes, gpus, raw)
    assert [len(own) for _, own in learners] == [1] * 4
    assert [len(own) for _, own in rollouts] == [2] * 2, "both halves on one node"
    taken = Counter((node, gpu) for node, own in learners + rollouts for gpu in own)
    assert len(taken) == nodes * gpus and set(taken.values()) == {1}
    on = [node for node, _ in learners]
    assert on == sorted(on), "neighbouring ranks stand together"


@pytest.mark.parametrize(("nodes", "gpus"), [(2, 4), (4, 2)])
def test_colocated_workers_stand_with_their_learners(tmp_path: Path, nodes: int, gpus: int) -> None:
    raw = raw_config(
        tmp_path,
        cluster={"kind": "ray", "placement": "colocated"},
        learner={"workers": 8},
        rollout={"workers": 4, **TENSOR_PARALLEL},
    )
    learners, rollouts = seen(tmp_path, nodes, gpus, raw)
    taken = Counter((node, gpu) for node, own in learners for gpu in own)
    assert len(taken) == nodes * gpus and set(taken.values()) == {1}
    assert Counter(node for node, _ in rollouts) == Counter(
        {node: gpus // 2 for node, _ in learners}
    )


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (2, 4), (4, 2)])
def test_a_colocated_rollout_worker_sees_the_gpus_of_its_learners(
    tmp_path: Path, nodes: int, gpus: int
) -> None:
    """The workers themselves; each rollout worker with two learners that are neighbours."""
    pairs = nodes * gpus // 2
    raw = raw_config(
        tmp_path,
        cluster={"kind": "ray", "placement": "colocated"},
        learner={"workers": 2 * pairs},
        rollout={"workers": pairs, **TENSOR_PARALLEL},
    )
    learners, rollouts = seen(tmp_path, nodes, gpus, raw, "actors")
    assert len({node for node, _ in rollouts}) == nodes
    owned = {
        (node, *sorted(one + two))
        for (node, one), (_, two) in zip(learners[::2], learners[1::2], strict=True)
    }
    assert owned == {(node, *sorted(borrowed)) for node, borrowed in rollouts}
    assert len(owned) == pairs
