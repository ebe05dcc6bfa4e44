"""Weights & Biases: the only file that imports wandb."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from ppo_dist.config import Config

ID_FILE = "wandb_id.txt"


class Wandb:
    """A Tracker that logs to Weights & Biases: online if there is a key, else into offline files.
    It never asks.
    """

    def __init__(self, config: Config, folder: Path, resume: bool) -> None:
        mode = config.tracking.wandb
        if mode == "auto":
            mode = "online" if has_key() else "offline"
        # a resumed run goes on under its own id
        kept = folder / ID_FILE
        run_id = kept.read_text().strip() if resume and kept.exists() else secrets.token_hex(4)
        kept.write_text(run_id)
        self._run = wandb.init(
            project=config.tracking.project,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode="online" if mode == "online" else "offline",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._table = wandb.Table(columns=[], log_mode="INCREMENTAL")

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """See Tracker. Keys without a value are left out, as W&B has no null."""
        self._run.log(
            {"step": step, **{name: value for name, value in metrics.items() if value is not None}}
        )

    def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """See Tracker. The table is one, and grows."""
        if not rows:
            return
        if not self._table.columns:
            self._table = wandb.Table(columns=["step", *rows[0]], log_mode="INCREMENTAL")
        for row in rows:
            self._table.add_data(step, *row.values())
        self._run.log({"step": step, "samples": self._table})

    def alert(self, step: int, title: str, text: str) -> None:
        """See Tracker. W&B sends it to whoever watches the run; the same title at most once in ten
        minutes.
        """
        self._run.alert(title=title, text=f"step {step}: {text}", level="WARN", wait_duration=600)

    def close(self) -> None:
        """See Tracker."""
        self._run.finish()


def has_key() -> bool:
    """Whether this user can log in without being asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.exists() and "wandb" in netrc.read_text(errors="replace")
