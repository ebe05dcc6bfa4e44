"""Which token comes next, and the random numbers that decide it."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch.nn import functional as F

from ppo_dist.types import Sampling

BLOCK = 256  # tokens whose probabilities are first looked at together


def uniforms(sampling: Sampling, step: int, uid: str, index: int) -> np.ndarray:
    """The random numbers in [0, 1) of one response, one a token."""
    return np.random.Generator(np.random.Philox(key=seed(sampling, step, uid, index))).random(
        sampling.max_new_tokens
    )


def seed(sampling: Sampling, step: int, uid: str, index: int) -> int:
    """128 bits that follow from (run seed, stream, step, prompt uid, response index) alone."""
    key = f"{sampling.seed}/{sampling.stream}/{step}/{uid}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "big")


def draw(
    logits_BV: torch.Tensor, uniforms_B: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_B, logprobs_B): the inverse of the cumulative distribution at each uniform;
    temperature 0 takes the argmax. A token of probability 0 is never drawn.
    """
    logprobs_BV = (logits_BV.float() / (sampling.temperature or 1.0)).log_softmax(-1)
    if sampling.temperature == 0:
        tokens_B = logprobs_BV.argmax(-1)
    else:
        tokens_B = _inverse(_cut(logprobs_BV.exp(), sampling), uniforms_B)
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def _inverse(weights_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The first token up to which the weights, summed in float64 so that the tail of a large
    vocabulary is not lost, pass a share of their total: first its block, then the token in it.
    """
    blocks = -(-weights_BV.shape[1] // BLOCK)
    padded = F.pad(weights_BV, (0, blocks * BLOCK - weights_BV.shape[1]))
    by_block = padded.view(-1, blocks, BLOCK)
    sums_BK = by_block.sum(-1, dtype=torch.float64)
    before_BK = sums_BK.cumsum(-1) - sums_BK
    point_B1 = uniforms_B[:, None] * (before_BK + sums_BK)[:, -1:]
    # the last block that begins at or before the point and has any weight
    block_B = ((before_BK <= point_B1) & (sums_BK > 0)).double().cumsum(-1).argmax(-1)
    rows = torch.arange(len(padded), device=padded.device)
    inner_BT = by_block[rows, block_B].double().cumsum(-1)
    rest_B1 = point_B1 - before_BK[rows, block_B][:, None]
    end_B1 = torch.nextafter(inner_BT[:, -1:], torch.zeros_like(rest_B1))
    token_B = torch.searchsorted(inner_BT, torch.minimum(rest_B1, end_B1), right=True)[:, 0]
    # where weights are not numbers, any token will do: the learners notice
    return (block_B * BLOCK + token_B).clamp(max=weights_BV.shape[1] - 1)


def _cut(probabilities_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities with 0 for all but the `top_k` likeliest tokens, and for those that are not in
    the smallest set of the likeliest whose sum reaches `top_p`.
    """
    if sampling.top_k == 0 and sampling.top_p == 1:
        return probabilities_BV
    ordered, order = probabilities_BV.double().sort(dim=-1, descending=True, stable=True)
    dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
    if sampling.top_k:
        dropped[:, sampling.top_k :] = True
    return probabilities_BV.masked_fill(dropped.gather(-1, order.argsort(-1)), 0.0)
