"""What the learners are told of an update beside its sequences, and what they tell of it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenCounts:
    """Tokens with a non-zero weight, per loss term, over all ranks and micro-batches of one update.

    Example: TokenCounts(policy=310, value=310, ce=96)
    """

    policy: int
    value: int
    ce: int


@dataclass(frozen=True)
class Coefficients:
    """Weights of the loss terms and learning rates of one step.

    Example: Coefficients(policy=1.0, value=0.5, mu=0.1, kl=0.0, entropy=0.0, lr=1e-5,
    critic_lr=1e-5)
    """

    policy: float
    value: float
    mu: float
    kl: float
    entropy: float
    lr: float
    critic_lr: float


@dataclass(frozen=True)
class TermSums:
    """Sums over the live tokens of one update on one rank, to be added over ranks before any
    division. `acted` counts those of the policy loss that were computed, `moved` is Σ |log r|.

    Example: TermSums(policy_loss=-3.1, acted=310, moved=2.9, clipped=4, kl=.02, kl_k1=.01,
    kl_loss=0., entropy=71., value_clipped=1, ce_loss=55., ce_correct=80)
    """

    policy_loss: float = 0.0
    acted: float = 0.0
    moved: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    kl_k1: float = 0.0
    kl_loss: float = 0.0
    entropy: float = 0.0
    value_loss: float = 0.0
    value_clipped: float = 0.0
    ce_loss: float = 0.0
    ce_correct: float = 0.0

    def __add__(self, other: TermSums) -> TermSums:
        return TermSums(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class UpdateReport:
    """One optimizer step as a rank saw it; the gradient norms are global and before clipping.

    A norm that is not finite means that this model's step was skipped.

    Example: UpdateReport(counts=TokenCounts(310, 310, 96), sums=TermSums(…), grad_norm=.8,
    critic_grad_norm=2.1)
    """

    counts: TokenCounts
    sums: TermSums
    grad_norm: float | None
    critic_grad_norm: float | None

    @property
    def skipped(self) -> bool:
        """Whether a model was left as it is, since its gradient was not finite."""
        norms = (self.grad_norm or 0.0, self.critic_grad_norm or 0.0)
        return not all(map(math.isfinite, norms))


@dataclass(frozen=True)
class Vitals:
    """What a worker's process did in some seconds: how many of them it was at work, how many its
    CPU cores were in all; and the memory that it has, of a GPU the most that it had. With its
    children, but for the GPU's; where both roles are one process, each tells of all of it.

    Example: Vitals(busy_s=11.5, seconds=12.0, cpu_s=23.1, memory=4_200_000_000)
    """

    busy_s: float = 0.0
    seconds: float = 0.0
    cpu_s: float = 0.0
    memory: int | None = None
    gpu_memory: int | None = None

    def __add__(self, later: Vitals) -> Vitals:
        known = [peak for peak in (self.gpu_memory, later.gpu_memory) if peak is not None]
        return Vitals(
            self.busy_s + later.busy_s,
            self.seconds + later.seconds,
            self.cpu_s + later.cpu_s,
            later.memory,
            max(known, default=None),
        )


@dataclass(frozen=True)
class StepReport:
    """The updates of one step, as one rank saw them or with sums added over ranks; the vitals of
    each rank; and the share of a large matrix product's rate at which they computed, on average.

    Example: StepReport(updates=(UpdateReport(…), UpdateReport(…)), vitals=(Vitals(…),), mfu=.42)
    """

    updates: tuple[UpdateReport, ...]
    vitals: tuple[Vitals, ...] = ()
    mfu: float | None = None
