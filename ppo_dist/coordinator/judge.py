"""What a reward says of rollouts, and which of them it says nothing of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_dist.protocols import RewardSource
from ppo_dist.types import Dropped, Rollout, Score, Scored


def judged(reward: RewardSource, rollouts: Sequence[Rollout]) -> tuple[list[Scored], list[Dropped]]:
    """The rollouts that have a score, with it, and why the others have none. These end here: a
    group's mean, a vote's admission and every N are of those that are left.
    """
    pairs = list(zip(rollouts, reward.score(rollouts), strict=True))
    scored = [Scored(rollout, score) for rollout, score in pairs if isinstance(score, Score)]
    return scored, [score for _, score in pairs if isinstance(score, Dropped)]


def sample(scored: Scored) -> dict[str, Any]:
    """A row of the table of samples."""
    rollout, score = scored.rollout, scored.score
    return {
        "uid": rollout.prompt.uid,
        "origin": rollout.prompt.origin,
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "reward": score.value,
        "source": score.source,
        "answer": score.ballot and score.ballot.answer,
        "vote_share": score.ballot and score.ballot.vote.share,
        "finish": rollout.finish,
        "version": rollout.version,
    }
