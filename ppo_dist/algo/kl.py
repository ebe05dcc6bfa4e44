"""KL divergence between the policy and its reference, per token, and the coefficient of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from ppo_dist.config.algorithm import AdaptiveKl, FixedKl

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before exp: one wild token cannot make an infinite loss."""


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log π − log π_ref of the sampled tokens: the unbiased one-sample estimate of KL(π‖π_ref).

    Source: Schulman 2020, "Approximating KL Divergence", estimator k1. It may be negative for one
    token. As a loss it does nothing: its expected gradient is 0.
    """
    return logprobs - reference


def k2(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """½(log π − log π_ref)²: biased, never negative; on samples of π its gradient is an unbiased
    estimate of that of KL(π‖π_ref), which makes it the one to use as a loss.

    Source: Schulman 2020, estimator k2.
    """
    return 0.5 * (logprobs - reference) ** 2


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """exp(−d) − 1 + d with d = log π − log π_ref: unbiased and never negative. Its gradient is that
    of the *forward* KL(π_ref‖π), not of what it estimates.

    Source: Schulman 2020, estimator k3. −d is clamped to ± MAX_LOG_RATIO inside exp alone, so that
    a token far from the reference still has the gradient of the linear part.
    """
    d = logprobs - reference
    return (-d).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1 + d


ESTIMATORS: Mapping[
    Literal["k1", "k2", "k3"], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
] = {"k1": k1, "k2": k2, "k3": k3}


class KlController:
    """The coefficient β of the KL penalty, step by step.

    Adaptive: β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon) after each step of n responses, where
    KL is the mean over responses of the sum over tokens of log π − log π_ref. Where n is
    several horizons, β is halved at most: it would turn negative.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, coef: float, controller: FixedKl | AdaptiveKl) -> None:
        self.coef = coef
        self._controller = controller

    def observe(self, kl: float, responses: int) -> None:
        """Sees the KL of a finished step; the next step has another coefficient."""
        if isinstance(self._controller, AdaptiveKl):
            error = min(max(kl / self._controller.target - 1, -0.2), 0.2)
            self.coef *= max(1 + error * responses / self._controller.horizon, 0.5)

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from a saved coefficient; a fixed one is what the config says now."""
        if isinstance(self._controller, AdaptiveKl):
            self.coef = state["coef"]
