"""The cluster configs: each loads, and has its place on the cluster that it is for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ppo_dist.cluster.layout import Node, layout
from ppo_dist.config import InputError
from ppo_dist.config.load import load

CONFIGS = Path(__file__).parent.parent.parent / "configs"
NODE = Node(cpus=96, gpus=8)
CLUSTERS = {
    "gpu1": [Node(cpus=8, gpus=1)],
    "gpu8": [NODE],
    "gpu32_7b": [NODE] * 4,
    "gpu32_7b_lora": [NODE] * 4,
    "gpu64_70b": [NODE] * 8,
}


def test_each_has_a_cluster_here() -> None:
    assert {path.stem for path in (CONFIGS / "cluster").glob("*.yaml")} == CLUSTERS.keys()


@pytest.mark.parametrize("name", CLUSTERS)
def test_it_takes_all_gpus_of_its_cluster_and_no_fewer(name: str) -> None:
    config, nodes = load(CONFIGS / "cluster" / f"{name}.yaml"), CLUSTERS[name]
    made = layout(config, nodes)
    taken = sum(bundle.get("GPU", 0.0) for bundle in made.bundles)
    assert taken == sum(node.gpus for node in nodes) and made.device == "cuda"
    assert len(made.learners) == config.learner.workers
    assert len(made.rollouts) == config.rollout.workers
    with pytest.raises(InputError):
        layout(config, [*nodes[1:], Node(cpus=96, gpus=nodes[0].gpus - 1)])


def test_tensor_parallel_workers_stand_on_one_node() -> None:
    made = layout(load(CONFIGS / "cluster" / "gpu64_70b.yaml"), CLUSTERS["gpu64_70b"])
    assert Counter(made.bundles[slot.bundle]["GPU"] for slot in made.rollouts) == {4.0: 8}
