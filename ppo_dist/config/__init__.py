"""The schema of a run: every key, its default, what is allowed. Importing this never imports torch.

Horizons (`steps`, `warmup`) count steps of the run and are keys of their own, never a share of
`train.steps`: so a run that is continued with more steps follows the same curves.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from ppo_dist.config.algorithm import Algorithm, Mix
from ppo_dist.config.base import (
    ORIGINS,
    FilePath,
    InputError,
    Origin,
    RunError,
    Section,
    WorkersLost,
)
from ppo_dist.config.combinations import (
    corrects,
    impossible,
    remote_rewards,
    reuses_logprobs,
    reward_models,
    sees_answer,
    uses,
)
from ppo_dist.config.data import Critic, Data, Model, Reference
from ppo_dist.config.reward import Reward
from ppo_dist.config.semi import Semi
from ppo_dist.config.workers import (
    Cluster,
    Eval,
    LearnerSection,
    RolloutSection,
    StreamSection,
    Tracking,
    Transport,
)

__all__ = [
    "ORIGINS",
    "Config",
    "InputError",
    "Origin",
    "RunError",
    "Section",
    "WorkersLost",
    "corrects",
    "remote_rewards",
    "reuses_logprobs",
    "reward_models",
    "sees_answer",
    "uses",
]


class Run(Section):
    """Where a run lives, and what its randomness hangs on."""

    dir: FilePath = Field(
        description="folder of the run: config, metrics, samples, checkpoints, policy"
    )
    seed: int = Field(0, ge=0, description="seed of everything random in the run")


class Train(Section):
    """How long a run is, and what it keeps on the way."""

    steps: int = Field(
        ge=1, description="passes of the loop: each gives one metrics row and one policy version"
    )
    checkpoint_every: int = Field(
        0, ge=0, description="steps between checkpoints; 0: only when the run ends or stops"
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="how many of the newest checkpoints stay on disk"
    )
    profile_steps: int = Field(
        0,
        ge=0,
        description="steps, after the first, of which every learner and rollout worker writes "
        "torch traces into the run folder's profile/ (for Perfetto or chrome://tracing), and every "
        "reward model's worker of as many calls",
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
    semi: Semi = Semi()
    algorithm: Algorithm = Algorithm()
    reference: Reference | None = Reference()
    critic: Critic = Critic()
    rollout: RolloutSection = RolloutSection()
    stream: StreamSection = StreamSection()
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
