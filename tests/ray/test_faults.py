"""Real workers that are killed or stopped in the middle of their work: the run ends with the
numbers of one that nothing happened to.

A blow is dealt from within the worker's process, at the place that a test names, once: whoever is
there first makes a file, and strikes.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from rich.console import Console

from ppo_dist.cluster.groups import RayRanks
from ppo_dist.cluster.pool import RemoteWorker
from ppo_dist.config import Config, RunError
from ppo_dist.run import train
from ppo_dist.tracking.local import JsonLines, read_rows
from tests.conftest import LEARNERS_BACK_S, ROLLOUT_BACK_S, TIMINGS, raw_config

HANG_S = 15.0  # a deadline that a busy machine meets, and a hanging process does not
SUPERVISED = {"kind": "supervised_first", "steps": 1, "then": 0.5}
ADAPTIVE = {"kl": {"coef": 0.1, "controller": {"kind": "adaptive", "target": 0.01, "horizon": 30}}}


@dataclass(frozen=True)
class Blow:
    """What ends a worker's process or stops it, at the first one that comes along, which leaves its
    number in `once`; again and again where there is none.
    """

    how: signal.Signals
    once: Path | None

    def __call__(self) -> None:
        if self.once is not None:
            try:
                with self.once.open("x") as file:
                    file.write(str(os.getpid()))
            except FileExistsError:
                return
        os.kill(os.getpid(), self.how)


def after(count: int, blow: Blow) -> Callable[..., None]:
    """A hook that strikes when it is called for so many times."""
    left = [count]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            blow()

    return hook


# places within a rollout worker: each is called with the worker, in its process


def while_generating(worker: Any, blow: Blow) -> None:
    """In the third forward pass of a chunk of the second step."""
    generate = worker._engine.generate

    def wrapped(chunk: Any) -> Any:
        if chunk.sampling.stream != "train" or chunk.step != 1:
            return generate(chunk)
        handle = worker._engine._lm.base_model.register_forward_pre_hook(after(3, blow))
        try:
            return generate(chunk)
        finally:
            handle.remove()

    worker._engine.generate = wrapped


def while_loading(worker: Any, blow: Blow) -> None:
    """When the engine has taken three tensors of version 2."""
    fetch = worker._receiver.fetch

    def wrapped(weights: Any) -> Iterator[Any]:
        hook = after(3 if weights.version == 2 else -1, blow)
        for pair in fetch(weights):
            hook()
            yield pair

    worker._receiver.fetch = wrapped


def while_receiving(worker: Any, blow: Blow) -> None:
    """When version 2 is about to come."""
    receive = worker._receiver.receive

    def wrapped(weights: Any, deadline_s: float) -> None:
        if weights.version == 2:
            blow()
        receive(weights, deadline_s)

    worker._receiver.receive = wrapped


def while_starting(worker: Any, blow: Blow) -> None:
    """Before the engine has loaded its model."""
    make_engine = worker._make_engine

    def wrapped() -> Any:
        blow()
        return make_engine()

    worker._make_engine = wrapped


def while_fetching_what_is_no_number(worker: Any, _: Blow) -> None:
    """Nobody is struck: version 2 is not what the learners have, and no checksum tells."""
    fetch = worker._receiver.fetch

    def wrapped(weights: Any) -> Iterator[Any]:
        for name, tensor in fetch(weights):
            is_it = weights.version == 2 and name.endswith("wte.weight")
            yield name, tensor * float("nan") if is_it else tensor

    worker._receiver.fetch = wrapped


# places within a learner; all are in the second step after a checkpoint, the fourth of the run


def in_forward(worker: Any, blow: Blow) -> None:
    """In the policy's second forward pass with a gradient."""
    backward, hook = worker._policy_backward, after(2, blow)

    def wrapped(*args: Any) -> Any:
        if worker._steps != 3:
            return backward(*args)
        handle = worker._roles.policy.module.register_forward_hook(hook)
        try:
            return backward(*args)
        finally:
            handle.remove()

    worker._policy_backward = wrapped


def in_optimizer(worker: Any, blow: Blow) -> None:
    """In the first optimizer step."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(lambda *_: blow() if worker._steps == 3 else None)


def in_first_step(worker: Any, blow: Blow) -> None:
    """Before there is any checkpoint."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(lambda *_: blow() if worker._steps == 0 else None)


def in_checkpoint(worker: Any, blow: Blow) -> None:
    """When the policy's part of the second checkpoint is written, and the critic's is not."""
    save = worker._roles.policy.save

    def wrapped(folder: Path) -> None:
        save(folder)
        if worker._steps == 4:
            blow()

    worker._roles.policy.save = wrapped


def in_publish(worker: Any, blow: Blow) -> None:
    """When the first tensors of a version have been taken to be sent."""
    publish = worker._sender.publish

    def wrapped(version: int, tensors: Any) -> Any:
        hook = after(3 if worker._steps == 3 else -1, blow)

        def taken() -> Iterator[Any]:
            for pair in tensors:
                hook()
                yield pair

        return publish(version, taken())

    worker._sender.publish = wrapped


class Rig:
    """Runs with blows, and what their folders hold."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, monkeypatch
        self.blow = Blow(signal.SIGKILL, folder / "was struck")

    def config(self, name: str, **sections: Any) -> Config:
        defaults: dict[str, Any] = {
            "train": {"steps": 5, "checkpoint_every": 2},
            "mix": {"schedule": SUPERVISED},
            "algorithm": ADAPTIVE,
            "cluster": {"kind": "ray"},
            "rollout": {"workers": 1},
            "learner": {"workers": 2},
            "eval": {"every": 2},
        }
        return Config.model_validate(raw_config(self._folder / name, **merged(defaults, sections)))

    def run(self, name: str, resume: bool = False, **sections: Any) -> int:
        return train(self.config(name, **sections), resume, Console(quiet=True))

    def rows(self, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if not k.startswith(TIMINGS)}
            for row in read_rows(self._folder / name / file)
        ]

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        path = self._folder / name / "events.jsonl"
        found = read_rows(path) if path.exists() else []
        return [event for event in found if event["event"] == kind]

    def in_rollout_workers(self, place: Callable[..., None]) -> None:
        """Makes ready to strike in each of them, before or after its engine starts."""
        start, is_early = RemoteWorker.start, place is while_starting

        def started(worker: RemoteWorker, anew: bool = False) -> None:
            if is_early and not anew:
                ray.get(worker._actor.__ray_call__.remote(place, self.blow))
            start(worker, anew)
            if not is_early:
                ray.get(worker._actor.__ray_call__.remote(place, self.blow))

        self._patch.setattr(RemoteWorker, "start", started)

    def in_learner(self, place: Callable[..., None], rank: int = 1) -> None:
        """Makes ready to strike in one of them, once it has started."""
        start = RayRanks.start

        def started(ranks: RayRanks, *args: Any) -> None:
            start(ranks, *args)
            ray.get(ranks._actors[rank].__ray_call__.remote(place, self.blow))

        self._patch.setattr(RayRanks, "start", started)

    def between_steps(self, actors: Callable[[], list[Any]]) -> None:
        """Strikes the last of some actors from outside once step 3 is logged."""
        log, how, once = JsonLines.log, self.blow.how, threading.Event()

        def logged(tracker: JsonLines, step: int, metrics: Any) -> None:
            log(tracker, step, metrics)
            if step == 3 and not once.is_set():
                once.set()
                pid = ray.get(actors()[-1].__ray_call__.remote(lambda _: os.getpid()))
                self.blow.once.write_text(str(pid))  # type: ignore[union-attr]
                os.kill(pid, how)

        self._patch.setattr(JsonLines, "log", logged)

    def lasts_until(self, name: str, kind: str) -> None:
        """The run's last step waits for an event: small runs are over before a process is there."""
        log = JsonLines.log

        def logged(tracker: JsonLines, step: int, metrics: Any) -> None:
            end = time.monotonic() + 2 * ROLLOUT_BACK_S
            while step == 4 and not self.events(name, kind) and time.monotonic() < end:
                time.sleep(0.1)
            log(tracker, step, metrics)

        self._patch.setattr(JsonLines, "log", logged)

    def sees_who_is_left(self) -> list[bool]:
        """Filled, before the last step is logged, with whether who was struck is still there."""
        log, seen = JsonLines.log, list[bool]()

        def logged(tracker: JsonLines, step: int, metrics: Any) -> None:
            if step == 5 and self.blow.once is not None and self.blow.once.exists():
                seen.append(psutil.pid_exists(int(self.blow.once.read_text())))
            log(tracker, step, metrics)

        self._patch.setattr(JsonLines, "log", logged)
        return seen

    def remembers(self, cls: type) -> list[Any]:
        """Every object of a class that is made from now on."""
        made: list[Any] = []
        init = cls.__init__

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            made.append(self)

        self._patch.setattr(cls, "__init__", wrapped)
        return made


def merged(defaults: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    names = [*defaults, *(name for name in sections if name not in defaults)]
    return {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in names}


@pytest.fixture
def rig(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def whole_run(
    factory: pytest.TempPathFactory, **sections: Any
) -> Callable[[str], list[dict[str, Any]]]:
    """What the files of a run hold to which nothing happens."""
    with pytest.MonkeyPatch.context() as patch:
        rig = Rig(factory.mktemp("whole"), patch)
        assert rig.run("run", **sections) == 0
        return functools.cache(functools.partial(rig.rows, "run"))


@pytest.fixture(scope="module")
def whole(
    ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Callable[[str], list[dict[str, Any]]]]:
    @functools.cache
    def of(lag: int) -> Callable[[str], list[dict[str, Any]]]:
        return whole_run(tmp_path_factory, stream={"max_lag": lag})

    return of


FAST = {
    "train": {"steps": 3},
    "mix": {"schedule": 0.5},
    "algorithm": {"kl": 0.05},
    "eval": {"every": 0},
    "learner": {"workers": 1},
}


def test_a_rollout_worker_is_killed_while_it_generates(rig: Rig) -> None:
    assert rig.run("whole", **{**FAST, "cluster": {"kind": "local"}}) == 0
    rig.in_rollout_workers(while_generating)
    assert rig.run("struck", **{**FAST, "rollout": {"workers": 2}}) == 0
    for file in ("metrics.jsonl", "samples.jsonl"):
        for row, expected in zip(rig.rows("struck", file), rig.rows("whole", file), strict=True):
            for key, value in expected.items():
                is_number = isinstance(value, float)
                near = pytest.approx(value, rel=1e-4, abs=1e-6) if is_number else value
                assert row[key] == near, key
    (failed,) = rig.events("struck", "rollout_worker_failed")
    assert failed["version"] == 1 and "died" in failed["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "place", [while_generating, while_loading, while_receiving, while_starting, None]
)
def test_a_rollout_worker_that_is_killed(
    rig: Rig, whole: Any, place: Callable[..., None] | None, workers: int, lag: int
) -> None:
    """Alone and beside another; None: between two steps."""
    if lag and place not in (while_generating, None):
        pytest.skip("as without lag")
    check_rollout_worker(rig, whole(lag), place, workers, stream={"max_lag": lag})


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [while_generating, while_loading, while_receiving, while_starting, None]
)
def test_a_rollout_worker_that_hangs(
    rig: Rig, whole: Any, place: Callable[..., None] | None
) -> None:
    rig.blow = Blow(signal.SIGSTOP, rig.blow.once)
    check_rollout_worker(
        rig,
        whole(0),
        place,
        2,
        rollout={"deadline_s": HANG_S},
        transport={"deadline_s": HANG_S / 2},
        cluster={"start_deadline_s": 4 * HANG_S},
    )


def check_rollout_worker(
    rig: Rig,
    whole: Callable[[str], list[dict[str, Any]]],
    place: Callable[..., None] | None,
    workers: int,
    **sections: Any,
) -> None:
    if place is None:
        made = rig.remembers(RemoteWorker)
        rig.between_steps(lambda: [worker._actor for worker in made])
    else:
        rig.in_rollout_workers(place)
    sections = merged({"rollout": {"workers": workers}}, sections)
    left = rig.sees_who_is_left()
    rig.lasts_until("struck", "rollout_worker_restarted")
    assert rig.run("struck", **sections) == 0
    assert left == [False], "also one that is stopped is gone"
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert rig.rows("struck", file) == whole(file), file
    (failed,) = rig.events("struck", "rollout_worker_failed")
    (restarted,) = rig.events("struck", "rollout_worker_restarted")
    assert failed["worker"] == restarted["worker"]
    assert restarted["state"] == "healthy"
    print(f"\nrollout worker: {failed['reason']}: back after {restarted['seconds']} s")
    assert restarted["seconds"] < ROLLOUT_BACK_S


@pytest.mark.slow
def test_a_rollout_worker_that_always_dies(rig: Rig, whole: Any) -> None:
    left_alone = whole(0)  # first, while nothing is struck
    rig.blow = Blow(signal.SIGKILL, None)
    rig.in_rollout_workers(while_generating)
    allowed = {"cluster": {"restarts": 1, "backoff_s": 0.1}}
    with pytest.raises(RunError, match=r"rollout workers: (none is left|a chunk failed 3 times)"):
        rig.run("struck", **allowed)
    check_goes_on(rig, left_alone)


@pytest.mark.slow
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("place", [in_forward, in_optimizer, in_checkpoint, in_first_step, None])
def test_a_learner_that_is_killed(
    rig: Rig, whole: Any, place: Callable[..., None] | None, lag: int
) -> None:
    """None: between two steps."""
    check_learner(rig, whole(lag), place, stream={"max_lag": lag})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "transport"),
    [
        (in_forward, "store"),
        (in_checkpoint, "store"),
        (in_publish, "store"),
        (in_publish, "collective"),  # the rollout workers are in the middle of a broadcast
    ],
)
def test_the_learner_that_publishes_is_killed(
    rig: Rig, whole: Any, place: Callable[..., None], transport: str
) -> None:
    """It is also the one that the others met at."""
    check_learner(rig, whole(0), place, rank=0, transport={"kind": transport})


@pytest.mark.slow
@pytest.mark.parametrize("place", [in_forward, in_optimizer, in_checkpoint, in_first_step, None])
def test_a_learner_that_hangs(rig: Rig, whole: Any, place: Callable[..., None] | None) -> None:
    rig.blow = Blow(signal.SIGSTOP, rig.blow.once)
    check_learner(rig, whole(0), place, learner={"deadline_s": HANG_S})


def check_learner(
    rig: Rig,
    whole: Callable[[str], list[dict[str, Any]]],
    place: Callable[..., None] | None,
    rank: int = 1,
    **sections: Any,
) -> None:
    if place is None:
        made = rig.remembers(RayRanks)
        rig.between_steps(lambda: made[-1]._actors)
    else:
        rig.in_learner(place, rank)
    left = rig.sees_who_is_left()
    assert rig.run("struck", **sections) == 0
    assert left == [False], "also one that is stopped is gone: it holds a GPU"
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert rig.rows("struck", file) == whole(file), file
    (lost,) = rig.events("struck", "learners_lost")
    (rebuilt,) = rig.events("struck", "learners_rebuilt")
    expected = {in_first_step: (0, 0), in_checkpoint: (4, 2)}.get(place, (3, 2))
    assert (lost["step"], rebuilt["step"]) == expected
    assert "rank" in lost["reason"] and lost["detail"]
    print(f"\n{lost['reason']}: back after {rebuilt['seconds']} s")
    assert rebuilt["seconds"] < LEARNERS_BACK_S


@pytest.mark.slow
@pytest.mark.parametrize("who", ["rollout worker", "learner"])
def test_one_that_stands_still_for_less_than_its_deadline(rig: Rig, whole: Any, who: str) -> None:
    """It goes on, and nothing has happened."""
    left_alone = whole(0)
    rig.blow = Blow(signal.SIGSTOP, rig.blow.once)
    stood: list[bool] = []

    def goes_on() -> None:
        once = rig.blow.once
        assert once is not None
        while not (once.exists() and once.read_text()):
            time.sleep(0.05)
        time.sleep(4)
        process = psutil.Process(int(once.read_text()))
        stood.append(process.status() == psutil.STATUS_STOPPED)
        process.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=goes_on, daemon=True)
    thread.start()
    if who == "learner":
        rig.in_learner(in_forward)
    else:
        rig.in_rollout_workers(while_generating)
    assert rig.run("struck") == 0
    thread.join(1)
    assert stood == [True]
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert rig.rows("struck", file) == left_alone(file), file
    assert not rig.events("struck", "rollout_worker_failed")
    assert not rig.events("struck", "learners_lost")


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["store", "disk", "collective"])
def test_weights_that_are_no_numbers_are_never_served(rig: Rig, transport: str) -> None:
    rig.in_rollout_workers(while_fetching_what_is_no_number)
    with pytest.raises(RunError, match=r"version 2: .*wte\.weight is not finite"):
        rig.run(
            "struck",
            transport={"kind": transport},
            cluster={"restarts": 1, "backoff_s": 0.1},
            train={"checkpoint_every": 1},
        )
    (failed,) = rig.events("struck", "failed")
    assert "wte.weight is not finite" in failed["reason"]
    rows = rig.rows("struck")
    assert all(row["step"] <= 2 for row in rows), "none is of responses that such weights wrote"


@pytest.mark.slow
def test_learners_that_always_die(rig: Rig, whole: Any) -> None:
    left_alone = whole(0)
    rig.blow = Blow(signal.SIGKILL, None)
    rig.in_learner(in_first_step)
    with pytest.raises(RunError, match=r"rank 1: .*died.* \(2 times lost without a newer"):
        rig.run("struck", cluster={"restarts": 1, "backoff_s": 0.1})
    assert len(rig.events("struck", "learners_lost")) == 2
    check_goes_on(rig, left_alone)


def check_goes_on(rig: Rig, whole: Callable[[str], list[dict[str, Any]]]) -> None:
    """A run that failed says so, and can be resumed once nothing strikes any more."""
    assert rig.events("struck", "failed")
    rig._patch.undo()
    assert rig.run("struck", resume=True) == 0
    assert rig.rows("struck") == whole("metrics.jsonl")


@pytest.mark.slow
def test_a_version_that_only_a_dead_worker_had(rig: Rig, whole: Any) -> None:
    """By collective broadcast a version comes once: with the only worker it is gone, and the run
    goes on from its last checkpoint.
    """
    left_alone = whole(0)
    rig.in_rollout_workers(while_generating)
    assert rig.run("struck", transport={"kind": "collective"}) == 0
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert rig.rows("struck", file) == left_alone(file), file
    (lost,) = rig.events("struck", "learners_lost")
    assert "none has version 1 any more" in lost["reason"]
