"""A run whose learners are lost, driven with fakes: it ends as one that nothing happened to."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_dist import build
from ppo_dist.config import Config, InputError, RunError, WorkersLost
from ppo_dist.coordinator.loop import ACCURACY, REWARD
from ppo_dist.coordinator.scale import Scale
from ppo_dist.coordinator.state import Checkpoints, read_state
from ppo_dist.journey import Encoded
from ppo_dist.recovery import Recovery, Start
from ppo_dist.reports import Coefficients, StepReport
from ppo_dist.tracking.local import JsonLines, read_rows
from ppo_dist.types import Annotation, LabelledExample, Rollout, TrainSequence, Weights
from tests.conftest import raw_config
from tests.fakes import FakeLearners, FakePool, FakeReward
from tests.unit.rig import TIMINGS, prompts


@pytest.fixture(autouse=True, scope="module")
def cheap_collections() -> Iterator[None]:
    """Each start collects garbage, which would look through all that is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


ADAPTIVE = {"kl": {"coef": 0.5, "controller": {"kind": "adaptive", "target": 0.01, "horizon": 30}}}


class Mortal(FakeLearners):
    """Learners that are lost in the calls whose numbers are in `deaths`, as the run counts them,
    from "update 1" on.
    """

    def __init__(self, deaths: set[str], calls: dict[str, int]) -> None:
        super().__init__()
        self._deaths, self._calls = deaths, calls

    def _call(self, name: str) -> None:
        self._calls[name] = self._calls.get(name, 0) + 1
        if f"{name} {self._calls[name]}" in self._deaths:
            raise WorkersLost(f"learners: rank 1: died in {name} {self._calls[name]}")

    def annotate(
        self, responses: Sequence[Rollout | LabelledExample], imitation: bool = False
    ) -> list[Annotation]:
        self._call("annotate")
        return super().annotate(responses, imitation)

    def update(
        self, updates: Sequence[Sequence[TrainSequence]], coefficients: Coefficients
    ) -> StepReport:
        self._call("update")
        return super().update(updates, coefficients)

    def publish(self, version: int) -> Weights:
        self._call("publish")
        return super().publish(version)

    def save(self, checkpoint: Path | None = None, policy: Path | None = None) -> None:
        super().save(checkpoint, policy)
        self._call("save" if policy is None else "export")


class Cluster:
    """What `build.workers` starts, and how often it did."""

    def __init__(self, *deaths: str) -> None:
        self.deaths, self.calls, self.starts = set(deaths), {}, 0  # type: ignore[var-annotated]
        self.no_room_at, self.dies_at = -1, range(0)
        self.seen: list[weakref.ref[Mortal]] = []
        self.left: list[int] = []  # at each start, of those before

    @contextlib.contextmanager
    def workers(self, config: Config, model_path: str, resume: Path | None) -> Iterator[Any]:
        self.starts += 1
        if self.starts == self.no_room_at:
            raise InputError("the cluster is too small")
        if self.starts in self.dies_at:
            raise WorkersLost("learners: rank 1: out of memory")
        self.left.append(sum(one() is not None for one in self.seen))
        learners = Mortal(self.deaths, self.calls)
        learners.itself = learners  # type: ignore[attr-defined]  # as parts that know each other
        self.seen.append(weakref.ref(learners))
        if resume is not None:
            learners.restore(resume)
        yield learners, FakePool(), FakeReward()


def sections(folder: Path, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "train": {"steps": 5, "checkpoint_every": 2},
        "eval": {"every": 2},
        "algorithm": ADAPTIVE,
    }
    return raw_config(folder, **{**made, **changes})


def run(
    monkeypatch: pytest.MonkeyPatch,
    cluster: Cluster,
    folder: Path,
    resume: bool = False,
    limits: dict[str, Any] = {"backoff_s": 0, "restarts": 2},  # noqa: B006
    interrupted: Callable[[], bool] = lambda: False,
    **more: Any,
) -> str:
    """How the run ended."""
    monkeypatch.setattr(build, "workers", cluster.workers)
    folder.mkdir(exist_ok=True)
    labelled = prompts("labelled", 5)
    examples = [LabelledExample(p, "x", np.array([3, 1])) for p in labelled]
    data: Any = {"labelled": labelled, "verifiable": prompts("verifiable", 11), "unlabelled": []}
    encoded = Encoded(data, examples, examples[:3], [], {})
    start = Start()
    if resume:
        newest, _ = Checkpoints(folder, 2).newest_whole()
        assert newest is not None
        start = Start(newest, *read_state(newest))
    recovery = Recovery(
        Config.model_validate(sections(folder, cluster=limits, **more)),
        "model",
        encoded,
        lambda at: JsonLines(folder, at.state.step if at.checkpoint else None),
    )
    return recovery.run(start, interrupted)[0]


def numbers(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(TIMINGS)}
        for row in read_rows(folder / name)
    ]


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["event"] != "alert"]


def test_before_others_start_what_was_lost_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with it connections to the dead, whenever Python collects cycles by itself."""
    cluster = Cluster("update 4", "update 6")
    gc.disable()
    try:
        assert run(monkeypatch, cluster, tmp_path) == "done"
    finally:
        gc.enable()
    assert cluster.left == [0, 0, 0]


def test_who_is_told_to_stop_loads_no_models_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster("update 4")
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, cluster, tmp_path, interrupted=lambda: "update 4" in str(events(tmp_path)))
    assert cluster.starts == 1
    assert [(e["event"], e["step"]) for e in events(tmp_path)] == [
        ("learners_lost", 3),
        ("interrupted", 2),
    ]
    assert run(monkeypatch, Cluster(), tmp_path, resume=True) == "done"


def test_the_best_policy_of_a_step_that_is_made_again_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made again need not be as good, where kernels add in no fixed order."""
    log = JsonLines.log

    def logged(tracker: JsonLines, step: int, metrics: Any) -> None:
        if step == 3 and not (tmp_path / "abandoned-policy-best").exists():
            (tmp_path / "policy-best").mkdir(exist_ok=True)
            (tmp_path / "policy-best" / "of step 3").touch()
            metrics = {**metrics, ACCURACY: 1.0, REWARD: 1.0}
        log(tracker, step, metrics)

    monkeypatch.setattr(JsonLines, "log", logged)
    assert run(monkeypatch, Cluster("annotate 7"), tmp_path) == "done"
    lost, rebuilt = events(tmp_path)
    assert lost["step"] > 3 > rebuilt["step"]
    assert (tmp_path / "abandoned-policy-best" / "of step 3").exists()


@pytest.mark.parametrize(
    ("death", "lost_in", "back_to"),
    [
        ("publish 1", 0, 0),  # before anything was done
        ("update 1", 0, 0),
        ("annotate 4", 2, 0),  # in the evaluation before the first checkpoint
        ("annotate 5", 2, 2),
        ("update 4", 3, 2),
        ("save 1", 2, 0),
        ("save 2", 4, 2),
        ("export 2", 5, 5),  # the finished policy; the first is of the best evaluation
    ],
)
@pytest.mark.parametrize("lag", [0, 1])
def test_it_ends_as_if_nothing_had_happened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    death: str,
    lost_in: int,
    back_to: int,
    lag: int,
) -> None:
    more = {"stream": {"max_lag": lag}}
    assert run(monkeypatch, Cluster(), tmp_path / "whole", **more) == "done"
    cluster = Cluster(death)
    assert run(monkeypatch, cluster, tmp_path / "struck", **more) == "done"
    assert cluster.starts == 2
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert numbers(tmp_path / "struck", name) == numbers(tmp_path / "whole", name), name
    lost, rebuilt = events(tmp_path / "struck")
    assert (lost["event"], lost["step"]) == ("learners_lost", lost_in)
    assert lost["reason"] == f"learners: rank 1: died in {death}"
    assert (rebuilt["event"], rebuilt["step"]) == ("learners_rebuilt", back_to)
    assert 0 <= rebuilt["seconds"] < 60


def test_losses_without_a_newer_checkpoint_in_between_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two restarts allowed the third loss is one too many, and a resume goes on."""
    deaths = [f"update {n}" for n in (4, 6, 8)]  # of step 4, each time after step 3
    with pytest.raises(RunError, match=r"died in update 8 \(3 times lost without a newer") as error:
        run(monkeypatch, Cluster(*deaths), tmp_path / "run")
    assert not isinstance(error.value, WorkersLost)
    assert [e["event"] for e in events(tmp_path / "run")] == [
        *["learners_lost", "learners_rebuilt"] * 2,
        "learners_lost",
    ]
    assert run(monkeypatch, Cluster(), tmp_path / "run", resume=True) == "done"
    assert run(monkeypatch, Cluster(), tmp_path / "whole") == "done"
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_a_newer_checkpoint_begins_the_count_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = [f"update {n}" for n in (1, 2, 5, 6, 9)]  # of steps 1, 1, 3, 3 and 5
    cluster = Cluster(*deaths)
    assert run(monkeypatch, cluster, tmp_path / "run") == "done"
    assert cluster.starts == 6
    assert run(monkeypatch, Cluster(), tmp_path / "whole") == "done"
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_no_restart_where_none_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster("update 4")
    with pytest.raises(RunError, match="died in update 4"):
        run(monkeypatch, cluster, tmp_path, limits={"restarts": 0})
    assert cluster.starts == 1


def test_a_cluster_that_has_no_room_any_more_is_not_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster("update 4")
    cluster.no_room_at = 1
    with pytest.raises(InputError, match="too small"):
        run(monkeypatch, cluster, tmp_path / "first")
    cluster.no_room_at = 3
    with pytest.raises(RunError, match="after learners were lost: the cluster is too small"):
        run(monkeypatch, cluster, tmp_path / "second")


@pytest.mark.parametrize("death", ["annotate 5", "save 3"])
def test_learners_lost_around_a_roll_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    """In a step after it, and while the policy that it went back to is saved."""
    check = {"limit": -1.0, "action": "roll_back"}  # always past its limit
    more = {"semi": {"guard": {"drop": check}}, "eval": {"every": 2}}
    for name, cluster in (("whole", Cluster()), ("struck", Cluster(death))):
        assert run(monkeypatch, cluster, tmp_path / name, **more) == "done"
        told = [e["event"] for e in events(tmp_path / name)]
        assert told.count("rolled_back") >= 2
        assert ("learners_rebuilt" in told) == (name == "struck")
    assert numbers(tmp_path / "struck") == numbers(tmp_path / "whole")


def test_other_learners_from_the_next_checkpoint_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, Cluster(), tmp_path / "plain") == "done"
    folder, cluster = tmp_path / "scaled", Cluster()
    real = cluster.workers
    seen: list[int] = []

    @contextlib.contextmanager
    def workers(config: Config, model_path: str, resume: Path | None) -> Iterator[Any]:
        seen.append(config.learner.workers)
        with real(config, model_path, resume) as parts:
            yield parts

    log = JsonLines.log

    def logged(tracker: JsonLines, step: int, metrics: Any) -> None:
        log(tracker, step, metrics)
        if step == 1 and len(seen) == 1:
            Scale(learners=3).ask(folder)

    monkeypatch.setattr(JsonLines, "log", logged)
    cluster.workers = workers  # type: ignore[method-assign]
    assert run(monkeypatch, cluster, folder) == "done"
    assert seen == [1, 3]
    assert numbers(folder) == numbers(tmp_path / "plain")
    (told,) = [e for e in read_rows(folder / "events.jsonl") if e["event"] == "rescaled"]
    assert told["learners"] == {"before": 1, "now": 3} and told["step"] == 2, "a checkpoint's"


def test_without_room_for_them_it_goes_on_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, Cluster(), tmp_path / "plain") == "done"
    folder, cluster = tmp_path / "scaled", Cluster()
    folder.mkdir()
    Scale(rollout_workers=2, learners=64).ask(folder)
    cluster.no_room_at = 2
    assert run(monkeypatch, cluster, folder) == "done"
    assert cluster.starts == 3
    assert numbers(folder) == numbers(tmp_path / "plain")
    (told,) = [e for e in read_rows(folder / "events.jsonl") if e["event"] == "rescale_refused"]
    assert told["learners"] == 64 and told["reason"] == "the cluster is too small"
    assert Scale.of(folder) == Scale(rollout_workers=2)


@pytest.mark.parametrize(
    ("dies_at", "no_room_at", "reason"),
    [
        (range(2, 5), -1, "out of memory (3 times lost without a newer checkpoint in between)"),
        (range(2, 3), 3, "after learners were lost: the cluster is too small"),
    ],
)
def test_where_they_come_to_no_checkpoint_it_goes_on_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dies_at: range, no_room_at: int, reason: str
) -> None:
    assert run(monkeypatch, Cluster(), tmp_path / "plain") == "done"
    folder, cluster = tmp_path / "scaled", Cluster()
    folder.mkdir()
    Scale(learners=2).ask(folder)
    cluster.dies_at, cluster.no_room_at = dies_at, no_room_at
    assert run(monkeypatch, cluster, folder) == "done"
    assert numbers(folder) == numbers(tmp_path / "plain")
    (told,) = [e for e in read_rows(folder / "events.jsonl") if e["event"] == "rescale_refused"]
    assert told["learners"] == 2 and told["reason"].endswith(reason)


def test_those_that_came_to_a_checkpoint_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are lost in step 5, after a checkpoint of their own."""
    cluster = Cluster("update 5", "update 6", "update 7")
    Scale(learners=2).ask(tmp_path)
    with pytest.raises(RunError, match="3 times lost"):
        run(monkeypatch, cluster, tmp_path)
    assert "rescale_refused" not in [e["event"] for e in events(tmp_path)]


@pytest.mark.parametrize(("asked", "begins_with"), [(1, 1), (5, 3)])
def test_new_workers_are_no_more_than_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: int, begins_with: int
) -> None:
    """Fewer may be all that there is room for; more come when there is."""
    cluster, seen = Cluster("update 4"), []
    real = cluster.workers

    @contextlib.contextmanager
    def workers(config: Config, model_path: str, resume: Path | None) -> Iterator[Any]:
        seen.append(config.rollout.workers)
        with real(config, model_path, resume) as parts:
            Scale(rollout_workers=asked).ask(tmp_path)
            yield parts

    cluster.workers = workers  # type: ignore[method-assign]
    limits = {"kind": "ray", "backoff_s": 0}
    assert run(monkeypatch, cluster, tmp_path, limits=limits, rollout={"workers": 3}) == "done"
    assert seen == [3, begins_with]
