"""A run whose numbers go bad: it stops with a reason, and what it skipped can be looked at."""

from __future__ import annotations

import json
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
    assert main(["train", str(tmp_path / "config.yaml")]) == 3
    told = capsys.readouterr()
    assert "3 updates in a row were not finite" in told.out
    assert "Traceback" not in told.err
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
