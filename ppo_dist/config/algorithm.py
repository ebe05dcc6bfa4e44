"""Keys of PPO and of the semi-supervised mix."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ppo_dist.config.base import Constant, MuSchedule, Scalar, Section, bare_kind


class Gae(Section):
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16)."""

    kind: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)


class Algorithm(Section):
    advantage: Annotated[Gae, BeforeValidator(bare_kind)] = Gae()
    whiten: bool = Field(
        True, description="normalise advantages to mean 0, variance 1 over the whole step"
    )
    bootstrap_truncated: bool = Field(
        False,
        description="a response cut by the token limit ends with the critic's value instead of 0",
    )
    epochs: int = Field(1, ge=1, description="passes over a step's sequences")
    minibatches: int = Field(1, ge=1, description="updates in an epoch")
    clip: float = Field(0.2, gt=0, description="ε of the clipped policy objective")
    value_clip: float = Field(0.2, gt=0, description="ε of the clipped value loss")
    value_coef: float = Field(0.5, gt=0, description="weight of the value loss")
    kl_coef: float = Field(
        0.01, ge=0, description="β of the KL penalty to the reference in the reward"
    )


class Shares(Section):
    """Parts of a step's prompts by origin; they are scaled to sum to one."""

    labelled: Scalar = Constant(value=0.0)
    verifiable: Scalar = Constant(value=0.0)
    unlabelled: Scalar = Constant(value=0.0)


class Mix(Section):
    schedule: MuSchedule = Field(
        Constant(value=0.1), description="μ, the weight of the supervised loss"
    )
    prompts: Scalar = Field(
        Constant(value=32), description="prompts a step; 0 is supervised training"
    )
    shares: Shares = Shares(verifiable=Constant(value=1.0))
    labelled_batch: Scalar = Field(
        Constant(value=0), description="supervised examples an update; 0 is plain PPO"
    )
    policy_coef: float | Literal["complement"] = Field(
        1.0, description="weight of the policy loss; `complement` is 1−μ (CHORD, arXiv:2508.11408)"
    )
