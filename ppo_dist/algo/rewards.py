"""From scores of whole responses to rewards of tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def penalised_rewards(
    scores_B: torch.Tensor, kl_BR: torch.Tensor, mask_BR: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Per-token rewards r_t = −β·KL_t, plus the score of the sequence at its last masked-in token.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2, spread over tokens as in Ouyang et al.
    2022, arXiv:2203.02155. A row without any masked-in token gets none.
    """
    rewards_BR = torch.where(mask_BR, kl_BR, 0.0).mul_(-kl_coef)
    (live_B,) = torch.where(mask_BR.any(1))
    if len(live_B):
        last_B = mask_BR.shape[1] - 1 - mask_BR[live_B].flip(1).byte().argmax(1)
        rewards_BR[live_B, last_B] += scores_B[live_B].to(rewards_BR.dtype)
    return rewards_BR


class RunningScale:
    """The standard deviation of all scores seen so far, by Welford's update in chunks.

    Dividing by it keeps the sign and the mean's meaning, and bounds the size of advantages.
    Source: Engstrom et al. 2020, arXiv:2005.12729, "reward scaling"; the update: Chan et al. 1979.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def observe(self, scores_B: torch.Tensor) -> None:
        """Adds scores to the statistics."""
        count = len(scores_B)
        if not count:
            return
        mean = float(scores_B.mean())
        squares = float(((scores_B - mean) ** 2).sum())
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Unbiased; 1 as long as the scores do not differ."""
        if self.count < 2 or self.squares <= 0:
            return 1.0
        return float((self.squares / (self.count - 1)) ** 0.5)

    def state_dict(self) -> dict[str, float]:
        """All that the deviation follows from."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Goes on from saved statistics."""
        self.count = int(state["count"])
        self.mean, self.squares = state["mean"], state["squares"]
