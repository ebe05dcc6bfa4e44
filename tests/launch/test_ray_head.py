"""A cluster of launch/ray_head.sh, and runs that are submitted to it. With `-s` the jobs' logs are
shown.
"""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import raw_config
from tests.launch.rig import ROOT, environment, free_ports, running, wait_for

pytestmark = pytest.mark.slow
SECRET = "s3cr3t-of-the-test"


@dataclass(frozen=True)
class Head:
    """A running head.

    Example: Head(pid=4711, env={…}, port=20001, agent=20003, address="http://127.0.0.1:20002", …)
    """

    pid: int
    env: dict[str, str]
    port: int
    agent: int
    address: str
    said: Path
    logs: Path

    def status(self, token: str | None, url: str = "") -> int:
        """Of a plain request, for the list of jobs unless another URL is given."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(url or f"{self.address}/api/jobs/", headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def submit(self, config: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(config, *arguments),
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        print(done.stdout, done.stderr)
        return done

    def command(self, config: Path, *arguments: str) -> list[str]:
        there = ["--address", self.address, "--working-dir", str(config.parent)]
        return [str(ROOT / "launch" / "submit.sh"), str(config), *there, *arguments]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    short = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets have short names
    env = environment(folder / "home")
    port, board, client, agent = free_ports(4)
    options = {
        "port": port,
        "dashboard-port": board,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "num-cpus": 4,
        "object-store-memory": 200_000_000,
        "temp-dir": short,
    }
    command = [str(ROOT / "launch" / "ray_head.sh"), *(f"--{k}={v}" for k, v in options.items())]
    said = folder / "head.log"
    with running(command, said, env) as process:
        address = f"http://127.0.0.1:{board}"
        made = Head(process.pid, env, port, agent, address, said, short)
        wait_for(lambda: _answers(made), 90, said.read_text)
        yield made
    shutil.rmtree(short)


def _answers(head: Head) -> bool:
    try:
        return "runtime started" in head.said.read_text() and head.status(None) == 401
    except OSError:
        return False


def token(head: Head) -> str:
    return (Path(head.env["HOME"]) / ".ray" / "auth_token").read_text()


def written(folder: Path, **sections: Any) -> Path:
    """A config for the cluster, alone in a working directory."""
    sections = {"cluster": {"kind": "ray", "wait_s": 120}, **sections}
    raw = raw_config(folder / "run", **sections)
    (folder / "work").mkdir(exist_ok=True)
    path = folder / "work" / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_it_listens_on_this_machine_alone(head: Head) -> None:
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    listening = [c for p in family for c in p.net_connections("tcp") if c.status == "LISTEN"]
    assert len(listening) > 3
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}


def test_its_token_is_its_owners_alone(head: Head) -> None:
    path = Path(head.env["HOME"]) / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(token(head)) >= 32
    assert token(head) not in head.said.read_text()
    assert head.status(None) == 401
    assert head.status("wrong") == 403
    assert head.status(token(head)) == 200


def test_probes_of_kubernetes_need_no_token(head: Head) -> None:
    agent = f"http://127.0.0.1:{head.agent}"
    for server, path in ((head.address, "gcs_healthz"), (agent, "local_raylet_healthz")):
        assert head.status(None, f"{server}/api/{path}") == 200


def test_the_images_healthcheck_asks_its_node(head: Head) -> None:
    for port, code in ((head.agent, 0), (free_ports(1)[0], 1)):
        env = head.env | {"PPO_DIST_AGENT_PORT": str(port)}
        done = subprocess.run([ROOT / "launch" / "health.sh"], env=env, capture_output=True)
        assert done.returncode == code, done.stderr


def test_a_run_is_followed_to_its_end(head: Head, tmp_path: Path) -> None:
    """The variable reaches the job and no log of the cluster."""
    config = written(tmp_path)
    options = ("--follow", "--entrypoint-cpus=1", "--env=MY_KEY")
    result = head.submit(config, "train.steps=2", *options, MY_KEY=SECRET)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"policy: {tmp_path}/run/policy" in result.stdout
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    with urllib.request.urlopen(
        urllib.request.Request(
            f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {token(head)}"}
        )
    ) as answer:
        jobs = json.load(answer)
    assert [job["runtime_env"]["env_vars"].get("MY_KEY") for job in jobs] == [SECRET]
    logs = [p for p in head.logs.rglob("*") if p.is_file() and not p.is_symlink()]
    assert len(logs) > 5
    for text in (*(p.read_bytes().decode(errors="replace") for p in logs), result.stdout):
        assert SECRET not in text and token(head) not in text


@pytest.mark.parametrize(
    ("sections", "code", "words"),
    [
        ({"data": {"labelled": "nowhere.jsonl"}}, 2, "nowhere.jsonl"),
        ({"learner": {"lr": 1e30}, "train": {"steps": 20}}, 3, "not finite"),
    ],
)
def test_its_exit_code_comes_back(
    head: Head, tmp_path: Path, sections: dict[str, Any], code: int, words: str
) -> None:
    result = head.submit(written(tmp_path, **sections), "--follow")
    assert result.returncode == code, result.stdout + result.stderr
    assert words in result.stdout and "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("wrong", [None, "wrong"])
def test_without_the_token_it_is_refused(head: Head, tmp_path: Path, wrong: str | None) -> None:
    env = {"HOME": str(tmp_path)} | ({"RAY_AUTH_TOKEN": wrong} if wrong else {})
    result = head.submit(written(tmp_path), "--follow", **env)
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    last = result.stderr.strip().splitlines()[-1]
    assert head.address in last and "RAY_AUTH_TOKEN" in last
    assert ("refuses this token" if wrong else "needs a token") in last
    assert "Traceback" not in result.stderr


def test_sigterm_ends_it_also_while_it_waits_for_nodes(head: Head, tmp_path: Path) -> None:
    """Ray has a handler of its own, which aborts."""
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["ppo-dist", "train", str(written(tmp_path, rollout={"workers": 99}))],
            env=head.env | {"RAY_ADDRESS": f"127.0.0.1:{head.port}"},
            stdout=file,
            stderr=file,
        )
    wait_for(lambda: "waiting up to 120 s for more nodes: " in log.read_text(), 90, log.read_text)
    process.terminate()
    assert process.wait(30) == 130, log.read_text()
    assert log.read_text().endswith("ppo-dist: interrupted\n"), log.read_text()


def test_ctrl_c_stops_it_after_a_checkpoint_and_it_resumes(head: Head, tmp_path: Path) -> None:
    """With W&B, whose process the stop reaches as well. Resumed without a job: `ppo-dist train`
    joins by RAY_ADDRESS.
    """
    config = written(tmp_path, train={"steps": 10_000}, tracking={"wandb": "offline"})
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        head.command(config, "--follow"),
        env=head.env,
        stdin=inner,
        stdout=inner,
        stderr=inner,
    )
    os.close(inner)
    said = bytearray()

    def seen(word: bytes) -> bool:
        said.extend(os.read(terminal, 65536))
        return word in said

    wait_for(lambda: len(rows(tmp_path)) > 2, 120)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: seen(b"[y/N]"), 30, said.decode)
    os.write(terminal, b"y\n")
    wait_for(lambda: seen(b"exit code 130"), 60, said.decode)
    print(said.decode())
    assert process.wait(30) == 130, said.decode()
    os.close(terminal)
    done = rows(tmp_path)
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert '"interrupted"' in events and len(done) < 10_000
    result = subprocess.run(
        ["ppo-dist", "train", str(config), f"train.steps={len(done)}", "--resume"],
        env=head.env | {"RAY_ADDRESS": f"127.0.0.1:{head.port}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert rows(tmp_path)[: len(done)] == done and len(rows(tmp_path)) == len(done) + 1
