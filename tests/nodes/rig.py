"""A Ray cluster over several hosts, and runs that are started on its head."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ppo_dist.tracking.local import read_rows
from tests.conftest import TIMINGS
from tests.nodes.net import Host

ROOT = Path(__file__).parent.parent.parent
PORT = 6379
RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # five checks must fail: 5 s where the node's port is closed, 20 where nothing answers
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_prestart_worker_first_driver": "0",  # idle processes cost a small machine its time
}


def wait_for(what: Callable[[], Any], seconds: float, why: Callable[[], object] = str) -> None:
    """Until something is so; fails with the reason after the time."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


def environment(**more: str) -> dict[str, str]:
    """This process's own without what is said of any Ray, and more."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


@dataclass(frozen=True)
class Run:
    """A training run that has been started.

    Example: Run(process=<Popen …>, folder=Path("/tmp/run"), log=Path("/tmp/run.log"))
    """

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path

    def wait(self, what: Callable[[], Any], seconds: float) -> None:
        """Until something is so while the run goes on."""

        def asked() -> bool:
            assert self.process.poll() is None, f"it ended with {self.process.returncode}\n{self}"
            return bool(what())

        wait_for(asked, seconds, lambda: self)

    def end(self, seconds: float) -> None:
        """Waits for the end, which must be a good one."""
        assert self.process.wait(seconds) == 0, str(self)

    def rows(self) -> list[dict[str, Any]]:
        """Metrics as far as they are written."""
        return read_rows(self.folder / "metrics.jsonl")

    def numbers(self) -> list[dict[str, Any]]:
        """Metrics without timings."""
        return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in self.rows()]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """What happened beside the steps, of some kinds or all."""
        found = read_rows(self.folder / "events.jsonl")
        return [event for event in found if not kinds or event["event"] in kinds]

    def __str__(self) -> str:
        return f"{self.log.read_text()[-2000:]}\n{len(self.rows())} rows, events: {self.events()}"


@contextlib.contextmanager
def training(
    raw: dict[str, Any],
    env: Mapping[str, str],
    command: Callable[..., list[str]] | None = None,
    *words: str,
) -> Iterator[Run]:
    """A run of a config; ended at once if it still goes on at the end."""
    folder = Path(raw["run"]["dir"])
    config, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    config.write_text(yaml.safe_dump(raw))
    arguments = [sys.executable, "-m", "ppo_dist", "train", str(config), *words]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(*arguments) if command else arguments,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(env),
        )
    try:
        yield Run(process, folder, log)
    finally:
        process.kill()
        process.wait()


class Cluster:
    """Ray nodes, each on a host of its own; the first is the head."""

    def __init__(self, hosts: Mapping[str, Host], cpus: Mapping[str, int], folder: Path) -> None:
        self.hosts = hosts
        self._cpus, self._folder = cpus, folder
        self._head = next(iter(hosts))
        self._address = f"{hosts[self._head].address}:{PORT}"
        self._env = environment(RAY_AUTH_TOKEN=secrets.token_hex(32), **RAY)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def runs(self, name: str) -> bool:
        """Whether there is a node on a host."""
        return name in self._nodes and self._nodes[name].poll() is None

    def train(self, raw: dict[str, Any], *words: str) -> contextlib.AbstractContextManager[Run]:
        """Starts a run on the head."""
        env = {**self._env, "RAY_ADDRESS": self._address}
        return training(raw, env, self.hosts[self._head].command, *words)

    def doctor(self, raw: dict[str, Any]) -> tuple[int, str]:
        """What `ppo-dist doctor` says on the head of a run's config: its exit code and its table, a
        line for each verdict.
        """
        config = self._folder / "doctor.yaml"
        config.write_text(yaml.safe_dump(raw))
        env = {**self._env, "RAY_ADDRESS": self._address, "COLUMNS": "400"}
        arguments = [sys.executable, "-m", "ppo_dist", "doctor", str(config)]
        command = self.hosts[self._head].command(*arguments)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def actors(self) -> dict[str, Counter[str]]:
        """How many of each class run on each host."""
        return {name: host.actors() for name, host in self.hosts.items()}

    def kill(self, name: str) -> None:
        """Ends a node with all that runs on its host."""
        self.hosts[name].kill()
        self._nodes[name].wait()

    def start(self, name: str) -> None:
        """Starts a node; the head must be the first."""
        host, log = self.hosts[name], self._folder / f"{name}.log"
        options = [
            "--block",
            f"--node-ip-address={host.address}",
            f"--num-cpus={self._cpus[name]}",
            "--object-store-memory=80000000",
            f"--temp-dir={self._folder / name}",
        ]
        if name == self._head:
            options += ["--head", f"--port={PORT}", "--include-dashboard=false"]
        else:
            options += [f"--address={self._address}"]
        with log.open("wb") as out:
            self._nodes[name] = subprocess.Popen(
                host.command(str(Path(sys.executable).parent / "ray"), "start", *options),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self._env,
            )
        wait_for(lambda: "runtime started" in log.read_text(), 60, log.read_text)
