"""Prints, as JSON, which node and GPUs every worker of a config gets on a cluster of nodes that
only say that they have GPUs.

    python -m tests.ray.fake_cluster NODES GPUS_OF_EACH CONFIG.yaml [actors]

With `actors` they are the workers themselves, which have loaded nothing yet; without, small ones in
their places.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from ppo_dist import build
from ppo_dist.cluster.groups import place
from ppo_dist.cluster.layout import layout
from ppo_dist.cluster.session import Places, nodes, reserved
from ppo_dist.config import Config, InputError
from ppo_dist.config.load import load

CPUS = 16


def where(_: Any = None) -> tuple[str, str]:
    return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


class Seat:
    def where(self) -> tuple[str, str]:
        return where()


def small(places: Places) -> list[Any]:
    made = [ray.remote(Seat).options(**place(places, slot)).remote() for slot in places.slots]
    return [list(found) for found in ray.get([seat.where.remote() for seat in made])]


def actors(config: Config) -> dict[str, Any]:
    with build.connected(config, "none") as (ranks, remote, _):
        found = {
            "learners": [a.__ray_call__.remote(where) for a in ranks._actors],
            "rollouts": [w._actor.__ray_call__.remote(where) for w in remote],
        }
        return {kind: [list(each) for each in ray.get(refs)] for kind, refs in found.items()}


def main(count: int, gpus: int, path: Path, has_actors: bool) -> dict[str, Any]:
    config = load(path)
    cluster = Cluster()
    for _ in range(count):
        cluster.add_node(num_cpus=CPUS, num_gpus=gpus, include_dashboard=False)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        if has_actors:
            return actors(config)
        with reserved(config, layout(config, nodes())) as (learners, rollouts, _):
            return {"learners": small(learners), "rollouts": small(rollouts)}
    except InputError as error:
        return {"error": str(error)}
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    count, gpus, path, *rest = sys.argv[1:]
    print(json.dumps(main(int(count), int(gpus), Path(path), bool(rest))))
