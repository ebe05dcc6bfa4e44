"""Scheduled numbers, the apportionment of prompts, the plan of a step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_dist.config.algorithm import Mix
from ppo_dist.config.base import (
    ORIGINS,
    Constant,
    Cosine,
    Linear,
    Piecewise,
    SupervisedFirst,
    peak,
)
from ppo_dist.semi.schedule import Scheduled, apportion, value_at
from ppo_dist.types import MixPlan

NONE = {"labelled": 0, "verifiable": 0, "unlabelled": 0}


def test_constant() -> None:
    assert [value_at(Constant(value=0.3), step) for step in (0, 1, 999)] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(("step", "value"), [(0, 1.0), (1, 2.0), (3, 4.0), (4, 5.0), (50, 5.0)])
def test_linear(step: int, value: float) -> None:
    assert value_at(Linear(kind="linear", start=1, end=5, steps=4), step) == value


def test_a_warm_up_comes_before_constant_and_linear() -> None:
    constant = Constant(value=2.0, warmup=4)
    assert [value_at(constant, s) for s in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    linear = Linear(kind="linear", start=4, end=0, warmup=2, steps=4)
    assert [value_at(linear, s) for s in (0, 1, 2, 3, 6, 7)] == [2.0, 4.0, 4.0, 3.0, 0.0, 0.0]


def test_linear_may_fall() -> None:
    falling = Linear(kind="linear", start=1, end=0, steps=4)
    assert [value_at(falling, step) for step in (0, 1, 4, 5)] == [1.0, 0.75, 0.0, 0.0]


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.5),  # the warm-up ends at the peak: 1/4, 2/4, 3/4, 4/4 of it
        (1, 1.0),
        (3, 2.0),
        (4, 2.0),  # and the half cosine begins there
        (6, 1.0 + 0.5 * (1 + 0.5**0.5)),
        (8, 1.5),
        (12, 1.0),
        (100, 1.0),
    ],
)
def test_cosine(step: int, value: float) -> None:
    cosine = Cosine(kind="cosine", peak=2, floor=1, warmup=4, steps=8)
    assert value_at(cosine, step) == pytest.approx(value, abs=1e-12)


def test_cosine_without_warmup_begins_at_the_peak() -> None:
    cosine = Cosine(kind="cosine", peak=3, steps=2)
    assert [value_at(cosine, s) for s in (0, 1, 2)] == pytest.approx([3, 1.5, 0], abs=1e-12)


@pytest.mark.parametrize(("step", "value"), [(0, 5), (2, 5), (3, 7), (9, 7), (10, 1), (11, 1)])
def test_piecewise(step: int, value: float) -> None:
    assert value_at(Piecewise(kind="piecewise", values=[(0, 5), (3, 7), (10, 1)]), step) == value


def test_apportion_by_hand() -> None:
    thirds = apportion(10, {"labelled": 1, "verifiable": 1, "unlabelled": 1})
    assert thirds == {"labelled": 4, "verifiable": 3, "unlabelled": 3}  # the tie goes to the first
    largest = apportion(10, {"labelled": 0.25, "verifiable": 0.06, "unlabelled": 0.69})
    assert largest == {"labelled": 2, "verifiable": 1, "unlabelled": 7}
    assert apportion(0, {"labelled": 1, "verifiable": 1, "unlabelled": 1}) == NONE
    assert apportion(5, {"labelled": 0, "verifiable": 0, "unlabelled": 0}) == NONE


weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 5000), st.tuples(weight, weight, weight))
def test_apportion_sums_up_and_is_near(total: int, weights: tuple[float, float, float]) -> None:
    counts = apportion(total, dict(zip(ORIGINS, weights, strict=True)))
    whole = sum(weights)
    assert sum(counts.values()) == (total if whole else 0)
    for origin, w in zip(ORIGINS, weights, strict=True):
        assert abs(counts[origin] - (total * w / whole if whole else 0)) < 1 + 1e-9
        if w == 0:
            assert counts[origin] == 0


def mix(**values: object) -> Mix:
    return Mix.model_validate(values)


def test_supervised_first_and_then() -> None:
    scheduled = Scheduled(
        mix(
            schedule={
                "kind": "supervised_first",
                "steps": 3,
                "mu": 0.7,
                "then": {"kind": "linear", "start": 0.4, "end": 0.0, "steps": 2},
            },
            prompts=8,
            shares={"labelled": 1, "verifiable": 3},
            labelled_batch={"kind": "piecewise", "values": [[0, 5], [4, 9]]},
        )
    )
    for step in (0, 2):
        assert scheduled.plan(step) == MixPlan(NONE, labelled=5, mu=0.7, policy_coef=0.0)
    mixed = {"labelled": 2, "verifiable": 6, "unlabelled": 0}
    assert scheduled.plan(3) == MixPlan(mixed, labelled=5, mu=0.4, policy_coef=1.0)
    assert scheduled.plan(4) == MixPlan(mixed, labelled=9, mu=0.2, policy_coef=1.0)
    # with a weight of nothing, labelled examples are not even read
    assert scheduled.plan(5) == MixPlan(mixed, labelled=0, mu=0.0, policy_coef=1.0)


def test_shares_may_move() -> None:
    moving = {"kind": "linear", "start": 1, "end": 0, "steps": 4}
    rising = {"kind": "linear", "start": 0, "end": 1, "steps": 4}
    scheduled = Scheduled(mix(prompts=4, shares={"labelled": moving, "unlabelled": rising}))
    plans = [scheduled.plan(step).prompts for step in range(6)]
    assert [p["labelled"] for p in plans] == [4, 3, 2, 1, 0, 0]
    assert [p["unlabelled"] for p in plans] == [0, 1, 2, 3, 4, 4]


def test_complement_and_fixed_policy_coef() -> None:
    falling = {"kind": "linear", "start": 0.9, "end": 0.1, "steps": 2}
    plans = [Scheduled(mix(schedule=falling, policy_coef="complement")).plan(s) for s in range(3)]
    assert [p.mu for p in plans] == pytest.approx([0.9, 0.5, 0.1])
    assert [p.policy_coef for p in plans] == pytest.approx([0.1, 0.5, 0.9])
    assert Scheduled(mix(schedule=0.3, policy_coef=0.5)).plan(0).policy_coef == 0.5


def test_total_prompts_and_no_state() -> None:
    scheduled = Scheduled(mix(prompts=7, shares={"verifiable": 2, "unlabelled": 1}))
    assert scheduled.plan(0).total_prompts == 7
    assert scheduled.state_dict() == {}
    before = scheduled.plan(5)
    scheduled.observe(4, {"policy/loss": 1.0})
    scheduled.load_state_dict({})
    assert scheduled.plan(5) == before


def test_peak_is_the_largest_value() -> None:
    assert peak(Linear(kind="linear", start=3, end=1, steps=2)) == 3
    assert peak(Cosine(kind="cosine", peak=1, floor=2, steps=2)) == 2
    assert peak(Piecewise(kind="piecewise", values=[(0, 1), (3, 7), (9, 2)])) == 7
    assert SupervisedFirst(kind="supervised_first", steps=1).then == Constant(value=0.1)
