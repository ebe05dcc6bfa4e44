"""Reward models from pairs: the loss, the accuracy, and where a score is read."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def preference_loss(
    chosen_B: torch.Tensor, rejected_B: torch.Tensor, margin_B: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """−log σ(r_chosen − r_rejected − margin), per pair.

    Source: Bradley and Terry 1952, as in Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin:
    Touvron et al. 2023, arXiv:2307.09288, eq. 2.
    """
    return -F.logsigmoid(chosen_B - rejected_B - margin_B)


def preference_accuracy(chosen_B: torch.Tensor, rejected_B: torch.Tensor) -> torch.Tensor:
    """Per pair 1 if the chosen response scores higher, ½ for a tie, else 0."""
    return (chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()


def last_token_scores(scores_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """scores_B: each row's score at its last masked-in token, on whichever side the padding is.

    Raises:
        ValueError: a row has no token.
    """
    if not mask_BT.any(1).all():
        raise ValueError("a row without tokens has no score")
    position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = (position_T * mask_BT).argmax(1)
    # a row whose only token is the first has 0 everywhere, and argmax 0
    return scores_BT.gather(1, last_B[:, None])[:, 0]
