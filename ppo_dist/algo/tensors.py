"""Small tools on masked tables of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ppo_dist.types import Floats

MIN_VARIANCE = 1e-12
"""Below it all values count as equal."""


def pad(rows: Sequence[Floats]) -> tuple[torch.Tensor, torch.Tensor]:
    """(values_BR, mask_BR) in float64: rows of unequal length with zeros at their right."""
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = max(map(len, rows), default=0)
    values_BR = np.zeros((len(rows), width))
    for place_R, row in zip(values_BR, rows, strict=True):
        place_R[: len(row)] = row
    return torch.from_numpy(values_BR), torch.arange(width) < lengths_B[:, None]


def blocks(group_B: Sequence[int], lengths_B: Sequence[int], limit: int) -> list[list[int]]:
    """The numbers of rows in parts whose padded tables have at most `limit` entries, or hold a
    single group. Groups stay whole.
    """
    groups: dict[int, list[int]] = {}
    for b, group in enumerate(group_B):
        groups.setdefault(group, []).append(b)
    made: list[list[int]] = []
    width = 0
    for rows in groups.values():
        own = max(lengths_B[b] for b in rows)
        if made and (len(made[-1]) + len(rows)) * max(width, own) <= limit:
            made[-1] += rows
            width = max(width, own)
        else:
            made.append(rows)
            width = own
    return made


def whiten(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Mean 0 and (unbiased) variance 1 over all values of all rows, which may differ in length;
    0 where all are equal, and a single value as it is.

    Call it once on everything that a step learns from. Per rank or per micro-batch it gives other
    signs.
    """
    # by numpy, which takes a large table in huge pages
    flat = torch.from_numpy(np.concatenate([row.numpy() for row in rows]))
    if flat.numel() < 2:
        return list(rows)
    variance, mean = torch.var_mean(flat)
    deviation = torch.sqrt(variance) if variance >= MIN_VARIANCE else torch.ones_like(variance)
    return list(torch.split(flat.sub_(mean).div_(deviation), [len(row) for row in rows]))
