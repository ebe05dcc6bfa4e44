"""The loss terms, per token. Sums and the division by global counts happen in one place:
learner/losses.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ppo_dist.algo.kl import MAX_LOG_RATIO
from ppo_dist.config.algorithm import Clip


class PolicyTerm(NamedTuple):
    """Per token: the loss, 1 where a bound decides it, the k3 and k1 estimates of KL(π_old‖π)."""

    loss: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor
    kl_k1: torch.Tensor


class SupervisedTerm(NamedTuple):
    """Per token: the loss, and the plain cross-entropy."""

    loss: torch.Tensor
    nll: torch.Tensor


class ValueTerm(NamedTuple):
    """Per token: the loss, and 1 where the clipped branch is the larger loss."""

    loss: torch.Tensor
    clipped: torch.Tensor


def correction(
    old_logprobs_R: torch.Tensor,
    behaviour_logprobs_R: torch.Tensor,
    cap: float | None,
    over: Literal["token", "prefix"],
) -> torch.Tensor:
    """min(π_old / π_behaviour, cap) of each token, or of it and all before it in the response: the
    weight of its policy term.

    Source: Hilton et al. 2021, arXiv:2110.00641, eq. 3; cut as in Espeholt et al. 2018,
    arXiv:1802.01561, section 4.1; over the prefix: Precup et al. 2000, per-decision importance
    sampling.
    """
    log_ratio_R = old_logprobs_R - behaviour_logprobs_R
    if over == "prefix":
        log_ratio_R = log_ratio_R.cumsum(0)
    return log_ratio_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(0.0, cap)


def policy_term(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: Clip
) -> PolicyTerm:
    """−min(r·A, clip(r, 1−ε_low, 1+ε_high)·A) with r = exp(log π − log π_old); where A < 0 and
    there is a dual bound c, at most −c·A.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; two bounds: Yu et al. 2025,
    arXiv:2503.14476, eq. 10; dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 3. KL: Schulman 2020,
    estimators k3, exp(d) − 1 − d, and k1, −d.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if clip.dual is not None:
        limit = -clip.dual * advantages
        over = (advantages < 0) & (loss > limit)
        loss, clipped = torch.where(over, limit, loss), clipped | over
    return PolicyTerm(loss, clipped.float(), ratio - 1 - log_ratio, -log_ratio)


def supervised_term(logprobs: torch.Tensor, kind: Literal["nll", "phi"]) -> SupervisedTerm:
    """−log p, or −φ·log p with φ = p(1−p), through which no gradient goes.

    φ is small for tokens that the policy is sure of and for those it finds absurd. Source: CHORD-φ,
    Zhang et al. 2025, arXiv:2508.11408.
    """
    if kind == "nll":
        return SupervisedTerm(-logprobs, -logprobs)
    probability = logprobs.detach().exp()
    return SupervisedTerm(-probability * (1 - probability) * logprobs, -logprobs)


def value_term(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> ValueTerm:
    """½·max((V − G)², (clip(V, V_old ± ε) − G)²), or ½(V − G)² without ε.

    Source: the clipped value loss of OpenAI baselines' ppo2, as described in Huang et al. 2022,
    "The 37 Implementation Details of Proximal Policy Optimization", detail 9.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return ValueTerm(0.5 * plain, torch.zeros_like(plain))
    # exactly V within the bounds, where V_old + (V − V_old) would be V but for rounding
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns) ** 2
    return ValueTerm(0.5 * torch.maximum(plain, clipped), (clipped > plain).float())
