"""How much of each kind of learning there is at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ppo_dist.config.algorithm import Mix
from ppo_dist.config.base import (
    ORIGINS,
    AnyScalar,
    Constant,
    Cosine,
    Linear,
    Origin,
    Piecewise,
    SupervisedFirst,
)
from ppo_dist.types import MixPlan


def value_at(scalar: AnyScalar, step: int) -> float:
    """The value of a scheduled number at a step, counted from 0."""
    if isinstance(scalar, Piecewise):
        return [value for first, value in scalar.values if first <= step][-1]
    if step < scalar.warmup:
        return value_at(scalar, scalar.warmup) * (step + 1) / scalar.warmup
    match scalar:
        case Constant():
            return scalar.value
        case Linear():
            progress = min((step - scalar.warmup) / scalar.steps, 1.0)
            return scalar.start + (scalar.end - scalar.start) * progress
        case Cosine():
            progress = min((step - scalar.warmup) / scalar.steps, 1.0)
            wave = 0.5 * (1 + math.cos(math.pi * progress))
            return scalar.floor + (scalar.peak - scalar.floor) * wave


def apportion(total: int, weights: Mapping[Origin, float]) -> dict[Origin, int]:
    """Whole numbers that add up to `total` and follow the weights: largest remainders, ties in the
    order of ORIGINS.
    """
    whole = sum(weights.values())
    if total == 0 or whole == 0:
        return dict.fromkeys(ORIGINS, 0)
    exact = {origin: total * weights[origin] / whole for origin in ORIGINS}
    counts = {origin: math.floor(exact[origin]) for origin in ORIGINS}
    by_remainder = sorted(ORIGINS, key=lambda origin: counts[origin] - exact[origin])
    for origin in by_remainder[: total - sum(counts.values())]:
        counts[origin] += 1
    return counts


class Scheduled:
    """The mix as the config schedules it: constant, linear, cosine, piecewise, or supervised first.
    It has no state.
    """

    def __init__(self, mix: Mix) -> None:
        self._mix = mix

    def plan(self, step: int) -> MixPlan:
        """What step number `step` is made of; in the supervised-first phase no prompts and no
        policy loss.
        """
        mix, schedule = self._mix, self._mix.schedule
        labelled = round(value_at(mix.labelled_batch, step))
        if isinstance(schedule, SupervisedFirst):
            if step < schedule.steps:
                return MixPlan(dict.fromkeys(ORIGINS, 0), labelled, mu=schedule.mu, policy_coef=0.0)
            mu = value_at(schedule.then, step - schedule.steps)
        else:
            mu = value_at(schedule, step)
        shares: dict[Origin, float] = {
            "labelled": value_at(mix.shares.labelled, step),
            "verifiable": value_at(mix.shares.verifiable, step),
            "unlabelled": value_at(mix.shares.unlabelled, step),
        }
        prompts = apportion(round(value_at(mix.prompts, step)), shares)
        policy_coef = 1.0 - mu if mix.policy_coef == "complement" else float(mix.policy_coef)
        return MixPlan(prompts, labelled if mu > 0 else 0, mu, policy_coef)

    def observe(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Fixed schedules learn nothing from a step."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step decides all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on from."""
