"""launch/slurm.sbatch on a real Slurm of two unequal nodes. With `-s` the jobs' logs are shown."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import TIMINGS, raw_config
from tests.launch.rig import ROOT, environment, wait_for
from tests.launch.slurm import Slurm, missing, slurm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]
STEPS = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        slurm(Path(folder), (2, 3)) as made,
    ):
        yield made


def written(folder: Path, steps: int = STEPS, **sections: Any) -> Path:
    raw = raw_config(
        folder / "run",
        train={"steps": steps, "checkpoint_every": 5},
        cluster={"kind": "ray", "wait_s": 120},
        **sections,
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def submitted(cluster: Slurm, config: Path, *options: str) -> str:
    """The number of a job, whose submission directory is the config's."""
    script = ROOT / "launch" / "slurm.sbatch"
    return cluster.command("sbatch", "--parsable", *options, script, config, cwd=config.parent)


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in found]


def left_of(job: str) -> list[str]:
    """Command lines of processes that belong to a job's Ray, and what its folder has."""
    folder = Path(f"/tmp/ray-{job}")
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    return [line for line in (*lines, *map(str, folder.glob("*"))) if str(folder) in line]


def test_preempted_thrice_it_equals_an_uninterrupted_run(cluster: Slurm, tmp_path: Path) -> None:
    """With a warning to its script, as before a time limit, with one to its steps alone, as of a
    GraceTime, and without.
    """
    config = written(tmp_path)
    job = submitted(cluster, config, "--nodes=2", "--exclusive")
    log = tmp_path / f"slurm-{job}.out"

    def why() -> str:
        return log.read_text() if log.exists() else str(cluster.job(job))

    def further(steps: int) -> bool:
        assert cluster.job(job)["JobState"] in ("RUNNING", "PENDING", "COMPLETING"), why()
        return len(rows(tmp_path)) >= steps

    def warned(*words: str) -> None:
        done, restarts = len(rows(tmp_path)), int(cluster.job(job)["Restarts"]) + 1
        wait_for(lambda: further(done + 4), 180, why)
        assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() not in log.read_text()
        cluster.command("scancel", *words, job)
        wait_for(lambda: cluster.job(job)["Restarts"] == str(restarts), 60, why)
        events = (tmp_path / "run" / "events.jsonl").read_text()
        assert events.count('"interrupted"') == restarts and len(rows(tmp_path)) < STEPS
        wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", 60, why)
        assert not token.exists() and not left_of(job)

    token = tmp_path / f".slurm-{job}.token"
    warned("--batch", "--signal=TERM")
    warned("--signal=TERM")
    done = len(rows(tmp_path))
    wait_for(lambda: further(done + 7), 180, why)
    cluster.command("scontrol", "requeue", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "3", 60, why)
    wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED", 240, why)
    print(why())
    assert cluster.job(job)["ExitCode"] == "0:0"
    assert not token.exists() and not left_of(job)

    alone = tmp_path / "alone"
    alone.mkdir()
    result = subprocess.run(
        ["ppo-dist", "train", str(written(alone))],
        env=environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in rows(alone)] == list(range(STEPS + 1))
    assert rows(tmp_path) == rows(alone)


def test_of_several_components_it_has_all_nodes(cluster: Slurm, tmp_path: Path) -> None:
    """Five workers have room on both of them alone; it is requeued as a whole."""
    config = written(tmp_path, rollout={"workers": 4})
    components = ["--nodes=1", "--cpus-per-task=2", ":", "--nodes=1", "--cpus-per-task=3"]
    job = submitted(cluster, config, *components)
    wait_for(lambda: len(rows(tmp_path)) > 4, 240)
    cluster.command("scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 60)
    wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED", 240)
    print((tmp_path / f"slurm-{job}.out").read_text())
    assert [row["step"] for row in rows(tmp_path)] == list(range(STEPS + 1))
    assert not left_of(job)


def test_before_its_time_limit_it_writes_a_checkpoint(cluster: Slurm, tmp_path: Path) -> None:
    config = written(tmp_path, steps=100_000)
    job = submitted(cluster, config, "--cpus-per-task=2", "--time=3", "--signal=B:TERM@60")
    log = tmp_path / f"slurm-{job}.out"
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 240, log.read_text)
    cluster.command("scancel", job)
    print(log.read_text())
    (event,) = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    assert event["event"] == "interrupted" and event["step"] == rows(tmp_path)[-1]["step"] > 0
    assert f"step-{event['step']:08}" in {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert "requeued: the next start goes on" in log.read_text()
    assert "DUE TO TIME LIMIT" not in log.read_text()


def test_a_job_of_another_partition_preempts_it(cluster: Slurm, tmp_path: Path) -> None:
    """Within the GraceTime it writes a checkpoint; when the other one is done it goes on."""
    job = submitted(cluster, written(tmp_path), "--nodes=2", "--exclusive")
    wait_for(lambda: len(rows(tmp_path)) > 4, 240)
    other = ["--partition=first", "--nodes=2", "--exclusive", f"--output={tmp_path}/other"]
    cluster.command("sbatch", *other, "--wrap=date")
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", 90)
    wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED", 240)
    print((tmp_path / f"slurm-{job}.out").read_text())
    events = [json.loads(e) for e in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["interrupted", "resumed"]
    assert (tmp_path / "other").read_text(), "it had the nodes"
    assert [row["step"] for row in rows(tmp_path)] == list(range(STEPS + 1))


def test_its_exit_code_is_the_runs(cluster: Slurm, tmp_path: Path) -> None:
    """On one node, and it is not tried again."""
    job = submitted(cluster, written(tmp_path, data={"labelled": "nowhere.jsonl"}))
    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", 240)
    found = cluster.job(job)
    assert found["ExitCode"] == "2:0" and found["Restarts"] == "0"
    said = (tmp_path / f"slurm-{job}.out").read_text()
    print(said)
    assert "nowhere.jsonl" in said
    assert not left_of(job)


def test_cancelled_it_stays_so(cluster: Slurm, tmp_path: Path) -> None:
    job = submitted(cluster, written(tmp_path), "--cpus-per-task=2")
    wait_for(lambda: len(rows(tmp_path)) > 1, 240)
    cluster.command("scancel", job)
    wait_for(lambda: not cluster.command("squeue", "--noheader"), 60)
    found = cluster.job(job)
    assert found["JobState"] == "CANCELLED" and found["Restarts"] == "0"
    assert not left_of(job)
