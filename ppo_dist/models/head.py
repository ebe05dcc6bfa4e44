"""The output head and the softmax after it as one operation, a chunk of positions at a time.

The logits of a micro-batch are its largest tensor by far (positions × vocabulary). Here they exist
for one chunk only, and backward computes them again. It is one operation, and not a checkpoint
around each chunk, since under ZeRO-3 every call of a module is a collective: ranks with another
number of response positions would make another number of calls, and wait for each other for ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ppo_dist.models.kernels import logits_chunk


class Head(nn.Module):
    """log-probability, entropy and argmax of softmax(logits / temperature) at each position."""

    def __init__(self, output: nn.Module, chunk: int | None) -> None:
        """Without `chunk` it is as large as suits the device."""
        super().__init__()
        if not isinstance(output, nn.Linear):
            raise ValueError(f"an output head of kind {type(output).__name__} is not supported")
        self.weight = output.weight  # the same parameters: trained, tied and gathered as before
        self.bias = output.bias
        self._chunk = chunk

    def forward(
        self, hidden_KH: torch.Tensor, targets_K: torch.Tensor, temperature_K: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logprobs_K, entropy_K, is_argmax_K), in fp32; the last carries no gradient."""
        chunk = self._chunk or logits_chunk(self.weight)
        out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _Softmax.apply(  # type: ignore[no-untyped-call]
            hidden_KH, self.weight, self.bias, targets_K, temperature_K, chunk
        )
        return out


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_K: torch.Tensor,
        temperature_K: torch.Tensor,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = []
        for h, target, temperature in _chunks(chunk, hidden_KH, targets_K, temperature_K):
            logits = _logits(h, weight_VH, bias_V, temperature)
            top, own = logits.amax(-1), logits.gather(-1, target[:, None])[:, 0]
            weights = (logits - top[:, None]).exp_()
            sums = weights.sum(-1)
            total = top + sums.log()
            entropy = total - weights.mul_(logits).sum(-1) / sums
            parts.append((own - total, entropy, (own == top).to(logits.dtype), total))
        logprobs_K, entropy_K, is_argmax_K, total_K = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(
            hidden_KH, weight_VH, bias_V, targets_K, temperature_K, total_K, entropy_K
        )
        ctx.chunk = chunk
        ctx.mark_non_differentiable(is_argmax_K)
        return logprobs_K, entropy_K, is_argmax_K

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_logprobs_K: torch.Tensor, d_entropy_K: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """With p = softmax(z / T): d log p_i / dz_j = (1[i=j] − p_j) / T, and
        dH / dz_j = −p_j (log p_j + H) / T.
        """
        hidden_KH, weight_VH, bias_V, targets_K, temperature_K, *of_states = ctx.saved_tensors
        d_hidden_KH = torch.empty_like(hidden_KH)
        d_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        with_entropy = bool(d_entropy_K.any())
        outer = (d_logprobs_K / temperature_K, d_entropy_K / temperature_K)
        columns = (hidden_KH, targets_K, temperature_K, *of_states, *outer)
        begin = 0
        for h, target, temperature, total, entropy, *d_outer in _chunks(ctx.chunk, *columns):
            d_logprobs, d_entropy = (d[:, None] for d in d_outer)
            table = _logits(h, weight_VH, bias_V, temperature).sub_(total[:, None])
            factor = -d_logprobs
            if with_entropy:
                factor = (table + entropy[:, None]).mul_(-d_entropy).sub_(d_logprobs)
            d_logits = table.exp_().mul_(factor)
            d_logits.scatter_add_(-1, target[:, None], d_logprobs)
            d_logits = d_logits.to(weight_VH.dtype)
            torch.mm(d_logits, weight_VH, out=d_hidden_KH[begin : begin + len(h)])
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, h)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            begin += len(h)
        return d_hidden_KH, d_weight, d_bias, None, None, None


def _chunks(chunk: int, *columns: torch.Tensor) -> Any:
    return zip(*(torch.split(column, chunk) for column in columns), strict=True)


def _logits(
    hidden_KH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature_K: torch.Tensor,
) -> torch.Tensor:
    logits_KV = F.linear(hidden_KH, weight_VH, bias_V)
    wide = torch.promote_types(logits_KV.dtype, torch.float32)
    return logits_KV.to(wide).div_(temperature_K[:, None])
