"""The verifiers of reasoning-gym tasks."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from ppo_dist.config.reward import GymReward
from ppo_dist.rewards.extract import extractor
from ppo_dist.rewards.rules import Judge
from ppo_dist.types import Rollout


def gym(rule: GymReward) -> Judge:
    """The task's own score of the extracted answer.

    Some tasks give part of a point for a text that merely contains the answer, or for none at all:
    with `strict`, all but a full score is 0.
    """
    extract = extractor(rule.extract)

    def judge(rollout: Rollout) -> float:
        checker = rollout.prompt.checker
        if checker is None:
            raise ValueError("the prompt does not come from a reasoning-gym source")
        found = extract(rollout.text)
        if found is None:
            return 0.0
        score = float(
            _task(checker.task, json.dumps(checker.options)).score_answer(found, checker.entry)
        )
        # some scores add up parts to slightly more than 1 for an answer that goes on after its end
        return float(score == 1.0) if rule.strict else min(score, 1.0)

    return judge


@lru_cache(maxsize=64)
def _task(name: str, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(options))
