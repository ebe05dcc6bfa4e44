"""Which unlabelled prompts count: their votes are all there is to judge them by."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo_dist.config.semi import ConfidenceGate, TrajectoryGate
from ppo_dist.types import Floats, Scored


def by_prompt(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """The responses of each prompt, by uid."""
    groups: dict[str, list[Scored]] = {}
    for each in scored:
        groups.setdefault(each.rollout.prompt.uid, []).append(each)
    return groups


def is_unlabelled(group: Sequence[Scored]) -> bool:
    """Whether it is up to a gate if a group counts."""
    return group[0].rollout.prompt.origin == "unlabelled"


class All:
    """Admits every prompt."""

    def admit(self, scored: Sequence[Scored]) -> set[str]:
        """See Gate."""
        return {uid for uid, group in by_prompt(scored).items() if is_unlabelled(group)}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on from."""


class Confidence(All):
    """Admits prompts whose vote is clear enough."""

    def __init__(self, section: ConfidenceGate) -> None:
        self._section = section

    def admit(self, scored: Sequence[Scored]) -> set[str]:
        """See Gate."""
        return {uid for uid, group in by_prompt(scored).items() if self._is_clear(group)}

    def _is_clear(self, group: Sequence[Scored]) -> bool:
        ballot = group[0].score.ballot
        return (
            is_unlabelled(group)
            and ballot is not None
            and ballot.vote.share >= self._section.share
            and ballot.vote.margin >= self._section.margin
        )


def _passes(scored: Scored) -> bool:
    """Whether a response is right: by the vote where there is one, else by its score."""
    ballot = scored.score.ballot
    if ballot is None:
        return scored.score.is_right
    return ballot.vote.label is not None and ballot.answer == ballot.vote.label


class Histories:
    """Pass rates by prompt and window of time, the newest `length` windows of each.

    A prompt takes 2·length bytes and its place in a dict: a million of 16 windows 0.2 GB.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self.windows = 0  # how many there have been
        self._rows: dict[str, int] = {}
        self._rates = np.full((0, length), np.nan, np.float16)

    def add(self, rates: Mapping[str, float]) -> None:
        """A window's rates: everything moves one column to the left, and they are the last one."""
        self.windows += 1
        for uid in rates:
            self._rows.setdefault(uid, len(self._rows))
        if len(self._rows) > len(self._rates):
            more = max(len(self._rows), 2 * len(self._rates)) - len(self._rates)
            fresh = np.full((more, self._length), np.nan, np.float16)
            self._rates = np.concatenate([self._rates, fresh])
        self._rates[:, :-1] = self._rates[:, 1:]
        self._rates[:, -1] = np.nan
        at = np.fromiter((self._rows[uid] for uid in rates), np.int64, len(rates))
        self._rates[at, -1] = np.fromiter(rates.values(), np.float16, len(rates))

    def standardised(self, uids: Sequence[str]) -> Floats:
        """(len(uids), windows): unit vectors along the z-normalised histories of the windows kept;
        zero where there is no history, or one that never moved.

        A window in which a prompt did not come has the rate of the one before, or of the first
        known.
        """
        windows = min(self.windows, self._length)
        rates = np.full((len(uids), windows), np.nan, np.float32)
        known = [(i, self._rows[uid]) for i, uid in enumerate(uids) if uid in self._rows]
        if not known:
            return np.zeros_like(rates)
        places, rows = zip(*known, strict=True)
        rates[list(places)] = self._rates[list(rows), self._length - windows :]
        for fill in (range(1, windows), range(windows - 2, -1, -1)):
            for w in fill:
                before = rates[:, w - 1] if fill.step > 0 else rates[:, w + 1]
                rates[:, w] = np.where(np.isnan(rates[:, w]), before, rates[:, w])
        rates = np.nan_to_num(rates - rates.mean(1, keepdims=True))
        length = np.linalg.norm(rates, axis=1, keepdims=True)
        return np.where(length > 1e-3, rates / np.maximum(length, 1e-3), 0.0).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """Uids in order, and the table as compressed text."""
        table = base64.b64encode(zlib.compress(self._rates[: len(self._rows)].tobytes(), 1))
        return {"windows": self.windows, "uids": list(self._rows), "rates": table.decode()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved table."""
        self.windows = state["windows"]
        self._rows = {uid: row for row, uid in enumerate(state["uids"])}
        table = np.frombuffer(zlib.decompress(base64.b64decode(state["rates"])), np.float16)
        self._rates = table.reshape(len(self._rows), self._length).copy()


class Trajectory:
    """Admits prompts whose pass rate moves like that of the labelled ones.

    Source: TraPO (arXiv:2512.13106): pass rates of unlabelled prompts are against their own
    majority, those of labelled ones against the answer; both rise where the policy really learns.
    A history here is by time, not by visit, since labelled prompts come more often.
    """

    def __init__(self, section: TrajectoryGate) -> None:
        self._section = section
        self._histories = Histories(section.length)
        self._labelled: dict[str, None] = {}  # uids in order of arrival
        self._steps = 0
        self._open: dict[str, tuple[float, int]] = {}  # of the window that is not over: sum, count

    def admit(self, scored: Sequence[Scored]) -> set[str]:
        """See Gate. Remembers the step's pass rates; admits nothing during the warm-up."""
        groups = by_prompt(scored)
        for uid, group in groups.items():
            if group[0].rollout.prompt.origin == "labelled":
                self._labelled[uid] = None
            elif not is_unlabelled(group):
                continue
            total, count = self._open.get(uid, (0.0, 0))
            rate = sum(map(_passes, group)) / len(group)
            self._open[uid] = (total + rate, count + 1)
        self._steps += 1
        candidates = [uid for uid, group in groups.items() if is_unlabelled(group)]
        admitted = self._alike(candidates)
        if self._steps % self._section.window == 0:
            self._histories.add({uid: total / n for uid, (total, n) in self._open.items()})
            self._open = {}
        return admitted

    def similarities(self, uids: Sequence[str]) -> Floats:
        """Of each prompt the mean cosine to the labelled ones."""
        labelled = self._histories.standardised(list(self._labelled))
        # the mean of cosines of unit vectors is the product with their mean
        cosines: Floats = self._histories.standardised(uids) @ labelled.mean(0)
        return cosines

    def _alike(self, uids: Sequence[str]) -> set[str]:
        section = self._section
        if self._histories.windows < section.warmup or not uids or not self._labelled:
            return set()
        cosines = self.similarities(uids)
        order = np.argsort(-cosines, kind="stable")
        top = order[: round(section.top * len(uids))]
        return {uids[i] for i in top if cosines[i] > 0} | {
            uid for uid, cosine in zip(uids, cosines, strict=True) if cosine >= section.threshold
        }

    def state_dict(self) -> dict[str, Any]:
        """The histories, and the window that is not over."""
        return {
            "steps": self._steps,
            "labelled": list(self._labelled),
            "open": self._open,
            "histories": self._histories.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from saved histories."""
        self._steps = state["steps"]
        self._labelled = dict.fromkeys(state["labelled"])
        self._open = {uid: (total, count) for uid, (total, count) in state["open"].items()}
        self._histories.load_state_dict(state["histories"])
