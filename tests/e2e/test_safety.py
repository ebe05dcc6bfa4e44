"""A run whose numbers go bad: it stops with a reason, and what it skipped can be looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import raw_config


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ppo_dist", *map(str, arguments)], capture_output=True, text=True
    )


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_run_that_blows_up_stops_with_what_it_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    raw = raw_config(
        folder, train={"steps": 20}, learner={"lr": 1e30}, eval={"every": 5}, mix={"prompts": 4}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    result = command("train", tmp_path / "config.yaml")
    assert result.returncode == 3, result.stderr
    assert "3 updates in a row were not finite" in result.stdout
    assert "Traceback" not in result.stderr
    rows = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["guard/skipped_updates"] or 0 for row in rows) >= 3 and len(rows) < 10
    events = [strict(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stopped" and any("not finite" in str(e) for e in events)
    skipped = sorted((folder / "skipped").iterdir())
    replayed = command("replay", skipped[-1])
    assert replayed.returncode == 0, replayed.stderr
    assert "logprobs_R" in replayed.stdout and "not finite" in replayed.stdout
    assert "grad_norm" in replayed.stdout
    wrong = command("replay", folder / "metrics.jsonl")
    assert wrong.returncode == 2 and "not a skipped update" in wrong.stderr
