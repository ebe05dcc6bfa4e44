"""Signals at the worst moment: a checkpoint, exit code 130, and a run that goes on as if nothing
had been; or no chance to do anything, and the same.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ppo_dist.coordinator.evaluate import Evaluator
from ppo_dist.coordinator.state import Checkpoints
from ppo_dist.learner.worker import LearnerWorker
from ppo_dist.rewards.rules import ByOrigin
from ppo_dist.rollout.worker import RolloutWorker
from ppo_dist.tracking.local import JsonLines, read_rows
from tests.e2e.test_run import config, numbers, run
from tests.faults.test_checkpoints import raw, when

pytestmark = pytest.mark.slow
STEPS = 4
RAY = {"kind": "ray", "cpus": 4}
TWO_AHEAD = {"cluster": RAY, "learner": {"workers": 2}, "stream": {"max_lag": 1}}
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
PHASES = {
    "loading": (LearnerWorker, "__init__", 1, 0),
    "first evaluation": (Evaluator, "__call__", 1, 0),
    "generate": (RolloutWorker, "timed", 9, None),
    "score": (ByOrigin, "score", 5, None),
    "annotate": (LearnerWorker, "annotate", 3, None),
    "update": (LearnerWorker, "update", 3, 3),
    "publish": (LearnerWorker, "publish", 4, None),
    "evaluation": (Evaluator, "__call__", 3, 2),
    "checkpoint": (LearnerWorker, "save_checkpoint", 2, 2),
    "log": (JsonLines, "log", 3, 2),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(config(folder, STEPS)) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, number: int
) -> None:
    owner, name, call, step = PHASES[phase]
    made = config(tmp_path, STEPS, train={"checkpoint_every": 1})
    with monkeypatch.context() as patched:
        when(patched, owner, name, call, lambda: os.kill(os.getpid(), number))
        assert run(made) == 130
    rows = numbers(tmp_path)
    newest, problems = Checkpoints(tmp_path, 2).newest_whole()
    assert problems == [] and (newest is None) == (step == 0)
    if newest is not None:
        assert newest.name == f"step-{rows[-1]['step']:08d}" and rows[-1]["step"] < STEPS
        assert step is None or rows[-1]["step"] == step
    assert read_rows(tmp_path / "events.jsonl")[-1]["event"] == "interrupted"
    assert run(made, resume=True) == 0
    assert resumed_at(tmp_path) == ([] if newest is None else [rows[-1]["step"]])
    assert numbers(tmp_path) == numbers(whole)


def resumed_at(folder: Path) -> list[int]:
    """Steps that a run has gone on from."""
    path = folder / "events.jsonl"
    return [e["step"] for e in read_rows(path) if e["event"] == "resumed"] if path.exists() else []


CHILD = """
import importlib, os, signal, sys

def dies(module, owner, name, call, after, of=""):
    at = importlib.import_module(module)
    at = vars(at)[owner] if owner else at
    original, calls = vars(at)[name], 0
    def wrapped(*args, **kwargs):
        nonlocal calls
        if of not in str(args[0]):
            return original(*args, **kwargs)
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        made = original(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return made
    setattr(at, name, wrapped)

from ppo_dist.cli import main
*moment, command = MOMENT
dies(*moment)
sys.exit(main(command))
"""
# (module, class, method, its call, whether right after it), perhaps what its first argument has in
# it, and the step that the run goes on from; calls count from 1
DEATHS: dict[str, tuple[tuple[Any, ...], int]] = {
    "in a step": (("ppo_dist.learner.worker", "LearnerWorker", "update", 3, False), 2),
    # the first step is supervised: its checkpoint has no critic
    "within the shards": (("ppo_dist.learner.engine", "ZeroEngine", "save", 2, True), 1),
    "before the manifest": (("ppo_dist.files", None, "_seal", 2, False), 1),
    "before its name": (("ppo_dist.files", None, "_seal", 2, True), 1),
    "before a removal": (("ppo_dist.files", None, "remove", 1, False), 2),
    # after calls for what may be left under that name, before it is written and before it goes
    "within a removal": (("shutil", None, "rmtree", 3, False, ".step-00000001.writing"), 2),
    "before the row": (("ppo_dist.tracking.local", "JsonLines", "log", 3, False), 1),
    "in the final policy": (("ppo_dist.run", None, "_finish", 1, False), STEPS),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    path = written(folder)
    assert subprocess.run([sys.executable, "-m", "ppo_dist", "train", str(path)]).returncode == 0
    return folder


def written(folder: Path, **sections: Any) -> Path:
    """A config, beside the run folder, that keeps one checkpoint."""
    keys = {"steps": STEPS, "checkpoint_every": 1, "keep_checkpoints": 1}
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(raw(folder, **{"train": keys, **sections})))
    return path


@pytest.mark.parametrize("death", DEATHS)
def test_a_sudden_end(uninterrupted: Path, tmp_path: Path, death: str) -> None:
    check_sudden_end(uninterrupted, tmp_path / "run", death)


def check_sudden_end(uninterrupted: Path, folder: Path, death: str, **sections: Any) -> None:
    path = written(folder, **sections)
    moment, step = DEATHS[death]
    code = CHILD.replace("MOMENT", repr((*moment, ["train", str(path)])))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    command = [sys.executable, "-m", "ppo_dist", "train", str(path), "--resume"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "skipped a checkpoint" not in again.stdout
    assert resumed_at(folder) == [step], "no more is lost than the work since the last checkpoint"
    assert numbers(folder) == numbers(uninterrupted)
    hidden = {p.name for p in folder.rglob(".*")}
    assert hidden == {".lock"}, "nothing half is left"


@pytest.fixture(scope="module")
def uninterrupted_on_ray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    path = written(folder, **TWO_AHEAD)
    assert subprocess.run([sys.executable, "-m", "ppo_dist", "train", str(path)]).returncode == 0
    return folder


@pytest.mark.parametrize("death", ["before the manifest", "before its name", "before the row"])
def test_a_sudden_end_on_ray(uninterrupted_on_ray: Path, tmp_path: Path, death: str) -> None:
    """With two learners, and responses on their way."""
    check_sudden_end(uninterrupted_on_ray, tmp_path / "run", death, **TWO_AHEAD)


# ── with processes of Ray ─────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def on_ray(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A long run in a session of its own, and a mark that all its processes inherit."""
    mark = uuid.uuid4().hex
    path = written(folder, cluster=RAY, rollout={"workers": 2})
    process = subprocess.Popen(
        [sys.executable, "-m", "ppo_dist", "train", str(path), "train.steps=200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PPO_DIST_MARK": mark},
        start_new_session=True,
    )
    try:
        yield process, mark
    finally:
        for left in marked(mark):
            with contextlib.suppress(psutil.Error):
                left.kill()
        process.wait()


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("PPO_DIST_MARK") == mark and process.status() != "zombie":
                found.append(process)
    return found


def gone(mark: str) -> list[str]:
    """Names of the processes that are still there after 90 s: Ray's agents try for 60 s to tell a
    dead GCS that their raylet has died.
    """
    end = time.monotonic() + 90
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.5)
    return [" ".join(p.cmdline())[:80] for p in left]


def wait_for(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > step):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, uninterrupted, for as long as is needed."""
    folder = tmp_path_factory.mktemp("long") / "run"
    path = written(folder, cluster=RAY, rollout={"workers": 2})
    command = [sys.executable, "-m", "ppo_dist", "train", str(path), "train.steps=40"]
    assert subprocess.run(command).returncode == 0
    return folder


@pytest.mark.parametrize("how", ["killed", "told", "told twice", "from the keyboard"])
def test_no_process_outlives_a_run_on_ray(long: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    with on_ray(folder) as (process, mark):
        wait_for(folder, 3, process)
        assert len(marked(mark)) > 5
        match how:
            case "killed":
                process.kill()
            case "told":
                process.terminate()
            case "told twice":
                process.terminate()
                time.sleep(0.2)
                process.terminate()
            case "from the keyboard":  # the terminal tells all of them
                os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)
        if how in ("told", "from the keyboard"):
            assert process.returncode == 130 and "--resume" in said, said
            assert "Traceback" not in said
        assert gone(mark) == []
    rows = numbers(folder)
    steps = rows[-1]["step"] + 1
    path = folder.with_name("run.yaml")
    command = [sys.executable, "-m", "ppo_dist", "train", str(path), f"train.steps={steps}"]
    assert subprocess.run([*command, "--resume"]).returncode == 0
    again = numbers(folder)
    assert again[-1]["step"] == steps and steps < 40
    assert resumed_at(folder)[0] >= steps - 2, "a step, and its checkpoint"
    assert again == numbers(long)[: steps + 1]


def test_a_ray_of_its_own_is_reached_from_this_machine_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with on_ray(folder) as (process, mark):
        wait_for(folder, 1, process)
        listening = {
            (own.laddr.ip, own.laddr.port)
            for each in marked(mark)
            if "LearnerActor" not in each.cmdline()[0]  # torch's rendezvous listens everywhere
            for own in each.net_connections(kind="inet")
            if own.status == psutil.CONN_LISTEN
        }
    assert listening and {ip for ip, _ in listening} <= LOOPBACK, listening
