"""Responses that have no reward count nowhere: not as zeros, not in a group, not in an N."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ppo_dist.algo.advantages import GroupMean, Rloo
from ppo_dist.config.algorithm import Algorithm
from ppo_dist.config.reward import ExactReward
from ppo_dist.coordinator.evaluate import Evaluator
from ppo_dist.coordinator.experience import Experience
from ppo_dist.coordinator.judge import judged
from ppo_dist.coordinator.unlabelled import Probe
from ppo_dist.protocols import AdvantageEstimator
from ppo_dist.rewards.rules import Judged, exact
from ppo_dist.types import (
    Annotation,
    Dropped,
    LabelledExample,
    Prompt,
    Rollout,
    Score,
    Scored,
    TrainSequence,
    Weights,
)
from tests.fakes import FakeLearners, FakePool, FakeReward
from tests.unit.rig import Rig, prompts

REMOTE = {"verifiable": {"kind": "remote", "url": "http://127.0.0.1:1/"}}


class Away(FakeReward):
    """Knows nothing of some responses."""

    def __init__(self, is_away: Callable[[Rollout], bool]) -> None:
        self._is_away = is_away

    def score(self, rollouts: Sequence[Rollout]) -> list[Score | Dropped]:
        known = super().score(rollouts)
        return [
            Dropped("away") if self._is_away(r) else score
            for r, score in zip(rollouts, known, strict=True)
        ]


def is_first(rollout: Rollout) -> bool:
    """Of each four: a prompt that comes twice in a step has eight."""
    return rollout.index % 4 == 0 and rollout.prompt.origin == "verifiable"


def test_nothing_of_them_is_learned(tmp_path: Path) -> None:
    rig = Rig(tmp_path, judge=Away(is_first), rollout={"group_size": 4}, reward=REMOTE)
    assert rig.loop.run() == "done"
    taught = [s.uid for update in rig.learners.seen for s in update if s.policy_weight_R.any()]
    assert len(taught) == 3 * 6 * 3 and not any(uid.endswith(("#0", "#4")) for uid in taught)
    whole = Rig(tmp_path / "whole", rollout={"group_size": 4}, reward=REMOTE)
    whole.loop.run()
    told, of_all = rig.tracker.rows[1], whole.tracker.rows[1]
    assert (told["reward/dropped"], of_all["reward/dropped"]) == (6.0, 0.0)
    assert told["rollout/tokens"] < of_all["rollout/tokens"]
    assert told["reward/verifiable/mean"] != of_all["reward/verifiable/mean"]
    title = "responses without a reward were dropped"
    alerts = [alert for alert in rig.tracker.alerts if alert[1] == title]
    assert alerts == [(step, title, "6: away") for step in (1, 2, 3)]


def test_without_a_remote_reward_none_is_counted(tmp_path: Path) -> None:
    rig = Rig(tmp_path, eval={"every": 1})
    rig.loop.run()
    for row in rig.tracker.rows:
        assert row["reward/dropped"] is None and row["eval/held_out/dropped"] is None


def test_a_step_without_any_reward_learns_from_labels_alone(tmp_path: Path) -> None:
    rig = Rig(tmp_path, judge=Away(lambda _: True), train={"steps": 1}, reward=REMOTE)
    assert rig.loop.run() == "done"
    row = rig.tracker.rows[-1]
    assert (row["reward/dropped"], row["rollout/tokens"]) == (12.0, 0.0)
    assert row["reward/verifiable/mean"] is None and row["sup/tokens"] > 0
    assert len(rig.learners.seen) == 2 and rig.loop.state.reinforced == 0


def group(values: Sequence[float | None]) -> tuple[list[Scored], list[Dropped]]:
    """Responses of one prompt to these rewards."""
    prompt = Prompt("p", "verifiable", "p>", np.array([3]))
    made = [
        Rollout(prompt, i, np.array([4, 1]), np.zeros(2, np.float32), str(value), "eos", 0)
        for i, value in enumerate(values)
    ]

    class Given:
        def score(self, rollouts: Sequence[Rollout]) -> list[Score | Dropped]:
            return [
                Dropped("away") if r.text == "None" else Score(float(r.text), "given")
                for r in rollouts
            ]

    return judged(Given(), made)


def learned(scored: Sequence[Scored], estimator: AdvantageEstimator) -> list[TrainSequence]:
    algorithm = Algorithm.model_validate({"kl": 0.0, "advantage": "group_mean"})
    zeros = np.zeros(2, np.float32)
    return Experience(algorithm, estimator)(
        scored, [Annotation(zeros, zeros, zeros, 0.0) for _ in scored], True
    )


@pytest.mark.parametrize("estimator", [GroupMean(), GroupMean(std=False), Rloo()], ids=str)
def test_a_group_is_compared_with_those_that_are_left(estimator: AdvantageEstimator) -> None:
    scored, dropped = group([1.0, None, 3.0, 5.0])
    found = learned(scored, estimator)
    alone = learned(group([1.0, 3.0, 5.0])[0], estimator)
    assert [s.uid for s in found] == ["p#0", "p#2", "p#3"] and len(dropped) == 1
    for one, two in zip(found, alone, strict=True):
        assert one.advantages_R.tolist() == two.advantages_R.tolist()
    as_zero = learned(group([1.0, 0.0, 3.0, 5.0])[0], estimator)
    assert found[0].advantages_R.tolist() != as_zero[0].advantages_R.tolist()
    (last,) = learned(group([None, None, None, 5.0])[0], estimator)
    assert not last.advantages_R.any(), "there is nobody to compare it with"


@pytest.mark.parametrize(("lost", "is_told"), [(0, True), (2, True), (3, False), (20, False)])
def test_what_is_left_of_an_evaluation(tmp_path: Path, lost: int, is_told: bool) -> None:
    """A tenth may be missing; with more it tells nothing, lest the rest be taken for the whole."""
    config = Rig(tmp_path, reward=REMOTE, eval={"samples": 0}).config
    asked = [LabelledExample(p, "x", np.array([3, 1])) for p in prompts("labelled", 20)]
    numbers = {example.prompt.uid: i for i, example in enumerate(asked)}
    reward = Away(lambda r: numbers[r.prompt.uid] < lost)
    pool = FakePool()
    pool.load(Weights(0, ()))
    row, _, dropped = Evaluator(config, "held_out", asked, pool, reward, FakeLearners())(0)
    assert row["eval/held_out/dropped"] == lost == len(dropped)
    assert (row["eval/held_out/accuracy"] is not None) == is_told
    assert (row["eval/held_out/reward"] is not None) == is_told
    assert row["eval/held_out/nll"] is not None, "that needs no reward"


def test_an_evaluation_that_tells_nothing_is_not_the_best(tmp_path: Path) -> None:
    rig = Rig(tmp_path, judge=Away(lambda _: True), eval={"every": 1}, reward=REMOTE)
    assert rig.loop.run() == "done"
    assert rig.loop.state.best is None and "export policy-best" not in rig.learners.events


def test_the_probe_is_about_those_that_both_know() -> None:
    known = {uid: Prompt(uid, "labelled", uid, np.array([3]), answer="7") for uid in "ab"}

    class HalfAway:
        def score(self, rollouts: Sequence[Rollout]) -> list[Score | Dropped]:
            truth = Judged(exact(ExactReward(kind="exact")), "exact", "error").score(rollouts)
            return [
                Dropped("away") if r.prompt.uid == "b" else t
                for r, t in zip(rollouts, truth, strict=True)
            ]

    none = np.zeros(2, np.float32)
    given = [
        Scored(Rollout(known[uid], 0, np.array([5, 1]), none, "7", "eos", 0), Score(value, "v"))
        for uid, value in (("a", 1.0), ("b", 0.0))
    ]
    row = Probe(known, HalfAway()).row(given, {"a", "b"})
    assert row["pseudo/reward_accuracy_probe"] == 1.0
