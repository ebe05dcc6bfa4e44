"""Small tools on masked tables of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ppo_dist.types import Floats


def pad(rows: Sequence[Floats]) -> tuple[torch.Tensor, torch.Tensor]:
    """(values_BR, mask_BR) in float64: rows of unequal length with zeros at their right."""
    width = max((len(row) for row in rows), default=0)
    values_BR = torch.zeros(len(rows), width, dtype=torch.float64)
    mask_BR = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        values_BR[b, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.float64))
        mask_BR[b, : len(row)] = True
    return values_BR, mask_BR


def whiten(
    values: torch.Tensor,
    mask: torch.Tensor,
    groups_B: torch.Tensor | None = None,
    min_variance: float = 1e-12,
) -> torch.Tensor:
    """Mean 0 and (unbiased) variance 1 over all masked-in values, or over those of each group of
    rows; 0 where all are equal, and a single value as it is.

    Call it once on everything that a step learns from. Per rank or per micro-batch it gives other
    signs.
    """
    if groups_B is not None:
        for group in torch.unique(groups_B):
            values = whiten(values, mask & (groups_B == group)[:, None], None, min_variance)
        return values
    live = values[mask]
    if live.numel() < 2:
        return values
    variance, mean = torch.var_mean(live)
    deviation = torch.sqrt(variance) if variance >= min_variance else torch.ones_like(variance)
    return torch.where(mask, (values - mean) / deviation, values)
