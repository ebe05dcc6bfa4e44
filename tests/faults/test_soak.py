"""A long run whose processes are killed again and again: it ends with the numbers of one that was
left alone, and leaves nothing behind.

    pytest tests/faults/test_soak.py -m slow                  # 500 steps, 25 kills
    pytest tests/faults/test_soak.py -m slow --soak 2000      # as many kills a step
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ppo_dist.tracking.local import read_rows
from tests.conftest import LEARNERS_BACK_S, ROLLOUT_BACK_S, TIMINGS, raw_config
from tests.faults.soak import ROLES, VICTIMS, Soak, Watch, ray_of
from tests.faults.test_interrupts import gone, marked

pytestmark = pytest.mark.slow
STEPS, KILLS = 500, 25
CHECKPOINT_EVERY = 10
BACK_S = {"rollout worker": ROLLOUT_BACK_S, "learners": LEARNERS_BACK_S}


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
    config(folder, steps, cluster={"kind": "ray", **limits}, rollout={"workers": 2})
    mark = uuid.uuid4().hex
    try:
        with ray_of(mark) as address, Watch(mark, folder).on() as watch:
            soak = Soak(folder, steps, kills, mark, address)
            soak.run(deadline_s=60 * kills + 2 * steps)
        left = gone(mark)
    finally:
        for process in marked(mark):
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
