"""Files of a run: metrics.jsonl, samples.jsonl, events.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_dist.config.redact import redacted_in
from ppo_dist.files import write_text


class JsonLines:
    """A Tracker that appends to metrics.jsonl and samples.jsonl of a folder."""

    def __init__(self, folder: Path, after_step: int | None) -> None:
        """Keeps rows up to `after_step`, where a run is resumed; None starts anew."""
        self._folder = folder
        for name in ("metrics.jsonl", "samples.jsonl"):
            _keep(folder / name, after_step)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._samples = (folder / "samples.jsonl").open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """See Tracker. JSON has no NaN: what is not finite is null here, and an alert elsewhere.

        All rows so far are on the disk then: a checkpoint that comes next has them behind it.
        """
        finite = {
            name: value if value is None or math.isfinite(value) else None
            for name, value in metrics.items()
        }
        _write(self._metrics, {"step": step, **finite})
        for file in (self._samples, self._metrics):
            os.fsync(file.fileno())

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker."""
        for row in rows:
            _write(self._samples, {"step": step, **row})

    def alert(self, step: int, title: str, text: str) -> None:
        """See Tracker."""
        record_event(self._folder, "alert", step=step, title=title, text=text)

    def close(self) -> None:
        """See Tracker."""
        self._metrics.close()
        self._samples.close()


def record_event(folder: Path, kind: str, **details: Any) -> None:
    """Adds a line to events.jsonl: what happened to the run beside its steps."""
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        _write(file, {"time": time.time(), "event": kind, **details})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that the run wrote; a last line that was cut off is left out."""
    rows = []
    for line in _lines(path):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the empty rest after the last line, or a line that was cut off
    return rows


def _lines(path: Path) -> list[bytes]:
    # bytes, since what was cut off may end inside a character; not splitlines(): a response may
    # hold any of Unicode's other line separators
    return path.read_bytes().split(b"\n") if path.exists() else []


def _keep(path: Path, after_step: int | None) -> None:
    kept = (
        [] if after_step is None else [row for row in read_rows(path) if row["step"] <= after_step]
    )
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _write(file: Any, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(redacted_in(row), ensure_ascii=False) + "\n")
    file.flush()
