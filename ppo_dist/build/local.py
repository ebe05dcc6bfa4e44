"""Learners, a rollout worker and reward models in this process (`cluster.kind: local`).

All of them compute in the main thread, in turn. torch's OpenMP keeps a team of threads for each
thread that computes; where these teams have more threads than there are cores, all of them sleep
between two operations instead of waiting for the next: on two cores all took a third longer.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, TypeVar

from ppo_dist import device
from ppo_dist.build.engines import engine
from ppo_dist.build.parts import reward_source, traces
from ppo_dist.config import Config, InputError, reward_models
from ppo_dist.config.reward import ModelReward
from ppo_dist.learner.group import InProcess, Ranks
from ppo_dist.learner.worker import LearnerWorker, Seat, cannot_compile
from ppo_dist.protocols import Rewards, RolloutEngine, RolloutPool
from ppo_dist.reports import Vitals
from ppo_dist.rewards.model import ModelScores, RewardModel, Traces
from ppo_dist.rollout.pool import Pool
from ppo_dist.rollout.worker import RolloutWorker
from ppo_dist.transport.memory import MemoryReceiver, MemorySender
from ppo_dist.types import Chunk, Rollout

ANY_PORT = 0  # a rank that is alone meets nobody
R = TypeVar("R")


class InTurn:
    """Makes calls with a device and a number of threads of their own."""

    def __init__(self, kind: device.DeviceKind, threads: int) -> None:
        self._kind, self._threads = kind, threads

    def __call__(self, work: Callable[..., R], *args: Any) -> R:
        """What `work` returns or raises."""
        device.prepare(self._kind, self._threads)
        return work(*args)


class Later(Executor):
    """Does what it is asked when somebody wants a result, in that one's thread, and in the order in
    which it was asked.
    """

    def __init__(self) -> None:
        self._asked: deque[_Deferred[Any]] = deque()

    def submit(self, work: Callable[..., R], /, *args: Any, **named: Any) -> Future[R]:
        """See Executor."""
        deferred = _Deferred(self, lambda: work(*args, **named))
        self._asked.append(deferred)
        return deferred

    def do_until(self, wanted: Future[Any]) -> None:
        """All up to that one."""
        while not wanted.done():
            self._asked.popleft().do()


class _Deferred(Future[R]):
    def __init__(self, executor: Later, work: Callable[[], R]) -> None:
        super().__init__()
        self._executor, self._work = executor, work

    def do(self) -> None:
        try:
            self.set_result(self._work())
        except Exception as error:
            self.set_exception(error)

    def result(self, timeout: float | None = None) -> R:
        self._executor.do_until(self)
        return super().result(timeout)


class LocalWorker(RolloutWorker):
    """One whose engine is there, and which computes in turn with others."""

    def __init__(self, made: RolloutEngine, keep: int, run: InTurn) -> None:
        super().__init__(MemoryReceiver(), lambda: made, keep)
        self._run = run

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], Vitals]:
        """See RolloutWorker."""
        return self._run(super().timed, chunk)


def ranks(config: Config, model_path: str, resume: Path | None) -> Ranks:
    """The one learner.

    Raises:
        InputError: torch cannot compile here, and should.
    """
    kind = _device(config)
    _check_compiler(config, kind, learns=True)
    run = InTurn(kind, config.learner.threads)
    seat = Seat(0, 1, "127.0.0.1", ANY_PORT, kind)
    return InProcess(LearnerWorker(config, model_path, MemorySender(), seat, resume), run)


@contextlib.contextmanager
def rollout_pool(config: Config, model_path: str) -> Iterator[tuple[RolloutPool, Rewards]]:
    """The one rollout worker with the model as it is on disk (version 0), and what judges.

    Raises:
        InputError: torch cannot compile here, and should.
    """
    kind, keep = _device(config), config.stream.kept_versions
    _check_compiler(config, kind, learns=False)
    run = InTurn(kind, config.rollout.threads)
    worker = LocalWorker(engine(config, model_path, kind)(), keep, run)
    with contextlib.closing(Pool([worker], keep, generators=lambda _: Later())) as pool:
        yield pool, _rewards(config, model_path, kind)


def _rewards(config: Config, model_path: str, kind: device.DeviceKind) -> Rewards:
    def made(section: ModelReward, own: Traces) -> ModelScores:
        run = InTurn(kind, section.threads)
        model = RewardModel(section, model_path, kind, own)
        return ModelScores(section, lambda shares: [run(model.judge, share) for share in shares])

    pairs = zip(reward_models(config), traces(config), strict=True)  # a worker each
    return reward_source(config, {section: made(section, own) for section, own in pairs})


def _check_compiler(config: Config, kind: device.DeviceKind, learns: bool) -> None:
    asked = ["learner.compile"] if learns and config.learner.compile else []
    asked += [f"compile of the reward model {m.path}" for m in reward_models(config) if m.compile]
    if asked and (said := cannot_compile(kind)) is not None:
        raise InputError(f"{', '.join(asked)}: {said}")


def _device(config: Config) -> device.DeviceKind:
    return device.available() if config.cluster.device == "auto" else config.cluster.device
