"""How much of each kind of learning there is at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ppo_dist.config.algorithm import Complement, Mix
from ppo_dist.config.base import (
    ORIGINS,
    Adaptive,
    AnyMixScalar,
    AnyScalar,
    Constant,
    Cosine,
    Linear,
    Origin,
    Piecewise,
    SupervisedFirst,
)
from ppo_dist.types import MixPlan

LARGEST = 50.0  # an exponent beyond which every bound is reached


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


class Controller:
    """The present value of an `adaptive` number: see config.base.Adaptive for the rule."""

    def __init__(self, section: Adaptive) -> None:
        self._section = section
        self.value = section.start
        self._first: float | None = None
        self._best = math.inf

    def observe(self, metrics: Mapping[str, float | None]) -> None:
        """Sees a metrics row; only one with an evaluation matters."""
        section = self._section
        now = metrics.get(f"eval/held_out/{section.signal}")
        if now is None:
            return
        badness = now if section.signal == "nll" else 1 - now
        self._first = badness if self._first is None else self._first
        self._best = min(badness, self._best)
        gained, lost = self._first - self._best, badness - self._best
        base = max(section.low, section.start * math.exp(-section.gain * gained))
        self.value = min(section.high, base * math.exp(min(section.gain * lost, LARGEST)))

    def state_dict(self) -> dict[str, float | None]:
        """The value, and the first and the best evaluation."""
        best = self._best if self._first is not None else None
        return {"value": self.value, "first": self._first, "best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""
        self.value, self._first = state["value"], state["first"]
        self._best = math.inf if state["best"] is None else state["best"]


class Scheduled:
    """The mix as the config schedules it: by the step alone, but for numbers that are adaptive."""

    def __init__(self, mix: Mix) -> None:
        self._mix = mix
        schedule = mix.schedule
        mu = schedule.then if isinstance(schedule, SupervisedFirst) else schedule
        scalars: dict[str, AnyMixScalar] = {
            "mu": mu,
            "labelled_batch": mix.labelled_batch,
            **{f"shares.{origin}": dict(mix.shares)[origin] for origin in ORIGINS},
        }
        if not isinstance(mix.policy_coef, Complement):
            scalars["policy_coef"] = mix.policy_coef
        self._scalars = scalars
        self._controllers = {
            name: Controller(scalar)
            for name, scalar in scalars.items()
            if isinstance(scalar, Adaptive)
        }

    def plan(self, step: int) -> MixPlan:
        """What step number `step` is made of; in the supervised-first phase no prompts and no
        policy loss.
        """
        mix, schedule = self._mix, self._mix.schedule
        labelled = round(self._value("labelled_batch", step))
        if isinstance(schedule, SupervisedFirst):
            if step < schedule.steps:
                return MixPlan(dict.fromkeys(ORIGINS, 0), labelled, mu=schedule.mu, policy_coef=0.0)
            mu = self._value("mu", step - schedule.steps)
        else:
            mu = self._value("mu", step)
        shares: dict[Origin, float] = {
            origin: self._value(f"shares.{origin}", step) for origin in ORIGINS
        }
        prompts = apportion(round(value_at(mix.prompts, step)), shares)
        is_complement = isinstance(mix.policy_coef, Complement)
        policy_coef = 1.0 - mu if is_complement else self._value("policy_coef", step)
        return MixPlan(prompts, labelled if mu > 0 else 0, mu, policy_coef)

    def _value(self, name: str, step: int) -> float:
        scalar = self._scalars[name]
        return (
            self._controllers[name].value
            if isinstance(scalar, Adaptive)
            else value_at(scalar, step)
        )

    def observe(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Adaptive numbers follow the evaluations."""
        for controller in self._controllers.values():
            controller.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Of the adaptive numbers; the step decides all others."""
        return {name: c.state_dict() for name, c in self._controllers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""
        for name, controller in self._controllers.items():
            controller.load_state_dict(state[name])
