"""The loop, driven with fakes: what happens when, and that a resumed run equals a whole one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_dist.coordinator.state import Checkpoints
from ppo_dist.coordinator.watch import read_update
from ppo_dist.types import Rollout, Score
from tests.fakes import FakeReward
from tests.unit.rig import Rig


def test_supervised_steps_neither_generate_nor_publish(tmp_path: Path) -> None:
    schedule = {"schedule": {"kind": "supervised_first", "steps": 2, "then": 0.1}}
    rig = Rig(tmp_path, mix=schedule, train={"steps": 3}, eval={"every": 3})
    assert rig.loop.run() == "done"
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
    assert whole.loop.run() == "done"
    first = Rig(tmp_path / "parts", train={"steps": 5}, eval={"every": 1})
    asked = first.loop.run(lambda: first.loop.state.step >= stop_after)
    assert asked == "interrupted"
    second = Rig(tmp_path / "parts", resume=True, train={"steps": 5}, eval={"every": 1})
    assert second.loop.state.step == stop_after
    assert second.loop.run() == "done"
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


EACH = {"every": 1}
ADAPTIVE = {"kl": {"coef": 0.5, "controller": {"kind": "adaptive", "target": 0.01, "horizon": 30}}}


def test_controller_and_scale_survive_a_checkpoint(tmp_path: Path) -> None:
    algorithm = {**ADAPTIVE, "reward": {"normalise": True, "clip": 0.5}}
    whole = Rig(tmp_path / "whole", train={"steps": 4}, algorithm=algorithm, eval=EACH)
    whole.loop.run()
    first = Rig(tmp_path / "parts", train={"steps": 2}, algorithm=algorithm, eval=EACH)
    first.loop.run()
    second = Rig(
        tmp_path / "parts", resume=True, train={"steps": 4}, algorithm=algorithm, eval=EACH
    )
    second.loop.run()
    assert first.numbers() + second.numbers() == whole.numbers()
    for key in ("reward/scale", "reward/clipped_rate"):
        assert all(row[key] is not None for row in whole.numbers()[1:])
    coefficients = [row["objective/kl_coef"] for row in whole.numbers()[1:]]
    assert coefficients[0] == 0.5 and len(set(coefficients)) > 1


def test_the_critic_warms_up_in_the_first_steps_with_rollouts(tmp_path: Path) -> None:
    schedule = {"schedule": {"kind": "supervised_first", "steps": 1, "then": 0.5}}
    train, critic = {"steps": 4}, {"warmup": 2}
    rig = Rig(tmp_path, mix=schedule, train=train, critic=critic, algorithm={"minibatches": 1})
    rig.loop.run()
    of_steps = [
        (any(s.policy_weight_R.any() for s in u), any(s.value_weight_R.any() for s in u))
        for u in rig.learners.seen
    ]
    assert of_steps == [(False, False), (False, True), (False, True), (True, True)]
    assert rig.loop.state.reinforced == 3


def test_skipped_updates_are_kept_and_too_many_stop_the_run(tmp_path: Path) -> None:
    rig = Rig(tmp_path, train={"steps": 9, "max_skipped_updates": 3})
    rig.learners.poisoned = {2, 4, 5, 6}  # two updates a step
    assert rig.loop.run() == "stopped"
    assert rig.loop.watch.verdict == "3 updates in a row were not finite"
    assert rig.loop.state.step == 4  # update 6 is the first of step 4, whose other one was good
    kept = sorted(p.name for p in (tmp_path / "skipped").iterdir())
    assert kept == [
        f"step-0000000{step}-update-{n}.npz" for step, n in ((2, 0), (3, 0), (3, 1), (4, 0))
    ]
    replayed, coefficients = read_update(tmp_path / "skipped" / kept[0])
    assert (coefficients.mu, coefficients.lr) == (0.5, 0.05)
    for got, sent in zip(replayed, rig.learners.seen[2], strict=True):
        for name, value in vars(sent).items():
            assert np.array_equal(getattr(got, name), value), name
    assert [row["guard/skipped_updates"] for row in rig.tracker.rows[1:]] == [0, 1, 2, 1]
    assert sum("not finite" in title for _, title, _ in rig.tracker.alerts) == 4
    assert (tmp_path / "checkpoints" / "step-00000004").exists()


def test_skipped_updates_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    first = Rig(tmp_path, train={"steps": 3, "max_skipped_updates": 3})
    first.learners.poisoned = {4, 5}  # both updates of step 3
    assert first.loop.run() == "done"
    second = Rig(tmp_path, resume=True, train={"steps": 9, "max_skipped_updates": 3})
    second.learners.poisoned = {6}
    assert second.loop.run() == "stopped"
    assert second.loop.state.step == 4


def test_an_alert_when_workers_and_learners_disagree(tmp_path: Path) -> None:
    rollout = {"max_logprob_gap": 0.05}  # the fakes: 0.5 when new, a tenth more an update
    rig = Rig(tmp_path, rollout=rollout, train={"steps": 2}, eval={"every": 0})
    rig.loop.run()
    ((step, title, _),) = rig.tracker.alerts
    assert step == 2 and "disagree" in title


class Broken(FakeReward):
    """A judge that fails on everything."""

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(0.0, "numeric", "ValueError: no number") for _ in rollouts]


def test_an_alert_when_an_evaluation_cannot_be_judged(tmp_path: Path) -> None:
    """Else its accuracy is 0 for a reason that nobody sees."""
    rig = Rig(tmp_path, judge=Broken(), mix={"prompts": 0}, eval={"every": 1}, train={"steps": 1})
    rig.loop.run()
    told = [(step, title) for step, title, _ in rig.tracker.alerts]
    assert told == [
        (step, "3 of 3 responses could not be judged and count as 0") for step in (0, 1)
    ]


HELD_OUT = ("eval/held_out/accuracy", "eval/held_out/reward")
GAP = {"gap": {"limit": -1.0, "action": "roll_back"}}  # always past its limit


def guarded(folder: Path, guard: dict[str, Any]) -> Rig:
    """A run on unlabelled prompts alone, evaluated after every step."""
    return Rig(
        folder,
        mix={"shares": {"verifiable": 0, "unlabelled": 1}},
        data={"unlabelled": "u.jsonl"},
        reward={"unlabelled": "vote"},
        semi={"guard": guard},
        eval={"every": 1},
    )


def test_a_roll_back_at_the_best_evaluation_finds_its_checkpoint(tmp_path: Path) -> None:
    """The evaluation that is too far from the reward may itself be the best so far."""
    rig = guarded(tmp_path, GAP)
    scores = iter([0.0, 1.0])
    rig.loop._evaluated = lambda evaluator, watch: dict.fromkeys(HELD_OUT, next(scores))
    assert rig.loop.run() == "roll_back"
    assert rig.loop.state.best_step == 1
    assert Checkpoints(tmp_path, 1).of_step(1) is not None


def test_a_run_that_must_stop_does_not_roll_back(tmp_path: Path) -> None:
    rig = guarded(tmp_path, {**GAP, "kl": {"limit": -9.0, "action": "stop"}})
    assert rig.loop.run() == "stopped"
    assert "guard.kl" in (rig.loop.watch.verdict or "")


def test_schedules_see_the_evaluation_before_the_first_step(tmp_path: Path) -> None:
    rig = Rig(tmp_path, train={"steps": 2}, eval={"every": 2})
    seen: list[tuple[int, bool]] = []
    rig.memory.schedule.observe = lambda step, row: seen.append(
        (step, row.get("eval/held_out/accuracy") is not None)
    )
    rig.loop.run()
    assert seen == [(-1, True), (0, False), (1, True)]
