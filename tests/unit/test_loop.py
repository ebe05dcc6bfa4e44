"""The loop, driven with fakes: what happens when, and that a resumed run equals a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_dist.algo.advantages import Gae
from ppo_dist.config import Config
from ppo_dist.coordinator.evaluate import Evaluator
from ppo_dist.coordinator.experience import Experience
from ppo_dist.coordinator.loop import Loop, Parts
from ppo_dist.coordinator.state import Checkpoints, read_state
from ppo_dist.coordinator.stream import Stream
from ppo_dist.semi.schedule import Scheduled
from ppo_dist.types import LabelledExample, Prompt
from tests.conftest import raw_config
from tests.fakes import FakeLearners, FakePool, FakeReward, FakeTracker

TIMINGS = ("timing_s/", "perf/")


def prompts(origin: Any, count: int) -> list[Prompt]:
    return [
        Prompt(f"{origin}/0:{i}", origin, "abc>", np.arange(i, i + 2 + i % 3), answer="x")
        for i in range(count)
    ]


class Rig:
    """A loop over fakes."""

    def __init__(self, folder: Path, resume: bool = False, **sections: Any) -> None:
        self.config = Config.model_validate(raw_config(folder, **sections))
        self.learners, self.pool, self.tracker = FakeLearners(), FakePool(), FakeTracker()
        labelled = prompts("labelled", 5)
        examples = [LabelledExample(p, "x", np.array([3, 1])) for p in labelled]
        stream = Stream(
            {"labelled": labelled, "verifiable": prompts("verifiable", 11), "unlabelled": []},
            examples,
            self.config.run.seed,
        )
        schedule = Scheduled(self.config.mix)
        evaluator = Evaluator(self.config, prompts("labelled", 3), self.pool, FakeReward())
        parts = Parts(
            schedule,
            stream,
            self.pool,
            self.learners,
            FakeReward(),
            Experience(self.config.algorithm, Gae()),
            self.tracker,
            evaluator,
        )
        if resume:
            newest, _ = Checkpoints(folder, keep=2).newest_whole()
            assert newest is not None
            state, saved = read_state(newest)
            stream.load_state_dict(saved["stream"])
            self.learners.restore(newest)
            self.loop = Loop(self.config, parts, state)
        else:
            self.loop = Loop(self.config, parts)

    def numbers(self) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if not k.startswith(TIMINGS)} for row in self.tracker.rows
        ]


def test_supervised_steps_neither_generate_nor_publish(tmp_path: Path) -> None:
    schedule = {"schedule": {"kind": "supervised_first", "steps": 2, "then": 0.1}}
    rig = Rig(tmp_path, mix=schedule, train={"steps": 3}, eval={"every": 3})
    assert rig.loop.run()
    # 0 for the evaluation at the start, 2 for the first mixed step, 3 for the last evaluation
    assert [e for e in rig.learners.events if e.startswith("publish")] == [
        "publish 0",
        "publish 2",
        "publish 3",
    ]
    rows = rig.tracker.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["rollout/tokens"] == 0 and rows[1]["reward/verifiable/mean"] is None
    assert rows[3]["rollout/tokens"] > 0 and rows[3]["reward/verifiable/mean"] is not None
    first = rig.learners.seen[0]
    assert len(first) == 4 and all(
        s.ce_weight_R.all() and not s.policy_weight_R.any() for s in first
    )


def test_a_step_makes_epochs_times_minibatches_updates_of_both_kinds(tmp_path: Path) -> None:
    rig = Rig(tmp_path, train={"steps": 1}, algorithm={"epochs": 2, "minibatches": 3})
    rig.loop.run()
    assert len(rig.learners.seen) == 6
    for update in rig.learners.seen:
        assert sum(bool(s.ce_weight_R.any()) for s in update) == 4  # mix.labelled_batch
        assert sum(bool(s.policy_weight_R.any()) for s in update) == 4  # 6 prompts x 2 over 3
    for sequence in rig.learners.seen[0]:
        # value and policy terms go together, and no token is in two kinds of term
        assert np.array_equal(sequence.policy_weight_R, sequence.value_weight_R)
        assert not (sequence.policy_weight_R * sequence.ce_weight_R).any()


def test_every_row_has_every_key(tmp_path: Path) -> None:
    rig = Rig(tmp_path, eval={"every": 2})
    rig.loop.run()
    keys = {frozenset(row) for row in rig.tracker.rows}
    assert len(keys) == 1
    assert rig.tracker.rows[1]["eval/held_out/accuracy"] is None
    assert rig.tracker.rows[2]["eval/held_out/accuracy"] is not None


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop_after: int) -> None:
    whole = Rig(tmp_path / "whole", train={"steps": 5}, eval={"every": 1})
    assert whole.loop.run()
    first = Rig(tmp_path / "parts", train={"steps": 5}, eval={"every": 1})
    assert not first.loop.run(lambda: first.loop.state.step >= stop_after)
    second = Rig(tmp_path / "parts", resume=True, train={"steps": 5}, eval={"every": 1})
    assert second.loop.state.step == stop_after
    assert second.loop.run()
    assert first.numbers() + second.numbers() == whole.numbers()


def test_more_steps_later_equal_all_at_once(tmp_path: Path) -> None:
    whole = Rig(tmp_path / "whole", train={"steps": 4}, eval={"every": 2})
    whole.loop.run()
    first = Rig(tmp_path / "parts", train={"steps": 2}, eval={"every": 2})
    first.loop.run()
    second = Rig(tmp_path / "parts", resume=True, train={"steps": 4}, eval={"every": 2})
    second.loop.run()
    assert first.numbers() + second.numbers() == whole.numbers()


def test_best_policy_is_exported_once_it_is_better(tmp_path: Path) -> None:
    rig = Rig(tmp_path, eval={"every": 1})
    rig.loop.run()
    exports = [e for e in rig.learners.events if e.startswith("export")]
    # the fake's accuracy never changes, so the first evaluation stays the best
    assert exports == ["export policy-best", "export policy"]
    assert rig.loop.state.best_step == 0


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    train = {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 2}
    Rig(tmp_path, train=train).loop.run()
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000004"]
