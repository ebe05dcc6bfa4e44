"""What is learned from unlabelled prompts: which of them count, what is imitated, and how true the
votes are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ppo_dist.config.semi import PseudoLabels
from ppo_dist.coordinator.experience import supervised
from ppo_dist.protocols import Gate, RewardSource
from ppo_dist.semi.gate import by_prompt, is_unlabelled
from ppo_dist.semi.pseudo import PseudoBuffer
from ppo_dist.semi.schedule import value_at
from ppo_dist.tracking.metrics import Row, mean
from ppo_dist.types import Prompt, Score, Scored, TrainSequence


class Probe:
    """Labelled prompts that are treated as unlabelled ones; their answers are known here alone."""

    def __init__(self, prompts: Mapping[str, Prompt], reward: RewardSource) -> None:
        self._prompts, self._reward = prompts, reward

    def row(self, scored: Sequence[Scored], admitted: set[str]) -> Row:
        """How true the step's votes and rewards were, on the probe's prompts."""
        probed = [s for s in scored if s.rollout.prompt.uid in self._prompts]
        truth = self._reward.score(
            [replace(s.rollout, prompt=self._prompts[s.rollout.prompt.uid]) for s in probed]
        )
        pairs = [(g, t) for g, t in zip(probed, truth, strict=True) if isinstance(t, Score)]
        labels: dict[str, bool] = {}  # by prompt: is a response that agrees with the vote right?
        for given, true in pairs:
            ballot = given.score.ballot
            if ballot and ballot.vote.label is not None and ballot.answer == ballot.vote.label:
                labels[given.rollout.prompt.uid] = true.is_right
        return {
            "pseudo/label_accuracy_probe": mean([v for u, v in labels.items() if u in admitted]),
            "pseudo/label_accuracy_probe_all": mean(list(labels.values())),
            "pseudo/reward_accuracy_probe": mean(
                [given.score.is_right == true.is_right for given, true in pairs]
            ),
        }


class Unlabelled:
    """Gate, pseudo-labels and probe of a run. `metrics` tells of the last step."""

    def __init__(
        self,
        gate: Gate,
        section: PseudoLabels | None,
        buffer: PseudoBuffer | None,
        probe: Probe | None,
    ) -> None:
        self._gate, self._section, self._buffer, self._probe = gate, section, buffer, probe
        self.metrics: Row = {}

    def admit(self, step: int, scored: Sequence[Scored]) -> list[Scored]:
        """The responses that anything is learned from: all to labelled and verifiable prompts, and
        those to admitted unlabelled prompts; but none that the others' votes could not judge.
        """
        self.metrics = {}
        if not scored:
            if self._buffer is not None:
                self._buffer.expire(step)
            return []
        groups = {u: g for u, g in by_prompt(scored).items() if is_unlabelled(g)}
        judged = {u for u, group in groups.items() if any(map(_is_judged, group))}
        admitted = self._gate.admit(scored) & judged
        kept = [
            s
            for s in scored
            if _is_judged(s)
            and (s.rollout.prompt.origin != "unlabelled" or s.rollout.prompt.uid in admitted)
        ]
        self.metrics = _votes(groups) | {
            "semi/admitted_share": len(admitted) / len(groups) if groups else None
        }
        if self._probe is not None:
            self.metrics |= self._probe.row(scored, admitted)
        if self._buffer is not None:
            asked, taken = self._buffer.count(scored), self._buffer.add(step, kept)
            self.metrics |= {
                "pseudo/accept_rate": taken / asked if asked else None,
                "pseudo/size": float(len(self._buffer)),
                "pseudo/age": self._buffer.mean_age(step),
            }
        return kept

    def supervised(self, step: int) -> list[TrainSequence]:
        """The pseudo-labels of one update, with their weight."""
        if self._buffer is None or self._section is None:
            return []
        weight = value_at(self._section.weight, step)
        sequences = [supervised(e, weight, "pseudo_label") for e in self._buffer.take()]
        tokens = sum(len(s.ce_weight_R) for s in sequences)
        self.metrics["pseudo/weight"] = weight
        self.metrics["pseudo/tokens"] = (self.metrics.get("pseudo/tokens") or 0.0) + tokens
        return sequences if weight else []

    def state_dict(self) -> dict[str, Any]:
        """Of gate and pseudo-labels."""
        buffer = None if self._buffer is None else self._buffer.state_dict()
        return {"gate": self._gate.state_dict(), "pseudo": buffer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""
        self._gate.load_state_dict(state["gate"])
        if self._buffer is not None and state["pseudo"] is not None:
            self._buffer.load_state_dict(state["pseudo"])


def _is_judged(scored: Scored) -> bool:
    ballot = scored.score.ballot
    return ballot is None or ballot.judged


def _votes(groups: Mapping[str, Sequence[Scored]]) -> Row:
    """Means over the unlabelled prompts that were voted on."""
    ballots = [g[0].score.ballot for g in groups.values()]
    votes = [ballot.vote for ballot in ballots if ballot is not None]
    return {
        "pseudo/vote_share": mean([vote.share for vote in votes]),
        "pseudo/vote_margin": mean([vote.margin for vote in votes]),
        "pseudo/vote_entropy": mean([vote.entropy for vote in votes]),
        "pseudo/abstain_rate": mean([vote.label is None for vote in votes]),
    }
