"""Majority votes over the answers that were taken out of a group of responses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Vote:
    """What a group agrees on. `label` is None where nothing wins: a tie, or no answer at all.

    `share` is the winner's part of all responses, `margin` what it is ahead of the next by, and
    `entropy` that of the answers that could be taken out, in nats.

    Example: Vote(label="7", share=0.5, margin=0.25, entropy=0.636)
    """

    label: str | None
    share: float
    margin: float
    entropy: float


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
