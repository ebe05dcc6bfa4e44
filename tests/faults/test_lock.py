"""One run in a folder at a time, whatever becomes of the one that has it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from ppo_dist.config import InputError
from ppo_dist.lock import LOCK, only_run
from tests.conftest import raw_config

CODE = """
import sys, time
from pathlib import Path
from ppo_dist.config import InputError
from ppo_dist.lock import only_run

time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
try:
    with only_run(Path(sys.argv[1])):
        print("has it", flush=True)
        sys.stdin.read()
except InputError as error:
    print(error)
    sys.exit(2)
"""


def contender(folder: Path, at: float = 0.0) -> subprocess.Popen[str]:
    """A process that takes the folder, as soon as it is that late, until its input ends."""
    command = [sys.executable, "-c", CODE, str(folder), str(at)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_second_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = contender(folder)
    assert first.stdout is not None and first.stdout.readline() == "has it\n"
    with pytest.raises(InputError) as error, only_run(folder):
        pass
    assert str(error.value) == (
        f"{folder} is in use by another run (host {socket.gethostname()}, process {first.pid}): "
        "wait for its end, or choose another run.dir"
    )
    first.send_signal(signal.SIGKILL)
    first.wait()
    with only_run(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()


def test_of_those_that_come_at_the_same_moment_one_gets_it(tmp_path: Path) -> None:
    at = time.time() + 2.0
    started = [contender(tmp_path / "run", at) for _ in range(4)]
    said = [p.stdout.readline() for p in started if p.stdout is not None]
    winner = started[said.index("has it\n")]
    assert said.count("has it\n") == 1
    for process, line in zip(started, said, strict=True):
        process.communicate("")
        if process is winner:
            assert process.returncode == 0
        else:
            assert process.returncode == 2 and f"process {winner.pid})" in line


def test_processes_that_a_run_leaves_behind_do_not_hold_it(tmp_path: Path) -> None:
    """One that is forked has all that is open, and may outlive the run."""
    with only_run(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    try:
        other = contender(tmp_path)
        assert other.communicate("")[0] == "has it\n"
    finally:
        child.kill()
        child.join()


def test_what_cannot_be_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder, reason in (
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null"),
    ):
        with pytest.raises(InputError, match=rf"cannot be written: .*{reason}"), only_run(folder):
            pass
    (tmp_path / LOCK).symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"), only_run(tmp_path):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_two_commands_at_the_same_moment(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(folder, train={"steps": 2})))
    command = [sys.executable, "-m", "ppo_dist", "train", str(path)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {p.returncode: err for p in started for _, err in [p.communicate(timeout=300)]}
    assert said.keys() == {0, 2}, said
    assert re.fullmatch(
        rf"ppo-dist: {folder} is in use by another run \(host .+, process \d+\): .*\n", said[2]
    )
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
