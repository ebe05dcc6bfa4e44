"""Attention within packed sequences.

Everything in a transformer but its attention works on one token at a time, so it runs on the row
as it is. For attention, keys and values are gathered into tables of sequences of about one length,
with the queries of those tokens that no other row has, where that is less, and what comes out is
scattered back. No mask over the row exists: work grows with the sum of squared lengths at most, not
with the square of the row.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from ppo_dist.models.attention import Masks, causal_attention
from ppo_dist.types import Shapes

ATTENTION = "ppo_dist_packed"


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a row are; see PackedRow."""

    slots_N: torch.Tensor
    home_S: torch.Tensor
    shapes: Shapes
    masks: Masks = field(default_factory=dict)  # of its tables, the same for all layers

    @functools.cached_property
    def asking_M(self) -> torch.Tensor:
        """The row indices of the queries, table after table; the same for all layers."""
        tables = torch.split(self.slots_N, [rows * keys for rows, keys, _ in self.shapes])
        asking = [
            table.view(rows, keys)[:, keys - queries :].flatten()
            for table, (rows, keys, queries) in zip(tables, self.shapes, strict=True)
        ]
        return torch.cat(asking)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, S, head dimension) to (1, S, heads, ...).

    Without `packing` it is torch's attention under the mask, for generation. Dropout is never
    applied: old and new log-probabilities would come from different models.

    Raises:
        ValueError: the model asks for a kind of attention that is not computed here.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(f"attention with {name} is not supported")
    if packing is None:
        grouped = key.shape[1] != query.shape[1]
        causal = attention_mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(
            query, key, value, attention_mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous(), None
    longest = max(keys for _, keys, _ in packing.shapes)
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"attention with a sliding_window of {sliding_window} tokens is not supported on"
            f" sequences of {longest}"
        )
    seen = [(rows, keys) for rows, keys, _ in packing.shapes]
    asked = [(rows, queries) for rows, _, queries in packing.shapes]
    queries = _gathered(query, packing.asking_M, asked)
    keys, values = (_gathered(row, packing.slots_N, seen) for row in (key, value))
    outs = [
        causal_attention(*tables, scaling, packing.masks).transpose(1, 2).flatten(0, 1)
        for tables in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(outs).index_select(0, packing.home_S)[None], None


def _gathered(
    row: torch.Tensor, slots: torch.Tensor, tables: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """(1, heads, S, head dimension) to tables (rows, heads, width, head dimension)."""
    picked = row[0].transpose(0, 1).index_select(0, slots)
    parts = torch.split(picked, [rows * width for rows, width in tables])
    return [
        part.view(*table, *part.shape[1:]).transpose(1, 2)
        for part, table in zip(parts, tables, strict=True)
    ]


def no_mask(row: torch.Tensor) -> torch.Tensor:
    """A stand-in of four dimensions: transformers passes such a mask on without building its own,
    and `attend` does not look at it.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.device)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def sliding_window(config: PretrainedConfig) -> int | None:
    """How many tokens the layers of a model see that do not see all, if it has such layers."""
    shape = config.to_dict()
    slides = "sliding_attention" in (shape.get("layer_types") or ["sliding_attention"])
    window: int | None = shape.get("sliding_window") if slides else None
    return window
