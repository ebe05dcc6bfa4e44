"""launch/slurm.sbatch with other programs in the place of Slurm's, Ray's and ours: what it passes
on, when it is requeued, and what it leaves behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.rig import ROOT, environment, wait_for

PROGRAMS = {
    # a step is a group of processes; SIGTERM to srun itself ends them
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        [ "$1" != rm ] || echo "$@" >> "$AT/removed"
        setsid "$@" & step=$!
        echo $step >> "$AT/steps"
        trap 'kill -KILL -- -$step' TERM
        wait $step""",
    "scontrol": """
        case "$1 $2" in
          "show hostnames") echo n1; [ "$SLURM_JOB_NUM_NODES" -eq 1 ] || echo n2 ;;
          "show job") echo "JobState=$STATE" ;;
          *) echo "$1 $2" >> "$AT/requeued" ;;
        esac""",
    "ray": '[ ! -f "$AT/head-is-gone" ]',
    "ppo-dist": """
        echo "$@" >> "$AT/trained"
        trap 'echo TERM >> "$AT/told"; sleep 1; kill -0 $(cat "$AT/head") && exit 130' TERM
        [ -z "$CODE" ] || exit "$CODE"
        for _ in {1..300}; do sleep 0.1; done""",
    "project/launch/ray_head.sh": 'echo $$ > "$AT/head"; mkdir -p /tmp/ray-$SLURM_JOB_ID; sleep 30',
    "project/launch/ray_worker.sh": "sleep 30",
}
RAY = "def init(**_): ...\ndef nodes(): return [{'Alive': True}] * 2\n"


class Job:
    """A job whose run ends with a code; with an empty one when it is told to."""

    def __init__(self, folder: Path, code: str = "", state: str = "RUNNING", nodes: int = 1):
        self.at, self.number = folder, str(os.getpid())
        launch = folder / "project" / "launch"
        launch.mkdir(parents=True)
        for name, text in PROGRAMS.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        for name in ("setup.sh", "ray.sh"):
            shutil.copy(ROOT / "launch" / name, launch / name)
        (folder / "ray.py").write_text(RAY)
        env = environment(folder / "home")
        self.env = env | {
            "PATH": f"{folder}:{env['PATH']}",
            "PYTHONPATH": str(folder),
            "PPO_DIST_ROOT": str(folder / "project"),
            "SLURM_JOB_ID": self.number,
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURMD_NODENAME": "n1",
            "SLURM_SUBMIT_DIR": str(folder),
            "AT": str(folder),
            "CODE": code,
            "STATE": state,
        }

    def start(self) -> subprocess.Popen[bytes]:
        script = ROOT / "launch" / "slurm.sbatch"
        return subprocess.Popen(["bash", script, "c.yaml"], env=self.env, cwd=self.at)

    def end(self) -> int:
        return self.start().wait(30)

    def lines(self, name: str) -> list[str]:
        path = self.at / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def was_requeued(self) -> bool:
        return self.lines("requeued") == [f"requeue {self.number}"]

    @property
    def failures(self) -> Path:
        return self.at / f".slurm-{self.number}.failures"


@pytest.mark.parametrize(
    ("code", "failures", "state", "is_requeued"),
    [
        ("0", 0, "RUNNING", False),
        ("2", 0, "RUNNING", False),
        ("3", 0, "RUNNING", False),
        ("1", 0, "RUNNING", True),
        ("1", 2, "RUNNING", True),
        ("1", 3, "RUNNING", False),
        ("137", 0, "RUNNING", True),
        ("130", 3, "RUNNING", True),
        ("130", 0, "CANCELLED", False),
    ],
)
def test_when_it_is_requeued(
    tmp_path: Path, code: str, failures: int, state: str, is_requeued: bool
) -> None:
    job = Job(tmp_path, code, state)
    job.failures.write_text("1\n" * failures)
    assert job.end() == int(code)
    assert job.lines("trained") == ["train c.yaml --resume"]
    assert job.was_requeued == is_requeued
    if state == "RUNNING":
        assert job.failures.exists() == is_requeued


def test_a_head_that_does_not_start_is_a_failure_as_well(tmp_path: Path) -> None:
    job = Job(tmp_path)
    (tmp_path / "head-is-gone").touch()
    (tmp_path / "project/launch/ray_head.sh").write_text("#!/bin/sh\nexit 1\n")
    assert job.end() == 1
    assert job.was_requeued and not job.lines("trained")


@pytest.mark.parametrize("to", ["script", "steps", "both"])
def test_a_run_is_told_once_and_ray_outlives_it(tmp_path: Path, to: str) -> None:
    """A preemption may signal the script, all its steps, or first the one and then the others."""
    job = Job(tmp_path, nodes=2)
    process = job.start()
    wait_for(lambda: bool(job.lines("trained")), 20)
    if to != "steps":
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: bool(job.lines("told")), 5)
    if to != "script":
        assert len(job.lines("steps")) == 3
        for number in job.lines("steps"):
            os.killpg(int(number), signal.SIGTERM)
    assert process.wait(30) == 130
    assert job.lines("told") == ["TERM"] and job.was_requeued
    scratch = f"/tmp/ray-{job.number}"
    assert not Path(scratch).exists() and not list(tmp_path.glob(".slurm-*"))
    assert job.lines("removed") == [f"rm -rf {scratch}"], "on the other node"
