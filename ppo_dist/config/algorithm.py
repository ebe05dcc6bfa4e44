"""Keys of PPO and of the semi-supervised mix."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ppo_dist.config.base import (
    Adaptive,
    Constant,
    Cosine,
    Linear,
    MixScalar,
    MuSchedule,
    Piecewise,
    Scalar,
    Section,
    bare_kind,
    bare_number,
)

Whiten = Literal["global", "per_origin", "off"]
WHITENED = "advantages to mean 0, variance 1 over the whole step, or by origin"


class Gae(Section):
    """Generalised advantage estimation with a critic (Schulman et al. 2015, arXiv:1506.02438)."""

    kind: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1, description="discount γ of a token")
    lam: float = Field(0.95, ge=0, le=1, description="λ: 0 trusts the critic, 1 the rewards")
    whiten: Whiten = Field("global", description=WHITENED)


class GroupMean(Section):
    """Reward minus the mean of the responses to the same prompt, without a critic (GRPO, Shao et
    al. 2024, arXiv:2402.03300; without `std` as in Liu et al. 2025, arXiv:2503.20783).
    """

    kind: Literal["group_mean"]
    std: bool = Field(True, description="divide by the group's standard deviation")
    whiten: Whiten = Field("off", description=WHITENED)


class Rloo(Section):
    """Reward minus the mean of the *other* responses to the same prompt, without a critic (Ahmadian
    et al. 2024, arXiv:2402.14740).
    """

    kind: Literal["rloo"]
    whiten: Whiten = Field("off", description=WHITENED)


class ReinforcePlusPlus(Section):
    """Discounted rewards still to come, normalised over the whole step, without a critic
    (REINFORCE++, Hu et al. 2025, arXiv:2501.03262).
    """

    kind: Literal["reinforce_pp"]
    gamma: float = Field(1.0, ge=0, le=1, description="discount γ of a token")
    whiten: Whiten = Field("global", description=WHITENED)


AnyAdvantage = Annotated[
    Annotated[Gae | GroupMean | Rloo | ReinforcePlusPlus, Field(discriminator="kind")],
    BeforeValidator(bare_kind),
]


class FixedKl(Section):
    """The coefficient stays as it is."""

    kind: Literal["fixed"] = "fixed"


class AdaptiveKl(Section):
    """The coefficient follows a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2). The KL
    is that of `objective/kl`: the mean over responses of the sum over their tokens.
    """

    kind: Literal["adaptive"]
    target: float = Field(gt=0, description="the KL that is wanted, in nats a response")
    horizon: float = Field(gt=0, description="in responses; larger is slower")


AnyController = Annotated[
    Annotated[FixedKl | AdaptiveKl, Field(discriminator="kind")], BeforeValidator(bare_kind)
]


ESTIMATED = "of a token, l being log π_ref − log π: −l, l²/2, exp(l) − 1 − l"


class KlInReward(Section):
    """KL to the reference taken off each token's reward."""

    kind: Literal["reward"] = "reward"
    coef: float = Field(0.01, ge=0, description="β of the KL penalty")
    estimator: Literal["k1", "k2", "k3"] = Field("k1", description=ESTIMATED)
    controller: AnyController = Field(FixedKl(), description="what the coefficient does")


class KlInLoss(Section):
    """KL to the reference as a loss term. k2 is the one whose gradient is that of the KL; that of
    k1 is 0 in expectation, that of k3 is another function's.
    """

    kind: Literal["loss"]
    coef: float = Field(0.01, ge=0, description="β of the KL term")
    estimator: Literal["k1", "k2", "k3"] = Field("k2", description=ESTIMATED)
    controller: AnyController = Field(FixedKl(), description="what the coefficient does")


def _bare_kl(value: Any) -> Any:
    number = bare_number(value)
    if number != value:
        return {"kind": "reward", "coef": number["value"]}
    if isinstance(value, dict):
        return {"kind": "reward", **value}
    return bare_kind(value)


AnyKl = Annotated[
    Annotated[KlInReward | KlInLoss, Field(discriminator="kind")], BeforeValidator(_bare_kl)
]


class Clip(Section):
    """Bounds of the ratio of new to old probability: 1 − low and 1 + high; may be written as one
    number for both. Another `high` is DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476).
    """

    low: float = Field(0.2, gt=0, lt=1, description="the ratio is at least 1 − low")
    high: float = Field(
        0.2, gt=0, description="the ratio is at most 1 + high (above low: DAPO's clip-higher)"
    )
    dual: float | None = Field(
        None, gt=1, description="with a negative advantage A the loss is at most −dual·A"
    )


def _bare_clip(value: Any) -> Any:
    number = bare_number(value)
    return value if number == value else {"low": number["value"], "high": number["value"]}


class Penalise(Section):
    """`by` is taken off the reward of a response that the token limit cut."""

    kind: Literal["penalise"]
    by: float = Field(1.0, gt=0)


class Truncated(Section):
    """A response that the token limit cut. `end`: as if it had ended by itself; `bootstrap`: the
    critic's value of what would have come counts; `mask`: nothing is learned from it.
    """

    kind: Literal["end", "bootstrap", "mask"] = "end"


AnyTruncated = Annotated[
    Annotated[Truncated | Penalise, Field(discriminator="kind")], BeforeValidator(bare_kind)
]


class RewardShaping(Section):
    """What happens to scores before advantages are made of them."""

    clip: float | None = Field(None, gt=0, description="scores are cut to ± this")
    normalise: bool = Field(
        False, description="divide scores by the standard deviation of all scores so far"
    )


class Correction(Section):
    """Each token's policy loss times π_old / π_behaviour, old being the policy at the beginning of
    the step and behaviour the one that wrote the token: that of an earlier version, or the same in
    another engine's arithmetic. Clipping stays around π_old (decoupled PPO: Hilton et al. 2021,
    arXiv:2110.00641, eq. 3; Fu et al. 2025, arXiv:2505.24298, eq. 5).
    """

    kind: Literal["auto", "off", "importance"] = Field(
        "auto", description="auto: importance if stream.max_lag is above 0"
    )
    cap: float | None = Field(
        1.0,
        ge=1,
        description="largest weight (truncated importance sampling; 1 as in IMPALA); null: not cut",
    )
    over: Literal["token", "prefix"] = Field(
        "token",
        description="the ratio of the token alone, or times those of all before it in its response "
        "(per-decision importance sampling): for short ones, as it drifts with length",
    )


class Algorithm(Section):
    """What becomes of rewards: advantages, and the losses of the PPO updates (Schulman et al. 2017,
    arXiv:1707.06347, eq. 7 for the clipped objective).
    """

    advantage: AnyAdvantage = Field(
        Gae(), description="how rewards become advantages; `gae` alone has a critic"
    )
    kl: AnyKl = Field(KlInReward(), description="in the `reward` or in the `loss`; a number is β")
    reward: RewardShaping = RewardShaping()
    truncated: AnyTruncated = Field(
        Truncated(), description="what becomes of a response that the token limit cut"
    )
    correction: Annotated[Correction, BeforeValidator(bare_kind)] = Correction()
    old_logprobs: Literal["auto", "behaviour", "recompute"] = Field(
        "auto",
        description="what ratios compare with: the rollout workers' log-probabilities, or the "
        "learners' own, at the cost of a pass; auto: the workers' where both are the same to "
        "rounding (engine hf, fp32, no lag)",
    )
    epochs: int = Field(1, ge=1, description="passes over a step's sequences")
    minibatches: int = Field(1, ge=1, description="updates in an epoch")
    clip: Annotated[Clip, BeforeValidator(_bare_clip)] = Field(
        Clip(), description="ε of the clipped policy objective"
    )
    value_clip: float | None = Field(
        0.2, gt=0, description="ε of the clipped value loss; null: not clipped"
    )
    value_coef: Scalar = Field(Constant(value=0.5), description="weight of the value loss")
    entropy_coef: Scalar = Field(Constant(value=0.0), description="weight of the entropy bonus")
    aggregate: Literal["token", "sequence"] = Field(
        "token", description="whether tokens or sequences weigh the same in the policy loss"
    )
    supervised_loss: Literal["nll", "phi"] = Field(
        "nll",
        description="cross-entropy, or each token's weighted by p(1−p) (CHORD, arXiv:2508.11408)",
    )

    @model_validator(mode="after")
    def _has_value(self) -> Algorithm:
        if self.truncated.kind == "bootstrap" and not self.has_critic:
            raise ValueError("truncated: bootstrap needs a critic (advantage: gae)")
        return self

    @property
    def has_critic(self) -> bool:
        """Whether the advantage estimator needs values."""
        return isinstance(self.advantage, Gae)


class Shares(Section):
    """Parts of a step's prompts by origin; they are scaled to sum to one. If none is given all are
    verifiable; if any is, the others are 0.
    """

    labelled: MixScalar = Field(
        Constant(value=0.0), description="share of prompts with a response to imitate"
    )
    verifiable: MixScalar = Field(
        Constant(value=0.0),
        description="share of prompts that a checker can judge; 0 once another share is given",
    )
    unlabelled: MixScalar = Field(Constant(value=0.0), description="share of prompts with neither")


class Complement(Section):
    """1−μ (CHORD, Zhang et al. 2025, arXiv:2508.11408)."""

    kind: Literal["complement"]


PolicyCoef = Annotated[
    Annotated[
        Constant | Linear | Cosine | Piecewise | Adaptive | Complement, Field(discriminator="kind")
    ],
    BeforeValidator(lambda value: bare_kind(bare_number(value))),
]


class Mix(Section):
    """The semi-supervised mix of a step: how much is imitation (μ), how much PPO, and on what."""

    schedule: MuSchedule = Field(
        Constant(value=0.1), description="μ, the weight of the supervised loss"
    )
    prompts: Scalar = Field(
        Constant(value=32), description="prompts a step; 0 is supervised training"
    )
    shares: Shares = Shares(verifiable=Constant(value=1.0))
    labelled_batch: MixScalar = Field(
        Constant(value=0), description="supervised examples an update; 0 is plain PPO"
    )
    policy_coef: PolicyCoef = Field(
        Constant(value=1.0), description="weight of the policy loss; `complement` is 1−μ"
    )
