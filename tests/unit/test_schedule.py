"""Scheduled numbers, the apportionment of prompts, the plan of a step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

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


# ── adaptive ──────────────────────────────────────────────────────────────────────────────────────

ADAPTIVE = {"kind": "adaptive", "start": 1.0, "low": 0.1, "high": 4.0, "gain": 6.0}


def adaptive(**changes: Any) -> Scheduled:
    return Scheduled(Mix.model_validate({"schedule": {**ADAPTIVE, **changes}}))


def follow(schedule: Scheduled, key: str, readings: Sequence[float | None]) -> list[float]:
    mus = []
    for step, reading in enumerate(readings):
        schedule.observe(step, {f"eval/held_out/{key}": reading})
        mus.append(schedule.plan(step + 1).mu)
    return mus


def test_adaptive_falls_with_the_best_and_rises_while_worse() -> None:
    mus = follow(adaptive(), "nll", [2.0, None, 1.9, 0.5, 0.7, 3.0, 0.5])
    e = math.exp
    assert mus == pytest.approx([1.0, 1.0, e(-0.6), 0.1, 0.1 * e(1.2), 4.0, 0.1])
    by_accuracy = follow(adaptive(signal="accuracy"), "accuracy", [0.5, 0.6, 0.5, 0.0])
    assert by_accuracy == pytest.approx([1.0, e(-0.6), 1.0, 4.0])
    assert follow(adaptive(), "accuracy", [0.1, 0.9]) == [1.0, 1.0], "not its signal"
    assert follow(adaptive(), "nll", [0.5, 1e9]) == [1.0, 4.0], "nothing overflows"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 50)), st.floats(0.1, 20))
def test_adaptive_keeps_its_bounds(readings: list[float], gain: float) -> None:
    assert all(0.1 <= mu <= 4.0 for mu in follow(adaptive(gain=gain), "nll", readings))


def test_adaptive_goes_on_from_a_checkpoint() -> None:
    readings = [2.0, 1.5, 1.9, 0.9, 1.0]
    expected = follow(adaptive(), "nll", readings)
    for stop in range(len(readings)):
        first, second = adaptive(), adaptive()
        before = follow(first, "nll", readings[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + follow(second, "nll", readings[stop:]) == expected


def test_any_number_of_the_mix_may_be_adaptive() -> None:
    mix = {
        "schedule": {"kind": "supervised_first", "steps": 2, "then": ADAPTIVE},
        "prompts": 100,
        "shares": {"labelled": {**ADAPTIVE, "start": 0.5}, "verifiable": 0.5},
        "labelled_batch": {**ADAPTIVE, "start": 8, "low": 2, "high": 20},
        "policy_coef": ADAPTIVE,
    }
    schedule = Scheduled(Mix.model_validate(mix))
    assert schedule.plan(0) == MixPlan(NONE, 8, 1.0, 0.0)
    plan = schedule.plan(2)
    assert (plan.prompts["labelled"], plan.labelled, plan.mu) == (50, 8, 1.0)
    follow(schedule, "nll", [0.5, 9.0])
    plan = schedule.plan(3)
    assert (plan.prompts["labelled"], plan.labelled, plan.mu, plan.policy_coef) == (89, 20, 4, 4)


def recovery(schedule: Any, seed: int) -> tuple[int, float]:
    """Steps until a policy is at four fifths of its accuracy again after the right answers change,
    and the mean μ.

    The policy (a linear softmax) imitates labels, and is rewarded on unlabelled prompts for what it
    thinks likeliest, as votes do: that holds it where it is.
    """
    draw = torch.Generator().manual_seed(seed)
    labelled, held_out, unlabelled = (torch.randn(400, 16, generator=draw) for _ in range(3))
    worlds = [torch.randn(8, 16, generator=draw) for _ in range(2)]
    policy = torch.zeros(8, 16, requires_grad=True)
    scheduled, accuracies, mus = Scheduled(Mix.model_validate({"schedule": schedule})), [], []
    for step in range(160):
        world = worlds[step >= 80]
        plan = scheduled.plan(step)
        votes = (unlabelled @ policy.T).softmax(-1).max(-1).values
        nll = F.cross_entropy(labelled @ policy.T, (labelled @ world.T).argmax(-1))
        (plan.mu * nll - plan.policy_coef * votes.mean()).backward()
        with torch.no_grad():
            policy -= 0.5 * policy.grad
            policy.grad.zero_()
            right = (held_out @ policy.T).argmax(-1) == (held_out @ world.T).argmax(-1)
        accuracies.append(float(right.float().mean()))
        mus.append(plan.mu)
        scheduled.observe(step, {"eval/held_out/accuracy": accuracies[-1]})
    recovered = [a >= 0.8 * accuracies[79] for a in accuracies[80:]]
    return recovered.index(True) if any(recovered) else 1000, sum(mus) / len(mus)


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_recovers_from_a_shift_faster_than_fixed_schedules(seed: int) -> None:
    steps, mean = recovery({**ADAPTIVE, "signal": "accuracy"}, seed)
    assert steps < 20
    fixed = (
        0.1,
        0.5,
        1.25,  # more supervision than the adaptive one uses on average
        {"kind": "linear", "start": 1, "end": 0.1, "steps": 80},
        {"kind": "cosine", "peak": 1, "floor": 0.1, "warmup": 5, "steps": 80},
        {"kind": "supervised_first", "steps": 20, "then": 0.3},
    )
    assert mean < 1.25
    for schedule in fixed:
        assert 1.5 * steps < recovery(schedule, seed)[0]
