"""A loop over fakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ppo_dist import build
from ppo_dist.algo.advantages import Gae
from ppo_dist.config import ORIGINS, Config, corrects
from ppo_dist.coordinator.ahead import Ahead
from ppo_dist.coordinator.evaluate import Evaluator
from ppo_dist.coordinator.experience import Experience
from ppo_dist.coordinator.loop import Loop, Memory, Parts
from ppo_dist.coordinator.state import Checkpoints, RunState, read_state
from ppo_dist.coordinator.stream import Stream
from ppo_dist.coordinator.unlabelled import Unlabelled
from ppo_dist.protocols import RewardSource, RolloutPool
from ppo_dist.rewards.rules import ByOrigin
from ppo_dist.semi.guard import Guard
from ppo_dist.semi.pseudo import PseudoBuffer
from ppo_dist.semi.schedule import Scheduled
from ppo_dist.types import LabelledExample, Prompt
from tests.conftest import TIMINGS, raw_config
from tests.fakes import FakeLearners, FakePool, FakeReward, FakeTracker


def prompts(origin: Any, count: int) -> list[Prompt]:
    return [
        Prompt(f"{origin}/0:{i}", origin, "abc>", np.arange(i, i + 2 + i % 3), answer="x")
        for i in range(count)
    ]


class Rig:
    """A loop over fakes, or over another pool, other learners, another judge."""

    def __init__(
        self,
        folder: Path,
        resume: bool = False,
        pool: RolloutPool | None = None,
        learners: FakeLearners | None = None,
        judge: RewardSource | None = None,
        **sections: Any,
    ) -> None:
        self.config = Config.model_validate(raw_config(folder, **sections))
        self.learners, self.pool = learners or FakeLearners(), pool or FakePool()
        self.tracker = FakeTracker()
        labelled = prompts("labelled", 5)
        examples = [LabelledExample(p, "x", np.array([3, 1])) for p in labelled]
        by_origin = {o: prompts(o, n) for o, n in (("verifiable", 11), ("unlabelled", 7))}
        stream = Stream({"labelled": labelled, **by_origin}, examples, self.config.run.seed)
        reward = ByOrigin(dict.fromkeys(ORIGINS, judge or FakeReward()))
        held_out = Evaluator(
            self.config, "held_out", examples[:3], self.pool, reward, self.learners
        )
        parts = Parts(self.pool, self.learners, reward, self.tracker, held_out, None)
        semi, by_uid = (
            self.config.semi,
            {p.uid: p for group in (labelled, *by_origin.values()) for p in group},
        )
        self.memory = Memory(
            Scheduled(self.config.mix),
            stream,
            Ahead(by_uid, self.config.stream.max_lag),
            Experience(self.config.algorithm, Gae(), corrects(self.config)),
            Unlabelled(
                build.gate(semi.gate),
                semi.pseudo,
                PseudoBuffer(semi.pseudo, by_uid, 0) if semi.pseudo else None,
                None,
            ),
            Guard(semi.guard, is_complement=False),
        )
        state = RunState()
        if resume:
            newest, _ = Checkpoints(folder, keep=2).newest_whole()
            assert newest is not None
            state, saved = read_state(newest)
            self.memory.load_state_dict(saved)
            self.learners.restore(newest)
        self.loop = Loop(self.config, self.memory, parts, state)

    def numbers(self) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in self.tracker.rows
        ]
