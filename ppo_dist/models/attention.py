"""Causal attention over tables of sequences: torch's own, or, where that is slow, as products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ppo_dist.device import attention_dtype


def causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """softmax(scale·Q·Kᵀ)·V, where a token sees those up to itself: (sequences, heads, tokens, head
    dimension) to the same. Keys and values may have fewer heads, each for as many queries' heads.
    """
    dtype = attention_dtype(query)
    if dtype is None:
        return by_products(query, key, value, scale)
    queries, keys, values = (table.to(dtype) for table in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return out.to(query.dtype)


def by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """The same; the queries of all heads that share keys are one matrix."""
    rows, heads, tokens, size = query.shape
    shared = key.shape[1]
    grouped = query.reshape(rows * shared, heads // shared * tokens, size)
    keys, values = (table.reshape(rows * shared, tokens, size) for table in (key, value))
    scale = size**-0.5 if scale is None else scale
    out: torch.Tensor = _Products.apply(grouped, keys, values, scale)  # type: ignore[no-untyped-call]
    return out.reshape(rows, heads, tokens, size)


class _Products(torch.autograd.Function):
    """Keeps no table of tokens × tokens for backward: it is made again there."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return torch.bmm(_weights(query, key, scale), value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        weights = _weights(query, key, ctx.scale)
        d_weights = torch.bmm(d_out, value.mT)
        # of a softmax: dS = P∘(dP − Σ P∘dP)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_scores.mul_(ctx.scale)
        d_query, d_key = torch.bmm(d_scores, key), torch.bmm(d_scores.mT, query)
        return d_query, d_key, torch.bmm(weights.mT, d_out), None


def _weights(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    tokens = key.shape[1]
    later = torch.full((tokens, tokens), -math.inf, dtype=query.dtype, device=query.device).triu(1)
    hidden = later.repeat(query.shape[1] // tokens, 1)
    return torch.baddbmm(hidden, query, key.mT, alpha=scale).softmax(-1)
