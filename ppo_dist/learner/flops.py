"""How much there is to compute, whatever it is computed with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ppo_dist import device
from ppo_dist.types import PackedRow


@dataclass(frozen=True)
class Cost:
    """What a dense model's forward and backward pass takes, by the usual count (Chowdhery et al.
    2022, appendix B): 6 FLOPs a parameter and token (4 if the parameter is frozen), which is what
    `trunk` and `head` say, 12·layers·heads·width a token that one sees in attention, itself too,
    and the output head where there are targets. What is computed again in backward does not count
    again.

    Example: Cost(trunk=637_000_000, head=170_000_000, width=17_280)
    """

    trunk: int
    head: int
    width: int

    @classmethod
    def of(cls, lm: PreTrainedModel) -> Cost:
        """Of a causal model, or of a trunk alone."""
        config, inputs, outputs = lm.config, lm.get_input_embeddings(), lm.get_output_embeddings()
        trunk = _flops(lm.base_model) - _flops(inputs)
        heads = config.num_attention_heads
        each = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = config.num_hidden_layers * heads * each
        return cls(trunk, _flops(outputs) if outputs is not None else 0, width)

    def flops(self, row: PackedRow) -> float:
        """Of what is in the row: what sequences share counts once."""
        seen = float(row.positions_S.sum()) + len(row.positions_S)  # by each token, and itself
        of_weights = self.trunk * len(row.tokens_S) + self.head * len(row.targets_K)
        return of_weights + 12.0 * self.width * seen


class Rate:
    """Model FLOPs a second of the last block that was measured, as a share of what a large matrix
    product reaches here.
    """

    def __init__(self, where: torch.device, dtype: str) -> None:
        self._where, self._dtype = where, device.DTYPES[dtype]
        self._flops = 0.0
        self.mfu: float | None = None

    def add(self, flops: float) -> None:
        """So much more is computed in the block."""
        self._flops += flops

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """A block that ends when what it computes is done."""
        limit = device.matrix_rate(self._where, self._dtype)  # once all workers have started
        begin, self._flops = time.perf_counter(), 0.0
        yield
        per_second = self._flops / max(time.perf_counter() - begin, 1e-9)
        self.mfu = per_second / limit if self._flops else None


def _flops(module: nn.Module) -> int:
    """Of a token; ZeRO-3 has only a part of each parameter here."""
    return sum(
        (6 if p.requires_grad else 4) * getattr(p, "ds_numel", p.numel())
        for p in module.parameters()
    )
