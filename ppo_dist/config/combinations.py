"""Combinations of values that are each fine and together are not, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ppo_dist.config.algorithm import Complement
from ppo_dist.config.base import ORIGINS, Adaptive, Section, SupervisedFirst, peak
from ppo_dist.config.data import Critic, Reference
from ppo_dist.config.reward import (
    FunctionReward,
    ModelReward,
    RegexReward,
    RemoteReward,
    VoteReward,
    WeightedReward,
)
from ppo_dist.config.semi import AllGate

if TYPE_CHECKING:
    from ppo_dist.config import Config


def impossible(config: Config) -> Iterator[str]:
    """All that does not go together."""
    yield from _workers(config)
    yield from _mix(config)
    yield from _unlabelled(config)
    yield from _algorithm(config)
    yield from _held_out(config)


def sees_answer(reward: Section) -> bool:
    """Whether a reward compares with an answer or asks a checker."""
    if isinstance(reward, WeightedReward):
        return any(sees_answer(part.reward) for part in reward.parts)
    if isinstance(reward, (FunctionReward, RemoteReward)):
        return reward.needs_answer
    return not isinstance(reward, (RegexReward, VoteReward, ModelReward))


def reward_models(config: Config) -> list[ModelReward]:
    """Every reward model that a run asks, once."""
    found = [section for _, section in _rewards(config) if isinstance(section, ModelReward)]
    return list(dict.fromkeys(found))


def remote_rewards(config: Config) -> list[tuple[str, RemoteReward]]:
    """Every reward that a run asks a server for, with its key."""
    return [
        (key, section) for key, section in _rewards(config) if isinstance(section, RemoteReward)
    ]


def _rewards(config: Config) -> Iterator[tuple[str, Section]]:
    """All rewards of a config with their keys, sums taken apart."""
    waiting = [(f"reward.{origin}", _of(config.reward, origin)) for origin in ORIGINS]
    while waiting:
        key, section = waiting.pop(0)
        if isinstance(section, WeightedReward):
            parts = enumerate(section.parts)
            waiting += [(f"{key}.parts.{i}.reward", part.reward) for i, part in parts]
        elif section is not None:
            yield key, section


def votes(reward: Section | None) -> bool:
    """Whether a reward, or a part of it, is a majority vote."""
    if isinstance(reward, WeightedReward):
        return any(votes(part.reward) for part in reward.parts)
    return isinstance(reward, VoteReward)


def uses(config: Config, origin: str) -> bool:
    """Whether a run generates responses to prompts of an origin."""
    return peak(config.mix.prompts) > 0 and peak(_of(config.mix.shares, origin)) > 0


def corrects(config: Config) -> bool:
    """Whether the policy loss is corrected for what wrote a response."""
    kind = config.algorithm.correction.kind
    return kind == "importance" or (kind == "auto" and config.stream.max_lag > 0)


def reuses_logprobs(config: Config) -> bool:
    """Whether the rollout workers' log-probabilities are the old ones, so that the policy makes no
    pass of its own before the first update.
    """
    chosen = config.algorithm.old_logprobs
    if chosen != "auto":
        return chosen == "behaviour"
    is_same = config.rollout.engine.kind == "hf" and config.learner.dtype == "fp32"
    is_free = config.critic.shared  # the pass is made anyway, for the values
    return is_same and not is_free and not config.stream.max_lag and not corrects(config)


def _workers(c: Config) -> Iterator[str]:
    if c.learner.zero_stage == 0 and c.learner.offload != "none":
        yield "learner.offload needs learner.zero_stage 1, 2 or 3"
    if c.learner.zero_stage == 3 and c.learner.compile:
        yield "learner.compile needs learner.zero_stage 0, 1 or 2"
    if c.cluster.kind == "local" and (c.learner.workers > 1 or c.rollout.workers > 1):
        yield "cluster.kind local runs one learner and one rollout worker: set both `workers` to 1"
    if c.cluster.kind == "local" and any(model.workers > 1 for model in reward_models(c)):
        yield "cluster.kind local runs one worker of a reward model: set its `workers` to 1"
    if c.cluster.placement == "colocated":
        yield from _colocated(c)


def _colocated(c: Config) -> Iterator[str]:
    wanted = "cluster.placement colocated"
    each = c.rollout.engine.gpus
    if c.cluster.kind == "local":
        yield f"{wanted} is about a cluster: set cluster.kind to ray"
    if c.learner.workers != c.rollout.workers * each:
        yield (
            f"{wanted}: a rollout worker borrows the GPUs of {each} learner(s), so learner.workers "
            f"must be {c.rollout.workers * each}"
        )
    if c.transport.kind == "collective":
        yield f"{wanted}: two ends of a collective need two GPUs: transport.kind store or disk"
    if c.stream.max_lag:
        yield f"{wanted}: they take turns, so neither is ahead: set stream.max_lag to 0"


def _mix(c: Config) -> Iterator[str]:
    mu, labelled = c.mix.schedule, peak(c.mix.labelled_batch)
    mixed = mu.then if isinstance(mu, SupervisedFirst) else mu
    if isinstance(c.mix.policy_coef, Complement) and peak(mixed) > 1:
        yield "mix.policy_coef complement is 1−μ, so μ (mix.schedule) must not pass 1"
    if labelled > 0 and not c.data.labelled:
        yield "mix.labelled_batch is above 0, but data.labelled is empty"
    if isinstance(mu, SupervisedFirst) and labelled == 0:
        yield "mix.schedule supervised_first needs mix.labelled_batch above 0"
    if peak(c.mix.prompts) == 0 and (_mu_peak(c) == 0 or labelled == 0):
        yield (
            "nothing to train on: mix.prompts is 0 and so is mix.labelled_batch or μ (mix.schedule)"
        )
    for origin in ORIGINS:
        if uses(c, origin):
            if not _of(c.data, origin) and not (origin == "unlabelled" and c.semi.probe):
                yield f"mix.shares.{origin} is above 0, but data.{origin} is empty"
            if _of(c.reward, origin) is None:
                yield f"mix.shares.{origin} is above 0, but reward.{origin} is not given"
    if peak(c.mix.prompts) > 0 and not any(uses(c, origin) for origin in ORIGINS):
        yield "mix.prompts is above 0, but every one of mix.shares is 0"


def _unlabelled(c: Config) -> Iterator[str]:
    reward, semi = c.reward.unlabelled, c.semi
    if reward is not None and sees_answer(reward):
        yield (
            "reward.unlabelled must not see an answer: only vote, regex, model, a function or a"
            " remote without needs_answer, or sums of these, are allowed"
        )
    gated = not isinstance(semi.gate, AllGate)
    if semi.pseudo is not None and _mu_peak(c) == 0:
        yield "semi.pseudo has no effect: μ (mix.schedule) is 0"
    if uses(c, "unlabelled") and gated and not votes(reward):
        yield f"semi.gate {semi.gate.kind} judges votes: reward.unlabelled must be, or hold, vote"
    if gated and not uses(c, "unlabelled"):
        yield f"semi.gate {semi.gate.kind} has no effect: mix.shares.unlabelled is 0"
    if semi.gate.kind == "trajectory" and uses(c, "unlabelled") and not uses(c, "labelled"):
        yield "semi.gate trajectory compares with labelled prompts: mix.shares.labelled is 0"
    if semi.pseudo is not None and not any(uses(c, origin) for origin in semi.pseudo.origins):
        yield "semi.pseudo has nothing to take from: mix.shares of all its origins are 0"
    if semi.probe and (c.reward.labelled is None or not uses(c, "unlabelled")):
        yield "semi.probe needs reward.labelled, and mix.shares.unlabelled above 0"
    elif semi.probe and c.reward.labelled is not None and not sees_answer(c.reward.labelled):
        yield "semi.probe compares with answers: reward.labelled must be one that sees them"
    if votes(c.reward.labelled):
        yield "reward.labelled sees answers and judges the held-out set: it must not be vote"
    mu = c.mix.schedule
    mixed = mu.then if isinstance(mu, SupervisedFirst) else mu
    for name, check in semi.guard.checks.items():
        if check.action == "raise_mu" and peak(mixed) == 0:
            yield f"semi.guard.{name} cannot raise_mu: μ (mix.schedule) is 0 where it would"
    for origin in ORIGINS:
        if uses(c, origin) and votes(_of(c.reward, origin)) and c.rollout.group_size < 2:
            yield f"reward.{origin} is a vote: rollout.group_size must be 2 or more"


def _algorithm(c: Config) -> Iterator[str]:
    algorithm, critic = c.algorithm, c.critic
    if algorithm.advantage.kind in ("group_mean", "rloo") and c.rollout.group_size < 2:
        yield (
            f"algorithm.advantage {algorithm.advantage.kind} compares responses to one prompt: "
            "rollout.group_size must be 2 or more"
        )
    if c.reference is None and (algorithm.kl.coef or c.semi.guard.kl is not None):
        yield (
            "algorithm.kl and semi.guard.kl are about the KL to the reference: "
            "without one (reference null) set them to 0 and to null"
        )
    if c.model.lora is not None and c.reference not in (None, Reference(reset="never")):
        yield (
            "with model.lora the reference is the policy without its adapter: "
            "set reference.reset to never, and no reference.path"
        )
    takes_over = algorithm.old_logprobs == "behaviour"
    if takes_over and corrects(c):
        yield (
            "algorithm.old_logprobs behaviour leaves nothing to correct: set algorithm.correction "
            "to off"
        )
    if takes_over and critic.shared:
        yield (
            "critic.shared makes the policy's pass anyway: set algorithm.old_logprobs to recompute"
        )
    if algorithm.kl.coef == 0 and algorithm.kl.controller.kind == "adaptive":
        yield "algorithm.kl.coef 0 stays 0 under an adaptive controller: start above it"
    if critic.shared and critic.path is not None:
        yield "critic.shared has no model of its own: critic.path must be null"
    if critic.shared and critic.warmup:
        yield "critic.warmup would move a shared trunk, and so the policy: set it to 0"
    if not algorithm.has_critic and critic != Critic():
        yield "critic.* has no effect without a critic (algorithm.advantage gae)"


def _held_out(c: Config) -> Iterator[str]:
    for name in ("held_out", "test"):
        if _of(c.data, name) and c.reward.labelled is None:
            yield f"data.{name} needs reward.labelled to be evaluated"
    if c.data.held_out and c.eval.every:
        return
    missing = "data.held_out and eval.every"
    mu, mix = c.mix.schedule, c.mix
    mixed = mu.then if isinstance(mu, SupervisedFirst) else mu
    scalars = [mixed, mix.labelled_batch, mix.policy_coef, *dict(mix.shares).values()]
    if any(isinstance(scalar, Adaptive) for scalar in scalars):
        yield f"an adaptive schedule follows the held-out set: it needs {missing}"
    for name, check in c.semi.guard.checks.items():
        if name in ("gap", "drop") and check.action != "warn":
            yield f"semi.guard.{name} follows the held-out set: it needs {missing}"
        if check.action == "roll_back":
            yield f"semi.guard.{name} rolls back to the best held-out accuracy: it needs {missing}"


def _mu_peak(c: Config) -> float:
    mu = c.mix.schedule
    return max(mu.mu, peak(mu.then)) if isinstance(mu, SupervisedFirst) else peak(mu)


def _of(section: Section, key: str) -> Any:
    return dict(section)[key]
