"""Workers that come and go while a run goes on: its numbers are those of one left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppo_dist.config import Config
from ppo_dist.coordinator.scale import Scale
from ppo_dist.run import train
from ppo_dist.tracking.local import JsonLines, read_rows
from tests.conftest import TIMINGS, raw_config
from tests.ray.test_same_numbers import assert_same

STEPS = 8


def run(folder: Path, **sections: Any) -> list[dict[str, Any]]:
    made: dict[str, Any] = {
        "train": {"steps": STEPS, "checkpoint_every": 2},
        "cluster": {"kind": "ray"},
        "rollout": {"chunk": 2},
        "learner": {"optimizer": {"kind": "adamw", "eps": 1e-2}},
    }
    config = Config.model_validate(raw_config(folder, **{**made, **sections}))
    assert train(config, False, Console(quiet=True)) == 0
    return read_rows(folder / "metrics.jsonl")


def asked_after(monkeypatch: pytest.MonkeyPatch, when: dict[int, Scale]) -> None:
    """Asks for a scale when a step has been logged, as somebody beside the run would."""
    log = JsonLines.log

    def wrapped(self: JsonLines, step: int, metrics: Any) -> None:
        log(self, step, metrics)
        if step in when:
            when[step].ask(self._folder)

    monkeypatch.setattr(JsonLines, "log", wrapped)


def kinds(folder: Path) -> list[str]:
    return [event["event"] for event in read_rows(folder / "events.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["store", "collective"])
def test_rollout_workers_come_and_go(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    more = {"transport": {"kind": transport}, "stream": {"max_lag": 1}}
    whole = run(tmp_path / "whole", **more)
    asked_after(monkeypatch, {2: Scale(rollout_workers=3), 6: Scale(rollout_workers=1)})
    rows = run(tmp_path / "scaled", **more)

    def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in rows]

    assert plain(rows) == plain(whole)
    told = kinds(tmp_path / "scaled")
    assert told.count("rollout_worker_added") == 2
    assert told.count("rollout_worker_removed") == 2
    assert "rollout_worker_failed" not in told


@pytest.mark.slow
def test_learners_change_at_a_checkpoint(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"train": {"steps": 3, "checkpoint_every": 1}}
    whole = run(tmp_path / "whole", **few)
    asked_after(monkeypatch, {1: Scale(learners=2), 2: Scale(learners=1)})
    rows = run(tmp_path / "scaled", **few)
    assert_same(rows, whole)
    told = [e for e in read_rows(tmp_path / "scaled" / "events.jsonl") if e["event"] == "rescaled"]
    assert [(e["step"], e["learners"]["now"]) for e in told] == [(1, 2), (2, 1)]
