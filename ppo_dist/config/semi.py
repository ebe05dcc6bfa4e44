"""Keys of what is learned from unlabelled prompts: gate, pseudo-labels, guard, probe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ppo_dist.config.base import Constant, Origin, Scalar, Section, bare_kind


class AllGate(Section):
    """Every prompt counts."""

    kind: Literal["all"] = "all"


class ConfidenceGate(Section):
    """A prompt counts if the majority is large enough."""

    kind: Literal["confidence"]
    share: float = Field(0.5, ge=0, le=1, description="the winner's least part of all responses")
    margin: float = Field(0.0, ge=0, le=1, description="how far the winner must be ahead")


class TrajectoryGate(Section):
    """A prompt counts if its pass rate has moved like that of the labelled prompts (TraPO,
    arXiv:2512.13106): by the mean cosine between its z-normalised history and theirs, it is in the
    `top` share of the step's prompts or at `threshold` or above.

    A history has one number for each `window` of steps: the mean pass rate of the prompt in it.
    """

    kind: Literal["trajectory"]
    window: int = Field(ge=1, description="steps in which each unlabelled prompt comes about once")
    warmup: int = Field(
        2, ge=2, description="windows before any prompt is admitted; until then labels teach alone"
    )
    length: int = Field(16, ge=2, description="windows that a history goes back")
    top: float = Field(0.1, ge=0, le=1, description="share of a step's prompts that counts anyway")
    threshold: float = Field(0.4, ge=-1, le=1, description="mean cosine from which on one counts")


AnyGate = Annotated[
    Annotated[AllGate | ConfidenceGate | TrajectoryGate, Field(discriminator="kind")],
    BeforeValidator(bare_kind),
]


class PseudoLabels(Section):
    """The best responses to admitted prompts, imitated like labelled examples: of each prompt the
    likeliest one among those with the top reward.
    """

    batch: int = Field(ge=1, description="pseudo-labels in an update")
    weight: Scalar = Field(
        Constant(value=1.0),
        description="of their cross-entropy beside that of labelled examples; `warmup` ramps it up",
    )
    min_reward: float = Field(1.0, description="a response with a lower reward is not taken")
    capacity: int = Field(4096, ge=1, description="above it the oldest go")
    max_age: int = Field(50, ge=1, description="steps after which one goes")
    per_prompt: int = Field(1, ge=1, description="different responses kept for one prompt")
    origins: list[Origin] = Field(
        ["unlabelled"], min_length=1, description="of prompts whose responses are taken"
    )


class Check(Section):
    """What the guard does when a number passes its limit, so many times in a row."""

    limit: float = Field(description="the number that must not be passed")
    action: Literal["warn", "raise_mu", "freeze", "roll_back", "stop"] = Field(
        "warn", description="what the guard does then"
    )
    patience: int = Field(1, ge=1, description="so many times in a row it must be passed")


class Guard(Section):
    """Looks for a run that rewards itself while it gets worse. Of the actions, `raise_mu`
    multiplies μ, `freeze` stops learning from unlabelled prompts, `roll_back` returns to the policy
    of the best evaluation and freezes, `stop` ends the run (exit code 3).
    """

    gap: Check | None = Field(
        Check(limit=0.4), description="mean reward of unlabelled prompts minus held-out accuracy"
    )
    drop: Check | None = Field(
        Check(limit=0.1), description="best held-out accuracy so far minus the present one"
    )
    vote_entropy: Check | None = Field(
        None, description="mean entropy of the votes, in nats: below its limit"
    )
    kl: Check | None = Field(None, description="objective/kl: above its limit")
    raise_by: float = Field(2.0, gt=1, description="factor of raise_mu")
    raise_at_most: float = Field(16.0, gt=1, description="of all such factors together")
    freeze_steps: int = Field(0, ge=0, description="steps that a freeze lasts; 0: to the end")

    @property
    def checks(self) -> dict[str, Check]:
        """Those that are not null, by name."""
        return {name: check for name, check in self if isinstance(check, Check)}

    @property
    def rolls_back(self) -> bool:
        """Whether one of them may return to the best evaluation, which then needs a checkpoint."""
        return any(check.action == "roll_back" for check in self.checks.values())


class Semi(Section):
    """What becomes of responses without a checker, and what is watched meanwhile."""

    gate: AnyGate = Field(AllGate(), description="which unlabelled prompts count")
    pseudo: PseudoLabels | None = Field(None, description="imitate the best responses too")
    guard: Guard = Guard()
    probe: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the labelled prompts treated as unlabelled, to measure pseudo-labels",
    )
