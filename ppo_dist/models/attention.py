"""Causal attention over tables of sequences: torch's own, or, where that is slow, as products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from ppo_dist.models.kernels import attends_by_products, attention_dtype, counts_from_the_end

LINE = 32
"""Numbers of bf16 in a register of a CPU and in a line of its cache; a softmax over a multiple of
them takes half the time.
"""
SCORES = 1 << 21
"""Scores that exist at one time at most, as long as those of one sequence's heads that share keys
fit: a cache holds them, and memory does not grow with tokens × tokens × sequences.
"""


Masks = dict[tuple[Any, ...], torch.Tensor]
"""Those that were made already; whoever has it may use them for other layers too."""


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    masks: Masks,
) -> torch.Tensor:
    """softmax(scale·Q·Kᵀ)·V, where a token sees those up to itself: (rows, heads, queries, head
    dimension), keys and values (rows, heads, keys, head dimension), to the shape of the queries,
    which are those of the last keys. Keys and values may have fewer heads, each for as many
    queries' heads.
    """
    if attends_by_products(key, query.dtype):
        return by_products(query, key.to(query.dtype), value.to(query.dtype), scale, masks)
    q, k, v = (table.to(attention_dtype(query)) for table in (query, key, value))
    seen: torch.Tensor | None = None
    if q.shape[2] < k.shape[2]:
        last = q.shape[2], k.shape[2]
        seen = causal_lower_right(*last) if counts_from_the_end(q) else _later(masks, *last, q)
    out = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.to(query.dtype)


def by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    masks: Masks,
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
    hidden = _later(masks, queries, tokens, query, more, heads // shared)
    scale = size**-0.5 if scale is None else scale
    out: torch.Tensor = _Products.apply(grouped, keys, values, hidden, scale)  # type: ignore[no-untyped-call]
    return out.reshape(rows, heads, queries, -1)


def _later(
    masks: Masks, queries: int, tokens: int, like: torch.Tensor, more: int = 0, times: int = 1
) -> torch.Tensor:
    """−∞ where the queries of the last tokens must not look, nor at `more` keys behind these; for
    as many heads.
    """
    key = queries, tokens, more, times, like.dtype
    if key not in masks:
        later = like.new_full((queries, tokens + more), -math.inf)
        masks[key] = later.triu(tokens - queries + 1).repeat(times, 1)
    return masks[key]


class _Products(torch.autograd.Function):
    """Keeps no weights for backward: they are made again there."""

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
    """As many rows at a time as have SCORES scores; `tables[0]` is of queries."""
    at_a_time = max(SCORES // (tables[0].shape[1] * tokens), 1)
    return zip(*(torch.split(table, at_a_time) for table in tables), strict=True)


def _weights(
    query: torch.Tensor, key: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    return torch.baddbmm(hidden, query, key.mT, alpha=scale).softmax(-1)
