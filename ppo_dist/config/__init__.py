"""The schema of a run: every key, its default, what is allowed. Importing this never imports torch.

Horizons (`steps`, `warmup`) count steps of the run and are keys of their own, never a share of
`train.steps`: so a run that is continued with more steps follows the same curves.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from ppo_dist.config.algorithm import Algorithm, Mix
from ppo_dist.config.base import ORIGINS, InputError, Origin, Section, SupervisedFirst, peak
from ppo_dist.config.data import Critic, Data, Model, Reference
from ppo_dist.config.reward import RegexReward, Reward, WeightedReward
from ppo_dist.config.workers import (
    Cluster,
    Eval,
    LearnerSection,
    RolloutSection,
    Tracking,
    Transport,
)

__all__ = ["ORIGINS", "Config", "InputError", "Origin", "Section", "impossible", "sees_answer"]


class Run(Section):
    dir: str = Field(description="folder of the run: config, metrics, samples, checkpoints, policy")
    seed: int = Field(0, ge=0, description="seed of everything random in the run")


class Train(Section):
    steps: int = Field(
        ge=1, description="passes of the loop: each gives one metrics row and one policy version"
    )
    checkpoint_every: int = Field(
        0, ge=0, description="steps between checkpoints; 0: only when the run ends or stops"
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="how many of the newest checkpoints stay on disk"
    )
    max_skipped_updates: int = Field(
        3, ge=1, description="so many updates in a row with a gradient that is not finite stop it"
    )


class Config(Section):
    """A whole run."""

    run: Run
    train: Train
    model: Model
    data: Data
    reward: Reward = Reward()
    mix: Mix = Mix()
    algorithm: Algorithm = Algorithm()
    reference: Reference = Reference()
    critic: Critic = Critic()
    rollout: RolloutSection = RolloutSection()
    learner: LearnerSection = LearnerSection()
    transport: Transport = Transport()
    cluster: Cluster = Cluster()
    eval: Eval = Eval()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _possible(self) -> Config:
        problem = next(iter(impossible(self)), None)
        if problem:
            raise ValueError(problem)
        return self


def impossible(config: Config) -> list[str]:
    """Combinations of single values that are each fine and together are not, one sentence each."""
    c, problems = config, []
    mu = c.mix.schedule
    mu_peak = mu.mu if isinstance(mu, SupervisedFirst) else peak(mu)
    generates = peak(c.mix.prompts) > 0
    if c.learner.zero_stage == 0 and c.learner.dtype == "bf16":
        problems.append("learner.dtype bf16 needs learner.zero_stage 1, 2 or 3")
    if c.learner.zero_stage == 0 and c.learner.offload != "none":
        problems.append("learner.offload needs learner.zero_stage 1, 2 or 3")
    if c.cluster.kind == "local" and (c.learner.workers > 1 or c.rollout.workers > 1):
        problems.append(
            "cluster.kind local runs one learner and one rollout worker: set both `workers` to 1"
        )
    mixed = mu.then if isinstance(mu, SupervisedFirst) else mu
    if c.mix.policy_coef == "complement" and peak(mixed) > 1:
        problems.append("mix.policy_coef complement is 1−μ, so μ (mix.schedule) must not pass 1")
    if peak(c.mix.labelled_batch) > 0 and not c.data.labelled:
        problems.append("mix.labelled_batch is above 0, but data.labelled is empty")
    if isinstance(mu, SupervisedFirst) and peak(c.mix.labelled_batch) == 0:
        problems.append("mix.schedule supervised_first needs mix.labelled_batch above 0")
    if not generates and (mu_peak == 0 or peak(c.mix.labelled_batch) == 0):
        problems.append(
            "nothing to train on: mix.prompts is 0 and so is mix.labelled_batch or μ (mix.schedule)"
        )
    for origin in ORIGINS if generates else ():
        if peak(_of(c.mix.shares, origin)) > 0:
            if not _of(c.data, origin):
                problems.append(f"mix.shares.{origin} is above 0, but data.{origin} is empty")
            if _of(c.reward, origin) is None:
                problems.append(f"mix.shares.{origin} is above 0, but reward.{origin} is not given")
    if generates and not any(peak(_of(c.mix.shares, o)) > 0 for o in ORIGINS):
        problems.append("mix.prompts is above 0, but every one of mix.shares is 0")
    if c.reward.unlabelled is not None and sees_answer(c.reward.unlabelled):
        problems.append(
            "reward.unlabelled must not see an answer: only regex, or sums of regex, are allowed"
        )
    if c.algorithm.advantage.kind in ("group_mean", "rloo") and c.rollout.group_size < 2:
        problems.append(
            f"algorithm.advantage {c.algorithm.advantage.kind} compares responses to one prompt: "
            "rollout.group_size must be 2 or more"
        )
    if c.model.lora is not None and (c.reference.path or c.reference.reset != "never"):
        problems.append(
            "with model.lora the reference is the policy without its adapter: "
            "set reference.reset to never, and no reference.path"
        )
    if c.critic.shared and c.critic.path is not None:
        problems.append("critic.shared has no model of its own: critic.path must be null")
    if c.critic.shared and c.critic.warmup:
        problems.append("critic.warmup would move a shared trunk, and so the policy: set it to 0")
    if not c.algorithm.has_critic and c.critic != Critic():
        problems.append("critic.* has no effect without a critic (algorithm.advantage gae)")
    if c.data.held_out and c.reward.labelled is None:
        problems.append("data.held_out needs reward.labelled to be evaluated")
    return problems


def _of(section: Section, key: str) -> Any:
    return dict(section)[key]


def sees_answer(reward: Section) -> bool:
    """Whether a reward compares with an answer or asks a checker."""
    if isinstance(reward, WeightedReward):
        return any(sees_answer(part.reward) for part in reward.parts)
    return not isinstance(reward, RegexReward)
