"""Ray's own autoscaler makes a cluster larger for a worker that is asked for, and smaller again
when it is gone; the machines are processes of this one.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from ppo_dist.coordinator.scale import Scale
from ppo_dist.inspect import rescale
from tests.conftest import raw_config
from tests.faults.test_interrupts import marked
from tests.nodes.rig import environment, training, wait_for

pytestmark = pytest.mark.slow
STEPS = 400
CPUS = 2  # of the head: a learner, and a rollout worker
NODE_S, IDLE_MINUTES = 120, 0.1


@dataclass(frozen=True)
class Autoscaled:
    """A cluster that begins with its head alone."""

    env: dict[str, str]
    mark: str

    def nodes(self) -> int:
        """How many there are now."""
        count = 0
        for process in marked(self.mark):
            with contextlib.suppress(psutil.Error, IndexError):
                count += "raylet/raylet" in process.cmdline()[0]
        return count


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Autoscaled]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    told = tmp_path / "cluster.json"
    told.write_text(json.dumps(settings(address)))
    mark = uuid.uuid4().hex
    env = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_FAKE_CLUSTER="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        PPO_DIST_MARK=mark,
    )
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += [f"--port={address.rpartition(':')[2]}", f"--num-cpus={CPUS}"]
    command += ["--node-ip-address=127.0.0.1", f"--autoscaling-config={told}"]
    command += ["--include-dashboard=false", "--object-store-memory=80000000"]
    log = tmp_path / "head.log"
    with log.open("wb") as out:
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        wait_for(lambda: "runtime started" in log.read_text(), 90, log.read_text)
        yield Autoscaled({**env, "RAY_ADDRESS": address}, mark)
    finally:
        for process in marked(mark):
            with contextlib.suppress(psutil.Error):
                process.kill()


def settings(address: str) -> dict[str, object]:
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands",
             "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands")  # fmt: skip
    return {
        "cluster_name": "autoscaled",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "gcs_address": address,
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": CPUS},
                "node_config": {},
                "max_workers": 0,
            },
            "another": {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 2,
            },
        },
        **{name: [] for name in lists},
    }


def test_a_node_comes_for_a_worker_and_goes_with_it(cluster: Autoscaled, tmp_path: Path) -> None:
    raw = raw_config(
        tmp_path / "run",
        train={"steps": STEPS},
        cluster={"kind": "ray", "wait_s": 60},
        rollout={"workers": 1, "chunk": 2},
        eval={"every": 0},
    )
    with training(raw, cluster.env) as run:
        run.wait(lambda: len(run.rows()) > 3, NODE_S)
        assert cluster.nodes() == 1
        rescale(run.folder, Scale(rollout_workers=2), Console(quiet=True))
        run.wait(lambda: cluster.nodes() == 2, NODE_S)
        run.wait(lambda: run.rows()[-1].get("system/rollout-1/busy_s"), NODE_S)
        rescale(run.folder, Scale(rollout_workers=1), Console(quiet=True))
        run.wait(lambda: run.events("rollout_worker_removed"), NODE_S)
        run.wait(lambda: cluster.nodes() == 1, NODE_S)
        assert not run.events("rollout_worker_failed")
