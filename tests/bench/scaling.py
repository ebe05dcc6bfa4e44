"""W5: what the coordinator costs as workers, learners and sequences grow, without any model.

Rollout workers and learners answer at once, with sequences of 4,000 tokens; so a step is the
coordinator's own time: prompts, chunks, scores, advantages, micro-batches, metrics.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from ppo_dist.cluster.driver import long_lived
from ppo_dist.cluster.layout import Node, layout
from ppo_dist.cluster.pool import Crew, RemoteWorker
from ppo_dist.cluster.session import reserved
from ppo_dist.config import Config
from ppo_dist.coordinator.loop import Loop, Parts
from ppo_dist.journey import Encoded, remembered
from ppo_dist.learner.group import Learners
from ppo_dist.learner.worker import LearnerWorker, UpdateShard
from ppo_dist.protocols import NamedTensors
from ppo_dist.reports import StepReport, TermSums, UpdateReport, Vitals
from ppo_dist.rollout.pool import Pool
from ppo_dist.transport.store import StoreReceiver
from ppo_dist.types import Annotation, Chunk, Prompt, Rollout, Score, Weights
from tests.bench.machine import timed_in_turn
from tests.bench.work import EACH, Found

PROMPT, RESPONSE = 500, 3500  # tokens
BUDGET = 32_768  # tokens of a micro-batch
TURNS = 15  # steps of each size


class Writer:
    """A rollout worker that has written it already."""

    def __init__(self) -> None:
        self.tokens_R = np.arange(RESPONSE)
        self.logprobs_R = np.full(RESPONSE, -1.0, np.float32)

    def start(self, anew: bool) -> None:
        pass

    def receive(self, weights: Weights) -> None:
        pass

    def sleep(self) -> None:
        pass

    def end(self) -> None:
        pass

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], Vitals]:
        made = [
            Rollout(
                r.prompt, i, self.tokens_R.copy(), self.logprobs_R.copy(), "", "eos", chunk.version
            )
            for r in chunk.requests
            for i in r.indices
        ]
        return made, Vitals()


class Ranks:
    """Learners that know it already."""

    def __init__(self, world: int) -> None:
        self.world = world
        row = np.full(RESPONSE, -1.0, np.float32)
        self._annotation = Annotation(row, row, row, 0.0)

    def call(self, method: Callable[..., Any], args: Sequence[tuple[Any, ...]]) -> list[Any]:
        if method is LearnerWorker.annotate:
            return [[[self._annotation for _ in b] for b in shard] for shard, _ in args]
        if method is LearnerWorker.update:
            return [StepReport(tuple(map(self._report, shards))) for shards, _ in args]
        (version,) = args[0]
        return [Weights(version, ())] * self.world

    def alone(self, method: str, args: tuple[Any, ...]) -> Any:
        """One rank's answer."""
        return self.call(vars(LearnerWorker)[method], [args])[0]

    def _report(self, shard: UpdateShard) -> UpdateReport:
        return UpdateReport(shard.counts, TermSums(), 1.0, 1.0)


class Engine(Writer):
    """The same as a RolloutEngine, for real workers."""

    def peak_memory(self) -> int | None:
        return None

    def generate(self, chunk: Chunk) -> list[Rollout]:
        return self.timed(chunk)[0]

    def load(self, version: int, weights: NamedTensors) -> None:
        for _ in weights:
            pass

    def wake(self) -> None:
        pass


class RayRanks:
    """Learners that know it already, as Ray actors."""

    def __init__(self, world: int) -> None:
        self.world = world
        actor = ray.remote(Ranks)
        self._actors = [actor.options(num_cpus=0).remote(1) for _ in range(world)]

    def call(self, method: Callable[..., Any], args: Sequence[tuple[Any, ...]]) -> list[Any]:
        if method is LearnerWorker.publish:
            return Ranks(self.world).call(method, args)
        pairs = zip(self._actors, args, strict=True)
        answers = ray.get([actor.alone.remote(method.__name__, own) for actor, own in pairs])
        return list(answers)


class Judge:
    """A reward that differs from response to response."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(float(n % 2), "fake") for n in range(len(rollouts))]

    def vitals(self) -> dict[int, Vitals]:
        return {}


class Nowhere:
    """A tracker that keeps the last row."""

    def log(self, step: int, metrics: Any) -> None:
        self.row = metrics

    def table(self, step: int, rows: Any) -> None:
        pass

    def alert(self, step: int, title: str, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def config(folder: Path, workers: int, steps: int) -> Config:
    """As many prompts as the workers can write to at a time."""
    return Config.model_validate(
        {
            "run": {"dir": str(folder)},
            "train": {"steps": steps},
            "model": {"path": "none"},
            "data": {"verifiable": "none.jsonl"},
            "reward": {"verifiable": "math"},
            "mix": {"schedule": 0.0, "prompts": workers * EACH, "labelled_batch": 0},
            "algorithm": {"minibatches": 4},
            "rollout": {"workers": workers, "chunk": EACH, "max_new_tokens": RESPONSE},
            "learner": {"micro_batch_tokens": BUDGET},
            "tracking": {"wandb": "off", "progress": False},
        }
    )


def loop(made: Config, pool: Any, ranks: Any) -> Loop:
    """The real loop, pool and learner group, on workers without a model."""
    rng = np.random.default_rng(0)
    count = made.rollout.workers * EACH
    prompts = [
        Prompt(f"p:{n}", "verifiable", "", rng.integers(0, 50_000, PROMPT)) for n in range(count)
    ]
    memory = remembered(made, Encoded({"verifiable": prompts}, [], [], [], {}))
    group = Learners(ranks, made.learner.micro_batch_tokens)
    group.save = lambda **_: None  # type: ignore[method-assign]
    return Loop(made, memory, Parts(pool, group, Judge(), Nowhere(), None, None))


def in_process(stack: ExitStack, workers: int, world: int, steps: int) -> Loop:
    """A coordinator with workers in this process."""
    made = config(Path(stack.enter_context(tempfile.TemporaryDirectory())), workers, steps)
    pool = Pool([Writer() for _ in range(workers)], keep=2)
    stack.callback(pool.close)
    return loop(made, pool, Ranks(world))


def with_actors(stack: ExitStack, workers: int, world: int, steps: int) -> Loop:
    """The same with Ray actors; inside a Ray session."""
    made = config(Path(stack.enter_context(tempfile.TemporaryDirectory())), workers, steps)
    wanted = layout(made, [Node(workers, 0)], has_learners=False)
    _, places, _ = stack.enter_context(reserved(made, wanted))
    crew = Crew(made, places, Engine, StoreReceiver)
    pool = Pool([RemoteWorker(crew, slot) for slot in places.slots], keep=2)
    stack.callback(pool.close)
    return loop(made, pool, RayRanks(world))


def seconds_of_a_step(
    kind: str, start: Callable[[ExitStack, int, int, int], Loop], sizes: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Medians, of all sizes in turn."""
    with ExitStack() as stack, long_lived():
        loops = [start(stack, *size, TURNS + 1) for size in sizes]
        seconds = timed_in_turn(TURNS, *(own._pass for own in loops))
    names = [f"{workers} {world} {kind}" for workers, world in sizes]
    return dict(zip(names, seconds, strict=True))


def memory_over(steps: int, workers: int = 4, world: int = 2) -> list[int]:
    """Bytes in use after each hundredth step."""
    with ExitStack() as stack, long_lived():
        own = in_process(stack, workers, world, steps)
        seen = []
        for step in range(steps):
            own._pass()
            if (step + 1) % 100 == 0:
                seen.append(psutil.Process().memory_info().rss)
    return seen


def run() -> Found:
    """Seconds of a step by (workers, learners), and the driver's memory."""
    sizes = ((1, 1), (4, 1), (16, 4), (64, 16), (256, 64), (512, 64), (1024, 64))
    actors = ((1, 1), (4, 2), (16, 4))
    seen = memory_over(1000)  # first, since what large steps leave free would hide what is kept
    more = seconds_of_a_step("in process", in_process, sizes)
    cpus = sum(workers for workers, _ in actors)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR")
    more |= seconds_of_a_step("actors", with_actors, actors)
    ray.shutdown()
    return Found({}, 0, {"after 100 steps": seen[0], "after 1000 steps": seen[-1]}, more)
