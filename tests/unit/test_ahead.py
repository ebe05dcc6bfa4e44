"""Generating ahead of learning: which version writes what, how much faster it is, and that it
resumes exactly.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_dist.coordinator.ahead import Ahead
from ppo_dist.reports import Coefficients, StepReport, Vitals
from ppo_dist.rollout.pool import Pool
from ppo_dist.types import Chunk, Request, Rollout, Sampling, TrainSequence, Weights
from tests.fakes import FakeEngine, FakeLearners, FakePool
from tests.unit.rig import Rig, prompts


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_every_step_learns_from_exactly_the_version_before_its_lag(
    tmp_path: Path, lag: int
) -> None:
    rig = Rig(tmp_path, stream={"max_lag": lag}, train={"steps": 6}, eval={"every": 2})
    assert rig.loop.run() == "done"
    # the lag of step t is min(t, n): the first ones are all written by version 0
    lags = [row["rollout/version_lag"] for row in rig.tracker.rows[1:]]
    assert lags == [min(step, lag) for step in range(6)]
    assert all(row["rollout/dropped"] == 0 for row in rig.tracker.rows[1:])


@pytest.mark.parametrize("lag", [1, 3])
def test_the_first_rollouts_are_of_the_policy_that_all_labels_alone_made(
    tmp_path: Path, lag: int
) -> None:
    schedule = {"kind": "supervised_first", "steps": 4, "then": 0.5}
    mix = {"schedule": schedule, "prompts": 6, "labelled_batch": 4}
    rig = Rig(tmp_path, stream={"max_lag": lag}, train={"steps": 10}, mix=mix, eval={"every": 0})
    assert rig.loop.run() == "done"
    lags = [row["rollout/version_lag"] for row in rig.tracker.rows if row["step"]]
    assert lags == [None] * 4 + [min(step, lag) for step in range(6)]


def test_no_more_is_asked_for_than_the_lag_allows(tmp_path: Path) -> None:
    rig = Rig(tmp_path, stream={"max_lag": 2}, train={"steps": 3}, eval={"every": 0})
    rig.loop.run()
    assert isinstance(rig.pool, FakePool)
    asked = [event for event in rig.pool.events if not event.endswith("of step 0")]
    assert [event for event in asked if event.startswith("submit")] == [
        f"submit 3 of step {step}" for step in (1, 2, 3, 4)
    ]
    assert asked.index("load 1") < asked.index("submit 3 of step 3")


def test_with_lag_the_same_prompts_come_in_the_same_order(tmp_path: Path) -> None:
    at_once = Rig(tmp_path / "at_once", train={"steps": 4})
    ahead = Rig(tmp_path / "ahead", stream={"max_lag": 2}, train={"steps": 4})
    for rig in (at_once, ahead):
        rig.loop.run()
    assert [[s.uid for s in update] for update in at_once.learners.seen] == [
        [s.uid for s in update] for update in ahead.learners.seen
    ]


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_resumed_with_rollouts_under_way_equals_uninterrupted(
    tmp_path: Path, stop_after: int, lag: int
) -> None:
    sections: dict[str, Any] = {
        "stream": {"max_lag": lag},
        "train": {"steps": 6},
        "eval": {"every": 2},
    }
    whole = Rig(tmp_path / "whole", **sections)
    assert whole.loop.run() == "done"
    first = Rig(tmp_path / "parts", **sections)
    assert first.loop.run(lambda: first.loop.state.step >= stop_after) == "interrupted"
    second = Rig(tmp_path / "parts", resume=True, **sections)
    assert second.loop.run() == "done"
    assert first.numbers() + second.numbers() == whole.numbers()
    made = first.learners.seen + second.learners.seen
    for one, two in zip(made, whole.learners.seen, strict=True):
        for got, expected in zip(one, two, strict=True):
            assert got.uid == expected.uid
            assert got.tokens_T.tolist() == expected.tokens_T.tolist()


def test_what_is_too_old_after_a_resume_is_dropped_and_counted(tmp_path: Path) -> None:
    before = Rig(tmp_path, stream={"max_lag": 3}, train={"steps": 4})
    before.loop.run()
    after = Rig(tmp_path, resume=True, stream={"max_lag": 1}, train={"steps": 8})
    after.loop.run()
    rows = after.tracker.rows
    assert [row["rollout/version_lag"] for row in rows] == [None, None, None, 1.0]
    assert all(row["rollout/dropped"] == 12 for row in rows[:3]) and rows[3]["rollout/dropped"] == 0


def test_unlabelled_rollouts_under_way_are_dropped_by_a_freeze() -> None:
    pool, ahead = FakePool(), Ahead({}, max_lag=1)
    ahead.begin(pool)
    requests = [Request(p, (0, 1)) for o in ("labelled", "unlabelled") for p in prompts(o, 2)]
    ahead.ask(1, [Chunk(1, 0, 0, tuple(requests), Sampling(1.0, 4, 0, "train"))])
    kept = ahead.take(1, 1, is_frozen=True)
    assert {r.prompt.origin for r in kept} == {"labelled"} and len(kept) == 4
    assert ahead.dropped == 4


@pytest.mark.parametrize(
    ("lag", "kind", "cap", "over"),
    [
        (0, "auto", 2.0, "token"),
        (1, "auto", 1.2, "token"),
        (1, "off", 2.0, "token"),
        (0, "importance", None, "token"),
        (1, "auto", 1.5, "prefix"),
        (1, "auto", None, "prefix"),
    ],
)
def test_what_an_older_version_wrote_weighs_by_its_ratio(
    tmp_path: Path, lag: int, kind: str, cap: float | None, over: str
) -> None:
    """The fakes' responses have probability e^−.5 a token when written; the learners' rises by
    e^.1 an update, of which a step has two.
    """
    correction = {"kind": kind, "cap": cap, "over": over}
    sections: dict[str, Any] = {
        "stream": {"max_lag": lag},
        "algorithm": {"correction": correction},
        "train": {"steps": 5},
    }
    rig = Rig(tmp_path, **sections)
    rig.loop.run()
    corrected = kind == "importance" or (kind == "auto" and lag > 0)
    for step in range(5):
        ratio = math.exp(0.2 * step)
        told = []
        for sequence in rig.learners.seen[2 * step] + rig.learners.seen[2 * step + 1]:
            if sequence.policy_weight_R.any():
                powers = np.arange(len(sequence.policy_weight_R)) if over == "prefix" else 0
                ratios = ratio ** (powers + np.ones_like(sequence.policy_weight_R))
                weights = np.minimum(ratios, cap or math.inf) if corrected else 1.0
                assert sequence.policy_weight_R == pytest.approx(weights, rel=1e-5)
                assert sequence.value_weight_R == pytest.approx(1.0)
                told += [*zip(sequence.policy_weight_R, ratios, strict=True)]
        row = rig.tracker.rows[step + 1]
        assert row.get("policy/correction_mean") == (
            pytest.approx(np.mean([weight for weight, _ in told]), rel=1e-5) if corrected else None
        )
        if corrected and cap is not None:
            assert row["policy/correction_cut_rate"] == pytest.approx(
                np.mean([ratio > cap for _, ratio in told])
            )


class SleepyWorker:
    """A rollout worker whose only work is to wait."""

    def __init__(self, seconds: float) -> None:
        self._engine, self._seconds = FakeEngine(), seconds
        self._received: dict[int, Weights] = {}

    def start(self, anew: bool) -> None:
        pass

    def receive(self, weights: Weights) -> None:
        self._received[weights.version] = weights

    def timed(self, chunk: Chunk) -> tuple[list[Rollout], Vitals]:
        if chunk.version in self._received:
            weights = self._received.pop(chunk.version)
            self._engine.load(weights.version, weights.parts)
        time.sleep(self._seconds)
        return self._engine.generate(chunk), Vitals(busy_s=self._seconds)

    def end(self) -> None:
        pass


class SleepyLearners(FakeLearners):
    """Learners that take as long as they are told."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def update(
        self, updates: Sequence[Sequence[TrainSequence]], coefficients: Coefficients
    ) -> StepReport:
        time.sleep(self._seconds)
        return replace(
            super().update(updates, coefficients),
            vitals=(Vitals(busy_s=self._seconds),),
        )


def test_rollouts_that_a_checkpoint_waited_for_count_in_their_step(tmp_path: Path) -> None:
    pool = Pool([SleepyWorker(0.01)], keep=3)
    rig = Rig(
        tmp_path,
        pool=pool,
        rollout={"chunk": 100},
        stream={"max_lag": 1},
        train={"steps": 4, "checkpoint_every": 1},
        eval={"every": 0},
    )
    rig.loop.run()
    pool.close()
    took = [row["system/rollout-0/busy_s"] for row in rig.tracker.rows if row["step"]]
    assert took == pytest.approx([0.01, 0.01, 0.01, 0.01])


def test_a_lag_of_one_nearly_halves_a_step_whose_two_halves_are_equal(tmp_path: Path) -> None:
    seconds = 0.1
    rows = {}
    for lag in (0, 1):
        pool = Pool([SleepyWorker(seconds)], keep=3)
        sections: dict[str, Any] = {"rollout": {"chunk": 100}, "eval": {"every": 0}}
        rig = Rig(
            tmp_path / str(lag),
            pool=pool,
            learners=SleepyLearners(seconds),
            stream={"max_lag": lag},
            train={"steps": 8},
            **sections,
        )
        rig.loop.run()
        pool.close()
        rows[lag] = rig.tracker.rows[2:]  # the first step has nobody before it
    step = {lag: statistics.median(row["timing_s/step"] for row in rows[lag]) for lag in rows}
    assert step[1] <= 0.55 * step[0], step
    idle = {
        lag: statistics.median(row["perf/idle_learner_share"] for row in rows[lag]) for lag in rows
    }
    assert idle[0] == pytest.approx(0.5, abs=0.1) and idle[1] < 0.15
    idle = {
        lag: statistics.median(row["perf/idle_rollout_share"] for row in rows[lag]) for lag in rows
    }
    assert idle[0] == pytest.approx(0.5, abs=0.1) and idle[1] < 0.15
