"""Advantages and returns from per-token rewards and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gae:
    """Generalised advantage estimation on the masked-in tokens alone.

    With next(t) the next masked-in token:
        δ_t = r_t + γ·V_next(t) − V_t        A_t = δ_t + γλ·A_next(t)        G_t = A_t + V_t
    and V after the last token is `value_end` (0 where the response ended by itself).

    Source: Schulman et al. 2015, arXiv:1506.02438, eq. 11, 12 and 16.
    """

    gamma: float = 1.0
    lam: float = 0.95

    def __call__(
        self,
        rewards_BR: torch.Tensor,
        values_BR: torch.Tensor,
        mask_BR: torch.Tensor,
        value_end_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(advantages_BR, returns_BR), zero where the mask is 0; what stands there in the inputs
        has no effect.
        """
        advantages_BR = torch.zeros_like(values_BR)
        next_value_B = value_end_B.to(values_BR.dtype)
        next_advantage_B = torch.zeros_like(next_value_B)
        for t in reversed(range(values_BR.shape[1])):
            live_B = mask_BR[:, t]
            delta_B = rewards_BR[:, t] + self.gamma * next_value_B - values_BR[:, t]
            advantage_B = delta_B + self.gamma * self.lam * next_advantage_B
            advantages_BR[:, t] = torch.where(live_B, advantage_B, 0.0)
            next_advantage_B = torch.where(live_B, advantage_B, next_advantage_B)
            next_value_B = torch.where(live_B, values_BR[:, t], next_value_B)
        returns_BR = torch.where(mask_BR, advantages_BR + values_BR, 0.0)
        return advantages_BR, returns_BR
