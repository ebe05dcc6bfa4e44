"""The losses of a micro-batch: sums over its tokens, divided once, by the counts of the whole
update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ppo_dist.algo.kl import ESTIMATORS
from ppo_dist.algo.losses import policy_term, supervised_term, value_term
from ppo_dist.config.algorithm import Algorithm
from ppo_dist.models.policy import PolicyOutput
from ppo_dist.reports import Coefficients, TermSums, TokenCounts
from ppo_dist.types import MicroBatch, Shapes


@dataclass(frozen=True)
class Tensors:
    """A micro-batch on the device; names as in PackedRow and MicroBatch."""

    tokens_S: torch.Tensor
    positions_S: torch.Tensor
    slots_N: torch.Tensor
    home_S: torch.Tensor
    shapes: Shapes
    states_K: torch.Tensor
    targets_K: torch.Tensor
    policy_weight_K: torch.Tensor
    value_weight_K: torch.Tensor
    ce_weight_K: torch.Tensor
    advantages_K: torch.Tensor
    returns_K: torch.Tensor
    logprobs_K: torch.Tensor
    reference_K: torch.Tensor
    values_K: torch.Tensor

    @classmethod
    def of(cls, batch: MicroBatch, device: torch.device) -> Tensors:
        """The same arrays as tensors on the device."""
        arrays = {**vars(batch.row), **vars(batch)}
        del arrays["row"], arrays["shapes"]
        tensors = {name: torch.as_tensor(array).to(device) for name, array in arrays.items()}
        return cls(shapes=batch.row.shapes, **tensors)

    @property
    def row(self) -> tuple[Any, ...]:
        """The first arguments of both models' forward pass."""
        packing = self.slots_N, self.home_S, self.shapes
        return self.tokens_S, self.positions_S, *packing, self.states_K


def policy_loss(
    batch: Tensors,
    out: PolicyOutput,
    counts: TokenCounts,
    coefficients: Coefficients,
    algorithm: Algorithm,
) -> tuple[torch.Tensor, TermSums]:
    """Σ (c_p·policy + β·KL − c_e·entropy)·w / N_policy + μ·Σ ce·w / N_ce of one micro-batch, and
    the sums for the metrics.

    A token without weight gets no gradient, and a term without tokens is exactly zero.
    """
    live, weight_K = batch.policy_weight_K != 0, batch.policy_weight_K
    term = policy_term(out.logprobs_K, batch.logprobs_K, batch.advantages_K, algorithm.clip)
    policy_sum = _sum(term.loss, weight_K)
    imitation = supervised_term(out.logprobs_K, algorithm.supervised_loss)
    ce_sum = _sum(imitation.loss, batch.ce_weight_K)
    kl_sum = entropy_sum = policy_sum.new_zeros(())
    if coefficients.kl:
        estimate = ESTIMATORS[algorithm.kl.estimator]
        kl_sum = _sum(estimate(out.logprobs_K, batch.reference_K), weight_K)
    if coefficients.entropy:
        entropy_sum = _sum(out.entropy_K, weight_K)
    reinforced = (
        coefficients.policy * policy_sum
        + coefficients.kl * kl_sum
        - coefficients.entropy * entropy_sum
    )
    loss = reinforced / max(counts.policy, 1) + coefficients.mu * ce_sum / max(counts.ce, 1)
    sums = TermSums(
        policy_loss=policy_sum.item(),
        acted=live.sum().item(),
        moved=(out.logprobs_K - batch.logprobs_K)[live].abs().sum().item(),
        clipped=term.clipped[live].sum().item(),
        kl=term.kl[live].sum().item(),
        kl_k1=term.kl_k1[live].sum().item(),
        kl_loss=kl_sum.item(),
        entropy=out.entropy_K[live].sum().item(),
        ce_loss=_sum(imitation.nll, batch.ce_weight_K).item(),
        ce_correct=out.is_argmax_K[batch.ce_weight_K != 0].sum().item(),
    )
    return loss, sums


def value_loss(
    batch: Tensors,
    values_K: torch.Tensor,
    counts: TokenCounts,
    coefficients: Coefficients,
    algorithm: Algorithm,
) -> tuple[torch.Tensor, TermSums]:
    """c_v·Σ value·w/N_value of one micro-batch, and the sums for the metrics."""
    term = value_term(values_K, batch.values_K, batch.returns_K, algorithm.value_clip)
    total = _sum(term.loss, batch.value_weight_K)
    live = batch.value_weight_K != 0
    sums = TermSums(value_loss=total.item(), value_clipped=term.clipped[live].sum().item())
    return total * (coefficients.value / max(counts.value, 1)), sums


def _sum(terms_K: torch.Tensor, weight_K: torch.Tensor) -> torch.Tensor:
    """Σ term·w over the tokens with a weight; what stands at the others may even be infinite."""
    return torch.where(weight_K != 0, terms_K * weight_K, 0.0).sum()
