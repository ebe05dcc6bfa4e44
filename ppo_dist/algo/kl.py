"""KL divergence between the policy and its reference, per token."""

from __future__ import annotations

import torch


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log π − log π_ref of the sampled tokens: the unbiased one-sample estimate of KL(π‖π_ref).

    Source: Schulman 2020, "Approximating KL Divergence", estimator k1. It may be negative for one
    token.
    """
    return logprobs - reference


def penalised_rewards(
    scores_B: torch.Tensor, kl_BR: torch.Tensor, mask_BR: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Per-token rewards r_t = −β·KL_t, plus the score of the sequence at its last masked-in token.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, spread over tokens as in Ouyang et al.
    2022, arXiv:2203.02155. A row without any masked-in token gets none.
    """
    mask = mask_BR.to(kl_BR.dtype)
    is_last_BR = mask_BR & (mask.flip(1).cumsum(1).flip(1) == 1)
    return -kl_coef * kl_BR * mask + is_last_BR.to(kl_BR.dtype) * scores_B[:, None]
