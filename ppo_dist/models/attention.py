"""Causal attention over tables of sequences: torch's own, or, where that is slow, as products."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from ppo_dist.device import attends_by_products, attention_dtype

LINE = 32
"""Numbers of bf16 in a register of a CPU and in a line of its cache; a softmax over a multiple of
them takes half the time.
"""
TABLE = 1 << 21
"""Scores that exist at one time at most, as long as those of one sequence's heads that share keys
fit: a cache holds them, and memory does not grow with tokens × tokens × sequences.
"""


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """softmax(scale·Q·Kᵀ)·V, where a token sees those up to itself: (rows, heads, queries, head
    dimension), keys and values (rows, heads, keys, head dimension), to the shape of the queries,
    which are those of the last keys. Keys and values may have fewer heads, each for as many
    queries' heads.
    """
    if attends_by_products(key, query.dtype):
        return by_products(query, key.to(query.dtype), value.to(query.dtype), scale)
    queries, keys, values = (table.to(attention_dtype(query)) for table in (query, key, value))
    seen = causal_lower_right(query.shape[2], key.shape[2])
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=grouped
    )
    return out.to(query.dtype)


def by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """The same; the queries of all heads that share keys are one matrix. Scores, weights and their
    gradients are rounded to the inputs' format.
    """
    rows, heads, queries, size = query.shape
    shared, tokens = key.shape[1:3]
    more = -tokens % LINE
    keys, values = (
        F.pad(table, (0, 0, 0, more)).reshape(rows * shared, tokens + more, -1)
        for table in (key, value)
    )
    grouped = query.reshape(rows * shared, heads // shared * queries, size)
    hidden = _later(queries, tokens, more, heads // shared, query.dtype)
    scale = size**-0.5 if scale is None else scale
    out: torch.Tensor = _Products.apply(grouped, keys, values, hidden, scale)  # type: ignore[no-untyped-call]
    return out.reshape(rows, heads, queries, -1)


class _Products(torch.autograd.Function):
    """Keeps no table of tokens × tokens for backward: it is made again there."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, hidden)
        ctx.scale = scale
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for o, q, k, v in _parts(key.shape[1], out, query, key, value):
            torch.bmm(_weights(q, k, hidden, scale), v, out=o)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, hidden = ctx.saved_tensors
        made = d_query, d_key, d_value = tuple(map(torch.empty_like, (query, key, value)))
        for q, k, v, do, dq, dk, dv in _parts(key.shape[1], query, key, value, d_out, *made):
            weights = _weights(q, k, hidden, ctx.scale)
            torch.bmm(weights.mT, do, out=dv)
            # of a softmax: dS = P∘(dP − Σ P∘dP)
            d_weights = torch.bmm(do, v.mT)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_scores.mul_(ctx.scale)
            torch.bmm(d_scores, k, out=dq)
            torch.bmm(d_scores.mT, q, out=dk)
        return d_query, d_key, d_value, None, None


def _parts(tokens: int, *tables: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """As many rows at a time as have TABLE scores; `tables[0]` is of queries."""
    at_a_time = max(TABLE // (tables[0].shape[1] * tokens), 1)
    return zip(*(torch.split(table, at_a_time) for table in tables), strict=True)


@functools.lru_cache(maxsize=8)  # as many as a row has tables; each is that of all its layers
@torch.inference_mode(False)
def _later(queries: int, tokens: int, more: int, times: int, dtype: torch.dtype) -> torch.Tensor:
    """−∞ where the queries of the last tokens must not look, for as many heads."""
    later = torch.full((queries, tokens + more), -math.inf, dtype=dtype)
    return later.triu(tokens - queries + 1).repeat(times, 1)


def _weights(
    query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    return torch.baddbmm(hidden, query, key.mT, alpha=scale).softmax(-1)
