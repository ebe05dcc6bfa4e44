"""Weights & Biases: the only file that imports wandb."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from wandb.sdk.lib.wbauth import read_netrc_auth

from ppo_dist.config import Config
from ppo_dist.config.redact import redacted, redacted_in
from ppo_dist.config.study import Study
from ppo_dist.config.workers import WandbMode
from ppo_dist.files import write_text

ID_FILE = "wandb_id.txt"
INCREMENTS = 90  # W&B shows the latest hundred of a table
POLICIES = ("policy", "policy-best")  # in a run folder
# it would keep what is printed before credentials are taken out of it
SETTINGS = wandb.Settings(silent=True, console="off")


class Wandb:
    """A Tracker that logs to Weights & Biases: online if there is a key, else into offline files.
    It never asks.
    """

    def __init__(self, config: Config, folder: Path, resume: bool) -> None:
        # a resumed run goes on under its own id
        kept = folder / ID_FILE
        run_id = kept.read_text().strip() if resume and kept.exists() else secrets.token_hex(4)
        write_text(kept, run_id)
        _hide_credentials()
        self._folder, self._keeps, self._began = folder, config.tracking.artifacts, time.time()
        self._run = wandb.init(
            project=config.tracking.project,
            name=folder.name,
            tags=redacted_in(list(config.tracking.tags)) or None,
            notes=redacted(config.tracking.notes) or None,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=_mode(config.tracking.wandb),
            config=redacted_in(config.model_dump(mode="json")),
            settings=SETTINGS,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._table = wandb.Table(columns=[], log_mode="INCREMENTAL")
        self._unsent, self._last, self._sent_at = 0, 0, 0
        self._every = -(-config.train.steps // INCREMENTS)
        if self._keeps:
            self._keep_config()

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
            self._table.add_data(step, *redacted_in(list(row.values())))
        self._unsent, self._last = self._unsent + len(rows), step
        if step == 0 or step - self._sent_at >= self._every:
            self._send_table(step)

    def _send_table(self, step: int) -> None:
        self._run.log({"step": step, "samples": self._table})
        self._unsent, self._sent_at = 0, step

    def alert(self, step: int, title: str, text: str) -> None:
        """See Tracker. W&B sends it to whoever watches the run; the same title at most once in ten
        minutes.
        """
        text = redacted(f"step {step}: {text}")
        self._run.alert(redacted(title), text, level="WARN", wait_duration=600)

    def close(self) -> None:
        """See Tracker."""
        if self._unsent:
            self._send_table(self._last)
        if self._keeps:
            self._keep_policies()
        self._run.finish()

    def _keep_policies(self) -> None:
        """Those of a run that is done: it has written its policy since this began."""
        policy = self._folder / POLICIES[0]
        if policy.is_dir() and policy.stat().st_mtime >= self._began:
            for name in POLICIES:
                if (self._folder / name).is_dir():
                    self._run.log_artifact(self._artifact(name, "model"))

    def _keep_config(self) -> None:
        """The run's config is what its policies come from. Offline W&B cannot be told of inputs."""
        artifact = self._artifact("config.yaml", "config")
        if self._run.offline:
            self._run.log_artifact(artifact)
        else:
            self._run.use_artifact(artifact)

    def _artifact(self, name: str, kind: str) -> wandb.Artifact:
        path = self._folder / name
        artifact = wandb.Artifact(f"{self._run.id}-{path.stem}", kind)
        # immutable: W&B makes no copy of its own of a whole model
        add = artifact.add_dir if path.is_dir() else artifact.add_file
        add(str(path), policy="immutable")
        return artifact


def server() -> str | None:
    """The URL of the server that runs are sent to; None without a key."""
    return str(_settings().base_url) if has_key() else None


def _settings() -> wandb.Settings:
    settings = wandb.Settings(silent=True)
    settings.update_from_system_settings()
    settings.update_from_env_vars(os.environ)
    return settings


def log_study(study: Study, folder: Path, rows: Sequence[Mapping[str, Any]], image: Path) -> None:
    """One W&B run with a study's table and figure."""
    _hide_credentials()
    run = wandb.init(
        project=study.project,
        name=folder.name,
        job_type="label-efficiency",
        dir=str(folder),
        mode=_mode(study.wandb),
        config=redacted_in(study.model_dump(mode="json")),
        settings=SETTINGS,
    )
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    run.log({"study/results": table, "study/accuracy": wandb.Image(str(image))})
    run.finish()


def _hide_credentials() -> None:
    """W&B keeps the command line, where an override may hold one."""
    sys.argv = redacted_in(sys.argv)


def _mode(asked: WandbMode) -> Literal["online", "offline"]:
    if asked == "auto":
        return "online" if has_key() else "offline"
    return "online" if asked == "online" else "offline"


def has_key() -> bool:
    """Whether this user can log in at W&B's server without being asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return read_netrc_auth(host=str(_settings().base_url)) is not None
    except wandb.errors.AuthenticationError:  # what stands there is no key
        return False
