"""Rewards that follow from the response and the prompt's answer alone: exact, numeric, regex, and
their sums.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from ppo_dist.config.base import InputError, Origin, RunError
from ppo_dist.config.reward import ExactReward, FunctionReward, NumericReward, RegexReward
from ppo_dist.protocols import RewardSource
from ppo_dist.reports import Vitals
from ppo_dist.rewards.extract import extractor, in_time, is_same_mathematics
from ppo_dist.rewards.user import load_function
from ppo_dist.types import Dropped, Rollout, Score

OnError = Literal["error", "zero"]
Judge = Callable[[Rollout], float]
logger = logging.getLogger(__name__)


class Judged:
    """A RewardSource out of a function of one rollout; what the function fails on is an error or a
    counted zero.
    """

    def __init__(self, judge: Judge, source: str, on_error: OnError) -> None:
        self._judge, self._source, self._on_error = judge, source, on_error

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """See RewardSource.

        Raises:
            InputError: the function raised or returned no finite number, and `reward.on_error` is
                error.
        """
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> Score:
        try:
            value = float(self._judge(rollout))
            fault = None if math.isfinite(value) else f"returned {value}"
        except Exception as error:  # a checker is foreign code and the response may be anything
            fault = f"{type(error).__name__}: {error}"
        if fault is None:
            return Score(value, self._source)
        message = (
            f"reward {self._source} failed on {rollout.prompt.uid}, "
            f"response {rollout.text[:200]!r}: {fault}"
        )
        if self._on_error == "error":
            raise InputError(message)
        logger.warning("%s; counted as 0", message)
        return Score(0.0, self._source, fault)


def exact(rule: ExactReward) -> Judge:
    """1 if the extracted text is the answer, or what is extracted from that, else 0."""
    extract, fold = extractor(rule.extract), str.lower if rule.ignore_case else str

    def judge(rollout: Rollout) -> float:
        found, answer = extract(rollout.text), _answer(rollout)
        if found is None:
            return 0.0
        if fold(found) == fold(answer.strip()):
            return 1.0
        within = extract(answer)
        return float(within is not None and fold(found) == fold(within))

    return judge


def numeric(rule: NumericReward) -> Judge:
    """1 if the extracted number is the answer within the tolerance, else 0. An answer that is no
    number itself is one that its number is extracted from.
    """
    extract = extractor(rule.extract)

    def judge(rollout: Rollout) -> float:
        text = _answer(rollout)
        answer = _number(text)
        if answer is None and (answer := _number(extract(text))) is None:
            raise ValueError(f"the answer {text[:100]!r} has no number")
        found = _number(extract(rollout.text))
        return float(found is not None and abs(found - answer) <= rule.tolerance)

    return judge


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def mathematics(rollout: Rollout) -> float:
    """1 if the response's answer is the prompt's as mathematics, else 0."""
    return float(is_same_mathematics(rollout.text, _answer(rollout)))


def function(rule: FunctionReward) -> Judge:
    """What the user's function says of prompt, response and answer."""
    judge = load_function(rule.path, rule.name)

    def judged(rollout: Rollout) -> float:
        answer = _answer(rollout) if rule.needs_answer else rollout.prompt.answer
        return float(judge(rollout.prompt.text, rollout.text, answer))

    return judged


def regex(rule: RegexReward) -> Judge:
    """1 if the pattern is found in the response, else 0.

    Raises:
        InputError: the pattern is not a regular expression.
    """
    try:
        pattern = re.compile(rule.pattern)
    except re.error as error:
        raise InputError(f"reward: {rule.pattern!r} is not a regular expression: {error}") from None
    # a pattern may take for ever on a text that was not thought of
    return lambda rollout: float(in_time(lambda: pattern.search(rollout.text)) is not None)


def _answer(rollout: Rollout) -> str:
    if rollout.prompt.answer is None:
        raise ValueError("the prompt has no answer")
    return rollout.prompt.answer


class WeightedSum:
    """Sum of weight · score over its parts."""

    def __init__(self, parts: Sequence[tuple[float, RewardSource]]) -> None:
        self._parts = parts

    def score(self, rollouts: Sequence[Rollout]) -> list[Score | Dropped]:
        """See RewardSource. The source names all parts; the first part's fault and vote stand for
        all. Without one of the parts there is no sum.
        """
        columns = [part.score(rollouts) for _, part in self._parts]
        return [self._sum(row) for row in zip(*columns, strict=True)]

    def _sum(self, row: tuple[Score | Dropped, ...]) -> Score | Dropped:
        scores = [score for score in row if isinstance(score, Score)]
        if len(scores) < len(row):
            return next(score for score in row if isinstance(score, Dropped))
        value = _total(
            weight * score.value for (weight, _), score in zip(self._parts, scores, strict=True)
        )
        fault = next((score.fault for score in scores if score.fault), None)
        ballot = next((score.ballot for score in scores if score.ballot), None)
        return Score(value, "+".join(score.source for score in scores), fault, ballot)


def _total(terms: Iterable[float]) -> float:
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):  # above the largest number, or inf − inf
        return math.nan


class ByOrigin:
    """Rewards: asks, for each rollout, the source that its prompt's origin has."""

    def __init__(
        self,
        sources: Mapping[Origin, RewardSource],
        workers: Sequence[Callable[[], Sequence[Vitals]]] = (),
    ) -> None:
        """`workers` tell what those of a reward model took; one such function for each model."""
        self._sources, self._workers = sources, workers

    def vitals(self) -> dict[int, Vitals]:
        """See Rewards."""
        return dict(enumerate(told for workers in self._workers for told in workers()))

    def score(self, rollouts: Sequence[Rollout]) -> list[Score | Dropped]:
        """See RewardSource.

        Raises:
            RunError: a score is not finite, as of a broken reward model; names source and response.
        """
        scores: dict[int, Score | Dropped] = {}
        for origin, source in self._sources.items():
            members = [i for i, rollout in enumerate(rollouts) if rollout.prompt.origin == origin]
            scores.update(zip(members, source.score([rollouts[i] for i in members]), strict=True))
        return [_finite(scores[i], rollout) for i, rollout in enumerate(rollouts)]


def _finite(score: Score | Dropped, rollout: Rollout) -> Score | Dropped:
    if isinstance(score, Dropped) or math.isfinite(score.value):
        return score
    raise RunError(
        f"reward {score.source} gave {score.value} to {rollout.prompt.uid}, response "
        f"{rollout.text[:200]!r}: nothing can be learned from that"
    )
