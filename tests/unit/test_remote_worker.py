"""What a rollout worker's end makes of Ray's actors and places, without any Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError

from ppo_dist.build.transports import preflight
from ppo_dist.cluster.layout import Slot
from ppo_dist.cluster.pool import Crew, RemoteWorker
from ppo_dist.cluster.session import Places
from ppo_dist.config import Config, InputError, WorkersLost
from ppo_dist.rollout.members import WorkerError
from ppo_dist.types import Weights
from tests.conftest import raw_config


def remote(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_colocated: bool = False,
    is_first: bool = True,
) -> tuple[RemoteWorker, list[str]]:
    """A worker whose actor is nobody, and what becomes of that and of its place."""
    told: list[str] = []
    monkeypatch.setattr(RemoteWorker, "_new", lambda self: None)
    monkeypatch.setattr(ray, "kill", lambda actor: told.append("killed"))
    monkeypatch.setattr(Places, "give_back", lambda self, slot: told.append("given back"))
    places = Places({}, (Slot(0, 1.0, 0),), "cpu")
    unused: Any = None
    lent = (lambda bundle: "") if is_colocated else None
    config = Config.model_validate(raw_config(folder))
    crew = Crew(config, places, unused, unused, lent, is_first)
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


@pytest.mark.parametrize(
    ("raised", "is_lost"),
    [
        (ActorDiedError(), True),
        (GetTimeoutError(), True),
        (RayActorError(error_msg="10.0.0.7:29400: refused", actor_init_failed=True), False),
        (RayTaskError("probe", "Traceback …", OSError("no such file")), False),
    ],
)
def test_a_worker_that_says_what_is_wrong_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: RayError, is_lost: bool
) -> None:
    worker, _ = remote(tmp_path, monkeypatch)
    method = SimpleNamespace(remote=lambda *_: None)
    worker._actor = SimpleNamespace(__ray_ready__=method, probe=method)

    def get(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(ray, "get", get)
    for ask in (worker.wait, lambda: worker.probe(Weights(0, ()))):
        with pytest.raises(WorkerError) as error:
            ask()
        assert error.value.is_lost == is_lost


@pytest.mark.parametrize(
    ("raised", "is_first", "anew", "is_final"),
    [
        (RayTaskError("start", "Traceback …", OSError("no such model")), True, False, True),
        (RayTaskError("start", "Traceback …", OSError("no GPU memory")), True, True, False),
        (RayTaskError("start", "Traceback …", OSError("no GPU memory")), False, False, False),
        (ActorDiedError(), True, False, False),
    ],
)
def test_an_engine_that_has_started_before_is_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: RayError,
    is_first: bool,
    anew: bool,
    is_final: bool,
) -> None:
    """Also where all begin anew: the GPU of one that was killed is not free at once."""
    worker, _ = remote(tmp_path, monkeypatch, is_first=is_first)

    def get(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(
        RemoteWorker,
        "_new",
        lambda self: SimpleNamespace(start=SimpleNamespace(remote=lambda: None)),
    )
    worker._actor = worker._new()
    with pytest.raises(WorkerError) as error:
        worker.start(anew)
    assert error.value.is_lost and error.value.is_final == is_final


@pytest.mark.parametrize("asked", ["wait", "probe"])
@pytest.mark.parametrize("is_lost", [True, False])
def test_weights_that_do_not_arrive(tmp_path: Path, asked: str, is_lost: bool) -> None:
    """A worker that is lost costs a restart; the user must mend what keeps the bytes from one."""

    def fails(*_: Any) -> None:
        raise WorkerError("no answer", is_lost)

    sound = {"wait": lambda: None, "probe": lambda _: None}
    workers: Any = [SimpleNamespace(**sound), SimpleNamespace(**sound | {asked: fails})]
    ranks: Any = SimpleNamespace(probe=lambda nbytes: None)
    config = Config.model_validate(raw_config(tmp_path))
    told = "transport.kind store: rollout worker 1 did not get a megabyte from the learners: no an"
    with pytest.raises(WorkersLost if is_lost else InputError, match=told):
        preflight(config, ranks, workers)
