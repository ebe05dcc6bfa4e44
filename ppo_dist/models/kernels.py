"""Which of torch's ways is fastest for a layer, by device and number format."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ppo_dist import heap

Multiplier = Callable[[torch.Tensor], torch.Tensor]


def multiplier(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Multiplier:
    """What a linear layer does to rows, (B, K) to (B, N), while its weights stay as they are.

    On a CPU a copy of the weights in oneDNN's own layout is multiplied: for few rows and a large
    matrix that takes half the time (torch 2.13: 32 rows, an output head of 49,152).
    """
    if weight_NK.device.type == "cpu" and _onednn_is_fast(weight_NK.dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach())
        return lambda rows_BK: torch.ops.mkldnn._linear_pointwise(
            rows_BK, packed, bias_N, "none", [], ""
        )
    return lambda rows_BK: torch.nn.functional.linear(rows_BK, weight_NK, bias_N)


def logits_chunk(weight_VH: torch.Tensor) -> int:
    """Positions whose logits, in fp32, are computed at one time. On a CPU they are read again and
    again, so 256 are faster than 1024, and as many as need no fresh pages faster still; but each
    chunk's backward pass goes through all of the weight's gradient.
    """
    is_cpu = weight_VH.device.type == "cpu"
    return min(max(heap.KEPT // (4 * len(weight_VH)), 128), 256) if is_cpu else 1024


def attention_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The number format in which torch's attention runs fastest. Its CPU kernel takes 2 to 4 times
    as long backward in bf16 as in fp32 (torch 2.13, 48 sequences of 51 tokens).
    """
    if tensor.device.type == "cpu":
        return torch.promote_types(tensor.dtype, torch.float32)
    return tensor.dtype


def counts_from_the_end(query: torch.Tensor) -> bool:
    """Whether torch's attention can be told that queries are those of the last keys: its flash
    attention alone can, others are given a mask.
    """
    return query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)


def attends_by_products(key: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether plain products in bf16 are faster than torch's attention over keys (rows, heads,
    tokens, head dimension) and queries of `dtype`: on AVX512-BF16 by half at 100 tokens, and not
    at all at 500.
    """
    is_short = dtype == torch.bfloat16 and key.shape[2] <= 500
    return is_short and key.device.type == "cpu" and _has_bf16()


def _onednn_is_fast(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bf16())


def _has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 itself. oneDNN says so of any AVX512."""
    return torch.cpu._is_avx512_bf16_supported()
