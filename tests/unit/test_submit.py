"""What is sent to a cluster, what is refused before, and how a job's end is understood."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ppo_dist import follow
from ppo_dist import submit as module
from ppo_dist.cli import main
from ppo_dist.config import Config
from ppo_dist.follow import LAST_WORD, Follower, exit_code
from ppo_dist.submit import Submission, _entrypoint
from tests.conftest import raw_config

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw_config(tmp_path / "run")))
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rollout.wokers=2"], ["rollout.wokers", "rollout.workers"]),
        (["run.dir=runs/mine"], ["run.dir runs/mine", "absolute"]),
        (["--working-dir", "nowhere"], ["nowhere", "no such working directory"]),
        (["--working-dir", "/usr/lib"], ["tiny.yaml", "not inside", "/usr/lib"]),
        (["--env", "NO_SUCH"], ["NO_SUCH", "not set"]),
        (["--env", "KEY=secret"], ["--env takes names"]),
        (["model={path: ./some}"], ["model.path ./some", "absolute"]),
        (["--address", "10.0.0.5:8265"], ["10.0.0.5:8265", "http://"]),
        (["--address", "http://10.0.0.5:82x65"], ["10.0.0.5:82x65", "is written"]),
        ([], [NOBODY, "no Ray job server", "refused"]),
    ],
)
def test_refused_in_one_line(
    path: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", NOBODY)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    there = [] if "--working-dir" in arguments else ["--working-dir", str(path.parent)]
    assert main(["submit", str(path), *there, *arguments]) == 2
    said = capsys.readouterr()
    [line] = said.err.strip().splitlines()
    assert all(word in line for word in words) and "secret" not in line
    assert said.out == ""


@pytest.mark.parametrize(
    ("driver", "message", "log", "expected"),
    [
        (0, "Job finished successfully.", "", 0),
        (3, "Job entrypoint command failed with exit code 3, …", "", 3),
        (None, "Job entrypoint command failed with exit code 2, logs:\nexit code 5", "", 2),
        (None, "Job entrypoint command failed with exit code -9. No logs.", "", -9),
        (None, "Job was intentionally stopped.", f"exit code 1\n{LAST_WORD}130\n", 130),
        (None, "Job was intentionally stopped.", "step 3 of 10\n", None),
        (None, None, f"{LAST_WORD}2\n{LAST_WORD}130\n", 130),
        (None, "runtime_env setup failed: exit code 1", "", None),
    ],
)
def test_exit_code(driver: int | None, message: str | None, log: str, expected: int | None) -> None:
    assert exit_code(driver, message, log) == expected


def submission(path: Path, overrides: list[str]) -> Submission:
    return Submission(path, overrides, True, NOBODY, path.parent, [], None, None, None, 600)


def test_its_shell_outlives_a_stop_and_tells_how_the_run_ended(path: Path, tmp_path: Path) -> None:
    """Ray sends the signal to the shell and to the run."""
    program = tmp_path / "bin" / "ppo-dist"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        "import signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.5)\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint(sys.argv[1:], flush=True)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    made = submission(path, ["run.dir=/a b/c", "data.columns={prompt: q}"])
    raw = raw_config(tmp_path / "run")
    entrypoint = _entrypoint(made, Config.model_validate(raw))
    process = subprocess.Popen(
        entrypoint,
        shell=True,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"},
    )
    assert process.stdout
    words = ["train", "tiny.yaml", "run.dir=/a b/c", "data.columns={prompt: q}", "--resume"]
    assert process.stdout.readline().strip() == str(words)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(10) == 130
    assert process.stdout.read() == f"{LAST_WORD}130\n"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is given to Ray's client, job by job."""
    jobs: list[dict[str, Any]] = []

    def submit_job(**arguments: Any) -> str:
        jobs.append(arguments)
        return "job-1"

    @contextlib.contextmanager
    def connected(address: str) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(submit_job=submit_job)

    monkeypatch.setattr(module, "_connected", connected)
    return jobs


@pytest.mark.parametrize(
    ("options", "cpus", "gpus", "memory"),
    [
        ([], None, None, None),
        (["--entrypoint-cpus=2", "--entrypoint-gpus=0.5"], 2.0, 0.5, None),
        (["--entrypoint-memory", "1.5"], None, None, 1_500_000_000),
    ],
)
def test_its_resources_reach_the_job(
    path: Path,
    sent: list[dict[str, Any]],
    options: list[str],
    cpus: float | None,
    gpus: float | None,
    memory: int | None,
) -> None:
    assert main(["submit", str(path), "--working-dir", str(path.parent), *options]) == 0
    [job] = sent
    assert (job["entrypoint_num_cpus"], job["entrypoint_num_gpus"]) == (cpus, gpus)
    assert job["entrypoint_memory"] == memory and type(job["entrypoint_memory"]) is type(memory)


@pytest.mark.parametrize(
    ("package", "there", "is_refused"),
    [
        ("", "", False),
        ("torch", "2.13.0+cu130", False),
        ("torch", "2.9.0", True),
        ("ray", "2.59.0", True),
        ("transformers", "4.0.0", True),
        ("ppo_dist", "0.0.9", True),
    ],
)
def test_a_cluster_of_other_versions_refuses_the_run(
    path: Path,
    sent: list[dict[str, Any]],
    package: str,
    there: str,
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = dict.fromkeys(module.PINNED, "0.1.0") | {"torch": "2.13.0+cpu"}
    monkeypatch.setattr(module, "version", own.__getitem__)
    assert main(["submit", str(path), "--working-dir", str(path.parent)]) == 0
    [job] = sent
    for name in (module.SENT_WITH, "RAY_JOB_STOP_WAIT_TIME_S"):
        monkeypatch.setenv(name, job["runtime_env"]["env_vars"][name])
    monkeypatch.setattr(module, "version", (own | {package: there}).__getitem__)
    capsys.readouterr()
    assert main(["train", str(path), "data.labelled=nowhere.jsonl"]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    if is_refused:
        assert f"{package} {own[package].split('+')[0]}" in line and f"{package} {there}" in line
    else:
        assert "nowhere.jsonl" in line


class Broken:
    """A client whose connection breaks once in the middle of the log, and once for good."""

    def __init__(self, breaks: int) -> None:
        self.breaks = breaks

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for number, text in enumerate(["one\n", "two\nthr", f"ee\n{LAST_WORD}130\n"]):
            if number == 2 and self.breaks:
                self.breaks -= 1
                raise ConnectionError("gone")
            yield text

    def get_job_info(self, job: str) -> SimpleNamespace:
        status = SimpleNamespace(is_terminal=lambda: True, value="STOPPED")
        return SimpleNamespace(status=status, driver_exit_code=None, message="stopped")


@pytest.mark.parametrize(("breaks", "code"), [(0, 130), (2, 130), (99, 1)])
def test_a_log_is_taken_up_where_it_broke(
    breaks: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "PAUSE_S", 0.01)
    monkeypatch.setattr(follow, "PATIENCE_S", 1.0)
    begin = time.monotonic()
    assert Follower(Broken(breaks), "job-1", NOBODY).to_the_end() == code
    assert time.monotonic() - begin < 5
    said = capsys.readouterr()
    assert said.out.startswith("one\ntwo\nthr")
    if code == 130:
        assert said.out == f"one\ntwo\nthree\n{LAST_WORD}130\n"
    else:
        assert "lost sight of job-1: gone" in said.err and "ray job logs" in said.out


class Silent(Broken):
    """A client whose connection dies in the middle of the log, and does not say so."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "one\n"
        if self.breaks:
            self.breaks -= 1
            await asyncio.sleep(60)
        yield f"two\n{LAST_WORD}130\n"

    def get_job_info(self, job: str) -> SimpleNamespace:
        found = super().get_job_info(job)
        return SimpleNamespace(**vars(found) | {"status": RUNNING} if self.breaks else vars(found))


RUNNING = SimpleNamespace(is_terminal=lambda: False, value="RUNNING")


def test_a_connection_that_dies_without_a_word_is_made_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "SILENCE_S", 0.2)
    monkeypatch.setattr(follow, "PAUSE_S", 0.01)
    assert Follower(Silent(2), "job-1", NOBODY).to_the_end() == 130
    assert capsys.readouterr().out == f"one\ntwo\n{LAST_WORD}130\n"


class Interrupted:
    """A client at whose log somebody presses Ctrl-C so many times before its end."""

    def __init__(self, times: int, refuses: bool) -> None:
        self.times, self.refuses = times, refuses
        self.stopped: list[str] = []

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "step 1\n"
        if self.times:
            self.times -= 1
            raise KeyboardInterrupt
        yield f"{LAST_WORD}0\n"

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)
        if self.refuses:
            raise RuntimeError("it is gone")

    def get_job_info(self, job: str) -> SimpleNamespace:
        status = SimpleNamespace(is_terminal=lambda: True, value="SUCCEEDED")
        return SimpleNamespace(status=status, driver_exit_code=0, message="done")


@pytest.mark.parametrize(
    ("answer", "times", "refuses", "code", "stopped", "words"),
    [
        ("n", 1, False, 130, [], "ray job stop"),
        ("", 1, False, 130, [], "ray job stop"),
        (None, 1, False, 130, [], "ray job stop"),
        ("y", 1, False, 0, ["job-1"], "stopping after a checkpoint"),
        ("y", 1, True, 0, ["job-1"], "job-1 was not stopped: it is gone"),
        ("y", 2, False, 130, ["job-1"], "ray job stop"),
    ],
)
def test_ctrl_c(
    answer: str | None,
    times: int,
    refuses: bool,
    code: int,
    stopped: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without a terminal (None) nobody is asked, and the run is left alone."""
    asked: list[str] = []

    def ask(question: str) -> str:
        asked.append(question)
        return answer or ""

    monkeypatch.setattr(follow.sys, "stdin", SimpleNamespace(isatty=lambda: answer is not None))
    monkeypatch.setattr("builtins.input", ask)
    client = Interrupted(times, refuses)
    assert Follower(client, "job-1", NOBODY).to_the_end() == code
    assert client.stopped == stopped and len(asked) == (answer is not None)
    said = capsys.readouterr()
    assert words in said.out + said.err
    assert said.out.count("step 1\n") == 1
