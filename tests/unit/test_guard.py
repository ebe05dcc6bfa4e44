"""The guard's readings, patience and actions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ppo_dist.config.semi import Guard as GuardSection
from ppo_dist.semi.guard import ACTIONS, Decision, Guard
from ppo_dist.types import MixPlan

PLAN = MixPlan({"labelled": 2, "verifiable": 3, "unlabelled": 5}, 4, mu=0.3, policy_coef=0.8)


def guard(is_complement: bool = False, **checks: Any) -> Guard:
    off = {"gap": None, "drop": None}
    return Guard(GuardSection.model_validate({**off, **checks}), is_complement)


def row(
    accuracy: float | None = None, reward: float | None = None, **more: float
) -> dict[str, Any]:
    return {"eval/held_out/accuracy": accuracy, "reward/unlabelled/mean": reward, **more}


def actions(g: Guard, *rows: dict[str, Any]) -> list[list[str]]:
    return [[d.action for d in g.observe(step, r)] for step, r in enumerate(rows, start=1)]


def test_the_gap_is_between_the_rewards_since_an_evaluation_and_its_accuracy() -> None:
    g = guard(gap={"limit": 0.3})
    assert g.observe(1, row(reward=0.9)) == []
    assert g.metrics == {"guard/gap": None, "guard/action": 0.0}
    (decision,) = g.observe(2, row(accuracy=0.35, reward=0.5))  # a mean reward of 0.7
    assert decision == Decision("warn", "guard.gap is 0.35, its limit is 0.3")
    assert g.metrics == {"guard/gap": pytest.approx(0.35), "guard/action": 1.0}
    assert g.observe(3, row(accuracy=0.3, reward=0.5)) == []  # those before count no more
    assert g.metrics["guard/gap"] == pytest.approx(0.2)
    assert g.observe(4, row(accuracy=0.0)) == [] and g.metrics["guard/gap"] is None


def test_a_drop_is_below_the_best_so_far() -> None:
    g = guard(drop={"limit": 0.05})
    seen = actions(g, row(0.3), row(0.5), row(0.46), row(), row(0.44), row(0.5))
    assert seen == [[], [], [], [], ["warn"], []]


def test_entropy_is_watched_from_below_and_kl_from_above() -> None:
    g = guard(vote_entropy={"limit": 0.1}, kl={"limit": 5, "action": "stop"})
    assert actions(
        g,
        row(**{"pseudo/vote_entropy": 0.2, "objective/kl": 4.0}),
        row(**{"pseudo/vote_entropy": 0.05, "objective/kl": 5.5}),
    ) == [[], ["warn", "stop"]]
    assert g.metrics["guard/action"] == float(ACTIONS.index("stop")), "the strongest"


def test_patience_counts_readings_in_a_row() -> None:
    g = guard(kl={"limit": 1, "patience": 2})
    high, low = row(**{"objective/kl": 2.0}), row(**{"objective/kl": 0.5})
    assert actions(g, high, low, high, row(), high, high) == [[], [], [], [], ["warn"], []]


def test_raising_mu() -> None:
    g = guard(kl={"limit": 1, "action": "raise_mu"}, raise_by=2)
    high = row(**{"objective/kl": 2.0})
    assert g.adjusted(PLAN, 0) == PLAN
    actions(g, high, high)
    assert g.adjusted(PLAN, 2).mu == pytest.approx(1.2)
    assert g.adjusted(PLAN, 2).policy_coef == 0.8
    chord = guard(is_complement=True, kl={"limit": 1, "action": "raise_mu"}, raise_by=2)
    actions(chord, high)
    assert (chord.adjusted(PLAN, 1).mu, chord.adjusted(PLAN, 1).policy_coef) == (0.6, 0.4)
    actions(chord, high)
    assert (chord.adjusted(PLAN, 1).mu, chord.adjusted(PLAN, 1).policy_coef) == (1.0, 0.0)


@pytest.mark.parametrize(("length", "frozen"), [(3, range(2, 5)), (0, range(2, 100))])
def test_freezing(length: int, frozen: range) -> None:
    g = guard(kl={"limit": 1, "action": "freeze"}, freeze_steps=length)
    actions(g, row(), row(**{"objective/kl": 2.0}))  # after step 2: steps 0 and 1 are over
    assert [step for step in range(2, 100) if g.is_frozen(step)] == list(frozen)
    assert g.adjusted(PLAN, 2).prompts == {"labelled": 2, "verifiable": 3, "unlabelled": 0}


def test_raising_again_and_again_has_an_end() -> None:
    g = guard(kl={"limit": 1, "action": "raise_mu"}, raise_by=3, raise_at_most=10)
    for step in range(1, 50):
        g.observe(step, {"objective/kl": 2.0})
    assert g.adjusted(PLAN, 50).mu == pytest.approx(3.0)


def test_a_roll_back_freezes_and_forgets() -> None:
    g = guard(gap={"limit": 0.1, "action": "roll_back", "patience": 2})
    assert actions(g, row(0.5, 0.9), row(0.5, 0.9)) == [[], ["roll_back"]]
    g.observe(3, row(reward=1.0))
    g.rolled_back(3)
    assert g.is_frozen(3)
    g.observe(4, row(accuracy=0.5))
    assert g.metrics["guard/gap"] is None, "rewards of the time before are gone"


def test_it_goes_on_from_a_checkpoint() -> None:
    checks = {
        "gap": {"limit": 0.1, "action": "raise_mu", "patience": 2},
        "drop": {"limit": 0.05, "action": "freeze"},
        "freeze_steps": 2,
    }
    rows = [row(0.5, 0.9), row(reward=0.9), row(0.5, 0.8), row(0.4, 0.9), row(0.3, 0.9), row(0.5)]
    whole = guard(**checks)
    expected = actions(whole, *rows)
    assert expected == [[], [], ["raise_mu"], ["freeze"], ["raise_mu", "freeze"], []]
    for stop in range(1, len(rows)):
        first, second = guard(**checks), guard(**checks)
        before = actions(first, *rows[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = [
            [d.action for d in second.observe(step, rows[step - 1])]
            for step in range(stop + 1, len(rows) + 1)
        ]
        assert before + after == expected
        assert second.adjusted(PLAN, 5) == whole.adjusted(PLAN, 5)
