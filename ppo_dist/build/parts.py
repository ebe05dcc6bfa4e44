"""Rewards, gates and advantage estimators: the parts without workers or models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ppo_dist.config import ORIGINS, Config, InputError, RunError, remote_rewards, reward_models
from ppo_dist.config.algorithm import AnyAdvantage, Gae, GroupMean, ReinforcePlusPlus, Rloo
from ppo_dist.config.reward import (
    AnyReward,
    ExactReward,
    FunctionReward,
    GymReward,
    MathReward,
    ModelReward,
    NumericReward,
    RegexReward,
    RemoteReward,
    VoteReward,
    WeightedReward,
)
from ppo_dist.config.semi import AllGate, AnyGate, ConfidenceGate, TrajectoryGate
from ppo_dist.protocols import AdvantageEstimator, Gate, Rewards, RewardSource

if TYPE_CHECKING:
    from ppo_dist.rewards.model import ModelScores, Traces

Models = Mapping[ModelReward, "ModelScores"]


def reward_source(config: Config, models: Models | None = None) -> Rewards:
    """The reward of every origin that has one. Without `models`, where there are none to ask,
    reward models are left out.
    """
    from ppo_dist.rewards.rules import ByOrigin

    sections, on_error = dict(config.reward), config.reward.on_error
    made = {o: _reward(sections[o], on_error, models) for o in ORIGINS if sections[o] is not None}
    asked = [model.vitals for model in (models or {}).values()]
    return ByOrigin({o: source for o, source in made.items() if source is not None}, asked)


def traces(config: Config) -> list[Traces]:
    """What the workers of all reward models write, in order."""
    from ppo_dist.rewards.model import Traces

    count = sum(section.workers for section in reward_models(config))
    folder, calls = Path(config.run.dir) / "profile", config.train.profile_steps
    return [Traces(folder, number, calls) for number in range(count)]


def _reward(
    section: AnyReward, on_error: Literal["error", "zero"], models: Models | None
) -> RewardSource | None:
    from ppo_dist.rewards.gym import gym
    from ppo_dist.rewards.rules import (
        Judged,
        WeightedSum,
        exact,
        function,
        mathematics,
        numeric,
        regex,
    )
    from ppo_dist.rewards.vote import MajorityVote

    match section:
        case ExactReward():
            judge = exact(section)
        case NumericReward():
            judge = numeric(section)
        case MathReward():
            judge = mathematics
        case RegexReward():
            judge = regex(section)
        case FunctionReward():
            judge = function(section)
        case VoteReward():
            return MajorityVote(section, on_error)
        case GymReward():
            judge = gym(section)
        case ModelReward():
            return None if models is None else models[section]
        case RemoteReward():
            from ppo_dist.rewards.remote import RemoteScores

            return RemoteScores(section)
        case WeightedReward():
            parts = [(p.weight, _reward(p.reward, on_error, models)) for p in section.parts]
            return WeightedSum([(weight, part) for weight, part in parts if part is not None])
    return Judged(judge, section.kind, on_error)


def check_servers(config: Config) -> None:
    """Asks every reward server whether it can be used.

    Raises:
        InputError: one cannot; names the key.
    """
    for key, section in remote_rewards(config):
        from ppo_dist.rewards.remote import probe

        try:
            probe(section)
        except (InputError, RunError) as error:
            raise InputError(f"{key}: {error}") from None


def gate(section: AnyGate) -> Gate:
    """The gate that a config names."""
    from ppo_dist.semi import gate as gates

    match section:
        case AllGate():
            return gates.All()
        case ConfidenceGate():
            return gates.Confidence(section)
        case TrajectoryGate():
            return gates.Trajectory(section)


def advantage_estimator(section: AnyAdvantage) -> AdvantageEstimator:
    """The advantage estimator that a config names."""
    from ppo_dist.algo import advantages

    match section:
        case Gae():
            return advantages.Gae(section.gamma, section.lam)
        case GroupMean():
            return advantages.GroupMean(section.std)
        case Rloo():
            return advantages.Rloo()
        case ReinforcePlusPlus():
            return advantages.ReinforcePlusPlus(section.gamma)
