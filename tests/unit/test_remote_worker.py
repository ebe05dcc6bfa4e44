"""What a rollout worker's end makes of Ray's actors and places, without any Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from ppo_dist.cluster.layout import Slot
from ppo_dist.cluster.pool import Crew, RemoteWorker
from ppo_dist.cluster.session import Places
from ppo_dist.config import Config
from tests.conftest import raw_config


def remote(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_colocated: bool = False
) -> tuple[RemoteWorker, list[str]]:
    """A worker whose actor is nobody, and what becomes of that and of its place."""
    told: list[str] = []
    monkeypatch.setattr(RemoteWorker, "_new", lambda self: None)
    monkeypatch.setattr(ray, "kill", lambda actor: told.append("killed"))
    monkeypatch.setattr(Places, "give_back", lambda self, slot: told.append("given back"))
    places = Places({}, (Slot(0, 1.0, 0),), "cpu")
    unused: Any = None
    lent = (lambda bundle: "") if is_colocated else None
    crew = Crew(Config.model_validate(raw_config(folder)), places, unused, unused, lent)
    return RemoteWorker(crew, places.slots[0]), told


def test_a_worker_that_ends_frees_its_place_but_not_its_learners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, told = remote(tmp_path, monkeypatch)
    worker.end()
    assert told == ["killed", "given back"]
    worker, told = remote(tmp_path, monkeypatch, is_colocated=True)
    worker.end()
    assert told == ["killed"]
