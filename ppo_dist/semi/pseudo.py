"""Responses of the policy's own that are imitated like labels: a bounded, ageing buffer of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_dist.config.semi import PseudoLabels
from ppo_dist.semi.gate import by_prompt
from ppo_dist.types import Ints, LabelledExample, Prompt, Rollout, Scored

Key = tuple[str, bytes]
PSEUDO = 7919  # keeps these random numbers apart from those of the data's order


@dataclass(frozen=True, eq=False)
class Entry:
    """A pseudo-label and the step in which it was last confirmed.

    Example: Entry(uid="unlabelled/0:3", response="olleh", tokens_R=[15, 12, 12, 5, 8, 1], step=12)
    """

    uid: str
    response: str
    tokens_R: Ints
    step: int


class PseudoBuffer:
    """Entries by prompt, oldest first; none twice."""

    def __init__(self, section: PseudoLabels, prompts: Mapping[str, Prompt], seed: int) -> None:
        self._section, self._prompts, self._seed = section, prompts, seed
        self._entries: dict[Key, Entry] = {}
        self._of_prompt: dict[str, list[Key]] = {}
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._entries)

    def count(self, scored: Sequence[Scored]) -> int:
        """How many prompts there are from which something could be taken."""
        prompts = {s.rollout.prompt.uid: s.rollout.prompt.origin for s in scored}
        return sum(origin in self._section.origins for origin in prompts.values())

    def add(self, step: int, scored: Sequence[Scored]) -> int:
        """Takes what is good enough from the responses that count in a step, and lets go of what is
        too old or too much; returns from how many prompts something was taken.
        """
        taken = 0
        for uid, group in by_prompt(scored).items():
            if group[0].rollout.prompt.origin in self._section.origins:
                best = self._best(group)
                if best is not None:
                    # a copy: what comes from a worker may be a view of all that came with it
                    self._put(Entry(uid, best.text, best.tokens_R.copy(), step))
                    taken += 1
        self.expire(step)
        return taken

    def take(self) -> list[LabelledExample]:
        """Pseudo-labels of one update: at most `batch`, drawn without repetition."""
        entries = list(self._entries.values())
        generator = np.random.default_rng([self._seed, PSEUDO, self._drawn])
        self._drawn += 1
        chosen = generator.permutation(len(entries))[: self._section.batch]
        return [
            LabelledExample(self._prompts[e.uid], e.response, e.tokens_R)
            for e in (entries[i] for i in chosen)
        ]

    def mean_age(self, step: int) -> float | None:
        """In steps."""
        ages = [step - entry.step for entry in self._entries.values()]
        return float(np.mean(ages)) if ages else None

    def _best(self, group: Sequence[Scored]) -> Rollout | None:
        """The likeliest whole response among those with the top reward."""
        top = max(s.score.value for s in group)
        if top < self._section.min_reward - 1e-9:
            return None
        best = [s.rollout for s in group if s.score.value == top and s.rollout.finish == "eos"]
        return max(best, key=lambda r: (float(r.logprobs_R.sum()), -r.index), default=None)

    def _put(self, entry: Entry) -> None:
        key = entry.uid, entry.tokens_R.tobytes()
        self._entries.pop(key, None)  # the same again is as new
        self._entries[key] = entry
        of_prompt = self._of_prompt.setdefault(entry.uid, [])
        of_prompt[:] = [k for k in of_prompt if k in self._entries and k != key] + [key]
        while len(of_prompt) > self._section.per_prompt:
            del self._entries[of_prompt.pop(0)]

    def expire(self, step: int) -> None:
        """Lets go of what is too old at a step, or too much."""
        young = {
            key: entry
            for key, entry in self._entries.items()
            if step - entry.step < self._section.max_age
        }
        surplus = len(young) - self._section.capacity
        self._entries = dict(list(young.items())[max(surplus, 0) :])
        self._of_prompt = {}
        for key in self._entries:
            self._of_prompt.setdefault(key[0], []).append(key)

    def state_dict(self) -> dict[str, Any]:
        """All entries."""
        entries = [[e.uid, e.response, e.tokens_R.tolist(), e.step] for e in self._entries.values()]
        return {"drawn": self._drawn, "entries": entries}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from saved entries."""
        self._drawn, self._entries, self._of_prompt = state["drawn"], {}, {}
        for uid, response, tokens, step in state["entries"]:
            self._put(Entry(uid, response, np.asarray(tokens, np.int64), step))
