"""A run whose numbers go bad: it stops with a reason, and what it skipped can be looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_dist.cli import main
from tests.conftest import raw_config


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_run_that_blows_up_stops_with_what_it_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    raw = raw_config(
        folder, train={"steps": 20}, learner={"lr": 1e30}, eval={"every": 5}, mix={"prompts": 4}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "ppo_dist", "train", str(tmp_path / "config.yaml")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert "3 updates in a row were not finite" in result.stdout
    assert "Traceback" not in result.stderr
    rows = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["guard/skipped_updates"] or 0 for row in rows) >= 3 and len(rows) < 10
    events = [strict(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stopped" and any("not finite" in str(e) for e in events)
    skipped = sorted((folder / "skipped").iterdir())
    assert main(["replay", str(skipped[-1])]) == 0
    said = capsys.readouterr().out
    assert "logprobs_R" in said and "not finite" in said and "grad_norm" in said
    assert main(["replay", str(folder / "metrics.jsonl")]) == 2
    assert "not a skipped update" in capsys.readouterr().err
