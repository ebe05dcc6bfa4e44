"""The loss terms, per token. Sums and the division by global counts happen in one place:
learner/losses.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before exp: one wild token cannot make an infinite loss."""


class PolicyTerm(NamedTuple):
    """Per token: the loss, 1 where the clipped branch is the larger loss, and the k3 estimate of
    KL(π_old‖π).
    """

    loss: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor


class ValueTerm(NamedTuple):
    """Per token: the loss, and 1 where the clipped branch is the larger loss."""

    loss: torch.Tensor
    clipped: torch.Tensor


def policy_term(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> PolicyTerm:
    """−min(r·A, clip(r, 1−ε, 1+ε)·A) with r = exp(log π − log π_old).

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7. KL: Schulman 2020, estimator k3, exp(d) −
    1 − d.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip, 1 + clip) * advantages
    return PolicyTerm(
        torch.maximum(plain, clipped), (clipped > plain).float(), ratio - 1 - log_ratio
    )


def value_term(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> ValueTerm:
    """½·max((V − G)², (V_old + clip(V − V_old, ±ε) − G)²).

    Source: the clipped value loss of OpenAI baselines' ppo2, as described in Huang et al. 2022,
    "The 37 Implementation Details of Proximal Policy Optimization", detail 9.
    """
    plain = (values - returns) ** 2
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    return ValueTerm(0.5 * torch.maximum(plain, clipped), (clipped > plain).float())
