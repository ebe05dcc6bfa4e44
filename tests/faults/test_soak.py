"""A long run whose processes are killed again and again: it ends with the numbers of one that was
left alone, and leaves nothing behind.

    pytest tests/faults/test_soak.py -m slow                  # 500 steps, 25 kills
    pytest tests/faults/test_soak.py -m slow --soak 2000      # as many kills a step
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ppo_dist.tracking.local import read_rows
from tests.conftest import LEARNERS_BACK_S, ROLLOUT_BACK_S, TIMINGS, raw_config
from tests.faults.test_interrupts import gone, marked

pytestmark = pytest.mark.slow
STEPS, KILLS = 500, 25
CHECKPOINT_EVERY = 10
RESUMES_BEFORE = 0.4  # of the run: later the driver stays, so that its memory can be looked at
EVERY_S = 1.0
ROLES = {
    "-m ppo_dist": "driver",
    "raylet": "raylet",
    "gcs_server": "gcs",
    "ray::RolloutActor": "rollout worker",
    "ray::LearnerActor": "learner",
}
VICTIMS = ("rollout worker", "learner", "driver")
BACK_S = {"rollout worker": ROLLOUT_BACK_S, "learners": LEARNERS_BACK_S}


def role(process: psutil.Process) -> str | None:
    words = " ".join(process.cmdline()[:3])
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


class Soak:
    """A run in processes of its own, killed at steps that are drawn in advance."""

    def __init__(self, folder: Path, steps: int, kills: int) -> None:
        self.folder, self.steps = folder, steps
        self.mark = uuid.uuid4().hex
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
        assert gone(self.mark) == [], "Ray's processes outlive the driver"
        self.killed["driver"] += 1
        begin = time.monotonic()
        self.process = self._start("--resume")
        self._wait(lambda: self._count("resumed") == self.killed["driver"], end)
        resumed = [event["step"] for event in self._events() if event["event"] == "resumed"]
        self.lost.append(before - resumed[-1])
        self._wait(lambda: step_of(self.folder) > before, end)
        self.resume_s.append(time.monotonic() - begin)

    def _count(self, kind: str) -> int:
        return sum(event["event"] == kind for event in self._events())

    def _events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return read_rows(path) if path.exists() else []

    def _of(self, kind: str) -> list[psutil.Process]:
        return [p for p in marked(self.mark) if role(p) == kind]

    def _start(self, *words: str) -> subprocess.Popen[str]:
        path = self.folder.with_suffix(".yaml")
        log = self.folder.with_suffix(".log").open("a")
        return subprocess.Popen(
            [sys.executable, "-m", "ppo_dist", "train", str(path), *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PPO_DIST_MARK": self.mark},
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


def config(folder: Path, steps: int, **sections: Any) -> Path:
    raw = raw_config(
        folder,
        train={"steps": steps, "checkpoint_every": CHECKPOINT_EVERY},
        stream={"max_lag": 1},
        eval={"every": 0},
        **sections,
    )
    raw["learner"]["lr"] = raw["learner"]["critic_lr"] = 1e-4  # no end of the world in between
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(raw))
    return path


def numbers(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]


def by_eighth(role: str, seen: list[tuple[int, int]], steps: int) -> list[int]:
    """Medians of eighths of the run; one that a role was not seen in has none. Of those that are
    killed, whose process is young again and again, the peaks.
    """
    parts: dict[int, list[int]] = defaultdict(list)
    for step, value in seen:
        parts[8 * step // (steps + 1)].append(value)
    stands_for = max if role in VICTIMS[:2] else statistics.median
    return [int(stands_for(parts[part])) for part in sorted(parts)]


def check_that_all_came_back(events: list[dict[str, Any]]) -> None:
    """Whatever rollout worker failed was started anew, with all others, or the run was over."""
    kinds = {"rollout_worker_failed", "rollout_worker_restarted", "learners_rebuilt", "resumed"}
    away: set[str] = set()
    for event in events:
        assert event["event"] != "rollout_worker_left_out", event
        match event["event"]:
            case "rollout_worker_failed":
                away.add(event["worker"])
            case "rollout_worker_restarted":
                away.discard(event["worker"])
            case "learners_rebuilt" | "resumed":
                away.clear()
    last = max(at for at, event in enumerate(events) if event["event"] in kinds)
    assert away <= {events[last].get("worker")}, (away, events[last])


def test_soak(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    steps = pytestconfig.getoption("--soak") or STEPS
    kills = KILLS * steps // STEPS
    plain = tmp_path / "plain"
    command = [sys.executable, "-m", "ppo_dist", "train", str(config(plain, steps))]
    subprocess.run(command, check=True)
    shared = set(os.listdir("/dev/shm"))
    folder = tmp_path / "run"
    limits = {"restarts": kills, "backoff_s": 0.1}
    config(folder, steps, cluster={"kind": "ray", "cpus": 4, **limits}, rollout={"workers": 2})
    soak = Soak(folder, steps, kills)
    try:
        with Watch(soak.mark, folder).on() as watch:
            soak.run(deadline_s=60 * kills + 2 * steps)
        left = gone(soak.mark)
    finally:
        for process in marked(soak.mark):
            with contextlib.suppress(psutil.Error):
                process.kill()
    events = read_rows(folder / "events.jsonl")
    back = {
        kind: [e["seconds"] for e in events if e["event"] == name]
        for kind, name in (
            ("rollout worker", "rollout_worker_restarted"),
            ("learners", "learners_rebuilt"),
        )
    }
    lost, rebuilt = (
        [e["step"] for e in events if e["event"] == name]
        for name in ("learners_lost", "learners_rebuilt")
    )
    again = {
        "learners": [was - now for was, now in zip(lost, rebuilt, strict=True)],
        "driver": soak.lost,
    }
    told = {
        "steps": steps,
        "killed": dict(soak.killed),
        "steps made again, in all and at most": {
            kind: [sum(each), max(each)] for kind, each in again.items() if each
        },
        "seconds to recover, median and longest": {
            kind: [round(statistics.median(s), 1), round(max(s), 1)]
            for kind, s in (*back.items(), ("driver", soak.resume_s))
            if s
        },
        "largest memory, MB": {k: max(v for _, v in s) // 10**6 for k, s in watch.memory.items()},
        "memory, MB, by eighth": {
            kind: [round(value / 1e6, 1) for value in by_eighth(kind, seen, steps)]
            for kind, seen in watch.memory.items()
        },
        "open files, by eighth": {k: by_eighth(k, seen, steps) for k, seen in watch.files.items()},
    }
    print(json.dumps(told, indent=1))
    assert sum(soak.killed.values()) == kills
    assert numbers(folder) == numbers(plain)
    struck = [kind for kind in BACK_S if soak.killed[kind.removesuffix("s")]]
    assert all(max(back[kind]) < BACK_S[kind] for kind in struck), back
    check_that_all_came_back(events)
    assert all(max(each) <= CHECKPOINT_EVERY for each in again.values() if each), again
    assert left == [] and set(os.listdir("/dev/shm")) <= shared
    for kind in ROLES.values():
        *_, fifth, _, _, last = by_eighth(kind, watch.memory[kind], steps)
        assert last <= 1.05 * fifth, f"{kind}: memory grows over the last half of the run"
        *_, fifth, _, _, last = by_eighth(kind, watch.files[kind], steps)
        assert last <= fifth + 2, f"{kind}: open files grow over the last half of the run"
