"""Rolling back starts new Ray workers, and the run goes on as it does in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_semi import events, numbers, run, watched


@pytest.mark.slow
def test_rolling_back_on_ray(ray_session: None, tmp_path: Path) -> None:
    told = {}
    for kind in ("local", "ray"):
        raw = watched(tmp_path / kind, "roll_back")
        raw["mix"]["labelled_batch"] = 0
        raw["cluster"] = {"kind": kind}
        assert run(raw) == 0
        told[kind] = numbers(tmp_path / kind)
        (back,) = [e for e in events(tmp_path / kind) if e["event"] == "rolled_back"]
        assert back["to_step"] == 0
    for row, expected in zip(told["ray"], told["local"], strict=True):
        assert _filled(row) == pytest.approx(_filled(expected), rel=1e-4, abs=1e-6, nan_ok=True)


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in row.items()}
