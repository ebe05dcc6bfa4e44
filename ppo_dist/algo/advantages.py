"""Advantages and returns from per-token rewards and values.

Every estimator takes rewards_BR, values_BR, mask_BR, value_end_B and group_B (the number of the
prompt that a row responds to), and gives (advantages_BR, returns_BR), zero where the mask is 0.
What stands in the inputs where the mask is 0 has no effect. Those without a critic ignore values
and give returns that are not learned from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

TINY = 1e-6


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
        group_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See above."""
        next_BR = _next_live(values_BR, mask_BR, value_end_B)
        delta_BR = torch.where(mask_BR, rewards_BR + self.gamma * next_BR - values_BR, 0.0)
        # a token that is masked out hands on what comes after it
        decay_BR = torch.ones_like(delta_BR).masked_fill(mask_BR, self.gamma * self.lam)
        advantages_BR = torch.where(mask_BR, _discounted(delta_BR, decay_BR), 0.0)
        returns_BR = torch.where(mask_BR, advantages_BR + values_BR, 0.0)
        return advantages_BR, returns_BR


@dataclass(frozen=True)
class GroupMean:
    """A = (R − mean of the group) / (std of the group + 10⁻⁶), the same for all tokens of a
    response; R is the sum of its rewards. A group of one, or of equal rewards, teaches nothing.

    Source: Shao et al. 2024 (GRPO), arXiv:2402.03300, section 4.1.2, with the unbiased deviation;
    without std: Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783.
    """

    std: bool = True

    def __call__(
        self,
        rewards_BR: torch.Tensor,
        values_BR: torch.Tensor,
        mask_BR: torch.Tensor,
        value_end_B: torch.Tensor,
        group_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See above."""
        reward_B, count_B, total_B = _group_sums(rewards_BR, mask_BR, group_B)
        centred_B = reward_B - total_B / count_B
        if self.std:
            squares_B = _sum_by(centred_B**2, group_B)
            centred_B = centred_B / ((squares_B / (count_B - 1).clamp(min=1)).sqrt() + TINY)
        return _spread(centred_B, mask_BR)


@dataclass(frozen=True)
class Rloo:
    """A = R − mean of the other responses' R, the same for all tokens of a response. A group of one
    teaches nothing.

    Source: Ahmadian et al. 2024, arXiv:2402.14740, eq. 7 (Kool et al. 2019).
    """

    def __call__(
        self,
        rewards_BR: torch.Tensor,
        values_BR: torch.Tensor,
        mask_BR: torch.Tensor,
        value_end_B: torch.Tensor,
        group_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See above."""
        reward_B, count_B, total_B = _group_sums(rewards_BR, mask_BR, group_B)
        others_B = (total_B - reward_B) / (count_B - 1).clamp(min=1)
        return _spread(torch.where(count_B > 1, reward_B - others_B, 0.0), mask_BR)


@dataclass(frozen=True)
class ReinforcePlusPlus:
    """A_t = Σ_{t' ≥ t} γ^(t'−t) r_t' over the masked-in tokens; whitening over the step follows.

    Source: Hu et al. 2025, arXiv:2501.03262, eq. 6 to 8.
    """

    gamma: float = 1.0

    def __call__(
        self,
        rewards_BR: torch.Tensor,
        values_BR: torch.Tensor,
        mask_BR: torch.Tensor,
        value_end_B: torch.Tensor,
        group_B: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See above: that is GAE with values of 0 and λ = 1."""
        nothing, no_end_B = torch.zeros_like(rewards_BR), rewards_BR.new_zeros(len(rewards_BR))
        return Gae(self.gamma, 1.0)(rewards_BR, nothing, mask_BR, no_end_B, group_B)


def _discounted(delta_BR: torch.Tensor, decay_BR: torch.Tensor) -> torch.Tensor:
    """A_t = δ_t + decay_t·A_{t+1}: in all stretches of √R tokens at once, as if nothing came after
    them, and then stretch by stretch from the last on; so in 2√R operations and not in R.
    """
    rows, width = delta_BR.shape
    length = max(math.isqrt(width), 1)
    stretches = -(-width // length)
    more = (0, stretches * length - width)
    made, decay = (
        functional.pad(table, more).view(rows, stretches, length).permute(2, 1, 0).contiguous()
        for table in (delta_BR, decay_BR)
    )
    for t in reversed(range(length - 1)):
        made[t].addcmul_(decay[t], made[t + 1])
        decay[t].mul_(decay[t + 1])
    for stretch in reversed(range(stretches - 1)):
        made[:, stretch].addcmul_(decay[:, stretch], made[0, stretch + 1])
    return made.permute(2, 1, 0).reshape(rows, stretches * length)[:, :width]


def _next_live(
    values_BR: torch.Tensor, mask_BR: torch.Tensor, value_end_B: torch.Tensor
) -> torch.Tensor:
    """At each token the value at the next one that is masked in; after the last, `value_end`."""
    width = values_BR.shape[1]
    own_BR = torch.arange(width).expand_as(mask_BR).masked_fill(~mask_BR, width)
    later_BR = functional.pad(own_BR, (0, 1), value=width)[:, 1:]
    at_BR = later_BR.flip(1).cummin(1).values.flip(1)
    ended = torch.cat([values_BR, value_end_B[:, None].to(values_BR.dtype)], 1)
    return ended.gather(1, at_BR)


def _group_sums(
    rewards_BR: torch.Tensor, mask_BR: torch.Tensor, group_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(reward_B of the response, count_B and total_B of its group)."""
    reward_B = torch.where(mask_BR, rewards_BR, 0.0).sum(1)
    return reward_B, _sum_by(torch.ones_like(reward_B), group_B), _sum_by(reward_B, group_B)


def _sum_by(values_B: torch.Tensor, group_B: torch.Tensor) -> torch.Tensor:
    """For each row, the sum over the rows of its group."""
    _, inverse_B = torch.unique(group_B, return_inverse=True)
    sums = torch.zeros_like(values_B).index_add(0, inverse_B, values_B)
    return sums[inverse_B]


def _spread(advantage_B: torch.Tensor, mask_BR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    advantages_BR = advantage_B[:, None] * mask_BR.to(advantage_B.dtype)
    return advantages_BR, advantages_BR
