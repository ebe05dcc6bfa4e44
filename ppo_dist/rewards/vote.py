"""Majority votes over the answers of a group of responses, and the reward that they give."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence

from ppo_dist.config.base import InputError
from ppo_dist.config.reward import VoteReward
from ppo_dist.rewards.extract import extractor
from ppo_dist.rewards.rules import OnError
from ppo_dist.types import Ballot, Rollout, Score, Vote

logger = logging.getLogger(__name__)


def vote(answers: Sequence[str | None]) -> Vote:
    """The most frequent answer. None (nothing could be taken out) never wins, but counts in the
    shares; a tie abstains.

    Source: Zuo et al. 2025 (TTRL), arXiv:2504.16084, section 2.1; the tie rule is ours.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return Vote(None, 0.0, 0.0, 0.0)
    (first, most), *others = counts.most_common(2)
    second = others[0][1] if others else 0
    given = sum(counts.values())
    entropy = sum(n / given * math.log(given / n) for n in counts.values())
    label = first if most > second else None
    return Vote(label, most / len(answers), (most - second) / len(answers), entropy)


def votes_of_the_others(answers: Sequence[str | None]) -> list[Vote]:
    """For each response the vote without it, so that none confirms itself."""
    every = list(answers)
    return [vote(every[:i] + every[i + 1 :]) for i in range(len(every))]


class MajorityVote:
    """A RewardSource that knows no answer: 1 for the responses that agree with the majority of
    those to the same prompt.
    """

    def __init__(self, rule: VoteReward, on_error: OnError) -> None:
        self._extract, self._leave_one_out = extractor(rule.extract), rule.leave_one_out
        self._on_error = on_error

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """See RewardSource. Each score carries its response's part in the vote.

        Raises:
            InputError: an answer could not be looked for, and `reward.on_error` is error.
        """
        groups: dict[str, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.prompt.uid, []).append(i)
        scores: dict[int, Score] = {}
        for members in groups.values():
            scores.update(zip(members, self._judged([rollouts[i] for i in members]), strict=True))
        return [scores[i] for i in range(len(rollouts))]

    def _judged(self, group: Sequence[Rollout]) -> list[Score]:
        answers, faults = zip(*map(self._answer, group), strict=True)
        whole = vote(answers)
        judges = votes_of_the_others(answers) if self._leave_one_out else [whole] * len(group)
        return [
            Score(
                float(judge.label is not None and answer == judge.label),
                "vote",
                fault,
                Ballot(whole, answer, judge.label is not None),
            )
            for answer, fault, judge in zip(answers, faults, judges, strict=True)
        ]

    def _answer(self, rollout: Rollout) -> tuple[str | None, str | None]:
        """(answer, fault)"""
        try:
            found = self._extract(rollout.text)
        except Exception as error:  # an extractor may be the user's own code
            fault = f"{type(error).__name__}: {error}"
            message = (
                f"no answer could be looked for in a response to {rollout.prompt.uid}: {fault}"
            )
            if self._on_error == "error":
                raise InputError(f"reward vote: {message}") from None
            logger.warning("%s; it does not vote", message)
            return None, fault
        return None if found is None else str(found), None
