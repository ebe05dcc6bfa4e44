"""A run in processes of its own that are killed again and again, and a watch on their memory."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from ppo_dist.cluster.session import WITHOUT_DASHBOARD
from ppo_dist.tracking.local import read_rows
from tests.faults.test_interrupts import marked

RESUMES_BEFORE = 0.4  # of the run: later the driver stays, so that its memory can be looked at
EVERY_S = 1.0
# as `ppo-dist train` starts it, but for all drivers of the run: Ray's own memory has settled only
# after some ten minutes
RAY = """
import sys

import ray

from ppo_dist.cluster.session import session
from ppo_dist.config import Cluster

with session(Cluster(cpus=4)):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""
ROLES = {
    "-m ppo_dist": "driver",
    "raylet": "raylet",
    "gcs_server": "gcs",
    "ray::RolloutActor": "rollout worker",
    "ray::LearnerActor": "learner",
}
VICTIMS = ("rollout worker", "learner", "driver")


def role(process: psutil.Process) -> str | None:
    """None too of one that has ended meanwhile."""
    try:
        words = " ".join(process.cmdline()[:3])
    except psutil.Error:
        return None
    return next((role for sign, role in ROLES.items() if sign in words), None)


class Watch:
    """Memory and open files of a run's processes, by step: of each role those of the largest."""

    def __init__(self, mark: str, folder: Path) -> None:
        self.memory: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.files: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._mark, self._folder, self._over = mark, folder, threading.Event()

    @contextlib.contextmanager
    def on(self) -> Iterator[Watch]:
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()

    def _look(self) -> None:
        while not self._over.wait(EVERY_S):
            step, now = step_of(self._folder), defaultdict(list)
            for process in marked(self._mark):
                with contextlib.suppress(psutil.Error):
                    if (kind := role(process)) is not None:
                        now[kind].append((process.memory_info().rss, process.num_fds()))
            for kind, seen in now.items():
                memory, files = map(max, zip(*seen, strict=True))
                self.memory[kind].append((step, memory))
                self.files[kind].append((step, files))


def step_of(folder: Path) -> int:
    try:
        return max((folder / "metrics.jsonl").read_bytes().count(b"\n") - 1, 0)
    except OSError:
        return 0


@contextlib.contextmanager
def ray_of(mark: str) -> Iterator[str]:
    """A Ray; gives its address."""
    holder = subprocess.Popen(
        [sys.executable, "-c", RAY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PPO_DIST_MARK": mark},
        start_new_session=True,
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        yield holder.stdout.readline().strip()
    finally:
        holder.stdin.close()
        holder.wait(60)


class Soak:
    """A run in processes of its own, killed at steps that are drawn in advance."""

    def __init__(self, folder: Path, steps: int, kills: int, mark: str, address: str) -> None:
        self.folder, self.steps = folder, steps
        self._mark = mark
        self._env = {**os.environ, **WITHOUT_DASHBOARD}
        self._env |= {"PPO_DIST_MARK": mark, "RAY_ADDRESS": address}
        draw = random.Random(0)
        at = sorted(draw.sample(range(5, steps - 5), kills))
        self.plan = [
            (step, draw.choice(VICTIMS if step < RESUMES_BEFORE * steps else VICTIMS[:2]))
            for step in at
        ]
        self.killed: Counter[str] = Counter()
        self.resume_s: list[float] = []
        self.lost: list[int] = []  # steps that were made again, of each driver
        self.process = self._start()

    def run(self, deadline_s: float) -> None:
        """Kills as planned until the run has ended."""
        end = time.monotonic() + deadline_s
        for step, victim in self.plan:
            self._wait(lambda step=step: step_of(self.folder) >= step, end)
            self._kill(victim, end)
        assert self.process.wait(max(end - time.monotonic(), 1)) == 0, self._said()
        self._check_that_workers_end()

    def _kill(self, victim: str, end: float) -> None:
        self._wait(lambda: bool(self._of(victim)), end)
        before, process = step_of(self.folder), self._of(victim)[0]
        if victim == "driver":
            return self._kill_driver(before, end)
        process.send_signal(signal.SIGKILL)
        self.killed[victim] += 1
        if victim == "learner":
            self._wait(lambda: self._count("learners_rebuilt") == self.killed["learner"], end)
        self._wait(lambda: step_of(self.folder) > before, end)

    def _kill_driver(self, before: int, end: float) -> None:
        self.process.kill()
        self.process.wait()
        self._check_that_workers_end()
        self.killed["driver"] += 1
        begin = time.monotonic()
        self.process = self._start("--resume")
        self._wait(lambda: self._count("resumed") == self.killed["driver"], end)
        resumed = [event["step"] for event in self._events() if event["event"] == "resumed"]
        self.lost.append(before - resumed[-1])
        self._wait(lambda: step_of(self.folder) > before, end)
        self.resume_s.append(time.monotonic() - begin)

    def _check_that_workers_end(self) -> None:
        end = time.monotonic() + 60
        while left := [kind for kind in VICTIMS if self._of(kind)]:
            assert time.monotonic() < end, f"{left} outlive the driver"
            time.sleep(0.1)

    def _count(self, kind: str) -> int:
        return sum(event["event"] == kind for event in self._events())

    def _events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return read_rows(path) if path.exists() else []

    def _of(self, kind: str) -> list[psutil.Process]:
        return [p for p in marked(self._mark) if role(p) == kind]

    def _start(self, *words: str) -> subprocess.Popen[str]:
        path = self.folder.with_suffix(".yaml")
        log = self.folder.with_suffix(".log").open("a")
        return subprocess.Popen(
            [sys.executable, "-m", "ppo_dist", "train", str(path), *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._env,
            start_new_session=True,
        )

    def _wait(self, is_so: Any, end: float) -> None:
        while not is_so():
            assert self.process.poll() in (None, 0), self._said()
            assert time.monotonic() < end, self._said()
            if self.process.poll() == 0:
                return
            time.sleep(0.05)

    def _said(self) -> str:
        return self.folder.with_suffix(".log").read_text()[-3000:]
