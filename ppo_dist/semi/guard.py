"""Looks for a run that rewards itself while it gets worse, and says what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ppo_dist.config.semi import Check
from ppo_dist.config.semi import Guard as GuardSection
from ppo_dist.types import MixPlan

ACTIONS = ("none", "warn", "raise_mu", "freeze", "roll_back", "stop")
Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Decision:
    """An action and what made it necessary.

    Example: Decision(action="freeze", reason="guard.gap is 0.52, its limit is 0.4")
    """

    action: str
    reason: str


class Guard:
    """Sees every metrics row; its earlier decisions shape the plans of later steps."""

    def __init__(self, section: GuardSection, is_complement: bool) -> None:
        """`is_complement`: the policy's coefficient is 1−μ, so μ stays within 1."""
        self._section, self._is_complement = section, is_complement
        self._factor = 1.0
        self._frozen_until = 0  # a step; −1 is for good
        self._best: float | None = None
        self._rewards: list[float] = []  # of unlabelled prompts since the last evaluation
        self._in_a_row: dict[str, int] = {}
        self.metrics: dict[str, float | None] = {}

    def is_frozen(self, step: int) -> bool:
        """Whether nothing is learned from unlabelled prompts at a step, counted from 0."""
        return self._frozen_until < 0 or step < self._frozen_until

    def adjusted(self, plan: MixPlan, step: int) -> MixPlan:
        """The plan of a step after what the guard has done so far."""
        if self.is_frozen(step):
            plan = replace(plan, prompts={**plan.prompts, "unlabelled": 0})
        if self._factor == 1.0:
            return plan
        mu = plan.mu * self._factor
        if self._is_complement:
            mu = min(mu, 1.0)
            return replace(plan, mu=mu, policy_coef=1.0 - mu)
        return replace(plan, mu=mu)

    def observe(self, step: int, row: Row) -> list[Decision]:
        """What to do after a step, counted from 1; `metrics` then tells of it.

        Only `roll_back` and `stop` are left to the caller, who then calls `rolled_back`.
        """
        self.metrics = {"guard/gap": None, "guard/action": 0.0}
        decisions = []
        for name, value, check, is_over in self._readings(row):
            count = self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if is_over else 0
            if count < check.patience or not is_over:
                continue
            self._in_a_row[name] = 0
            reason = f"guard.{name} is {value:.3g}, its limit is {check.limit:g}"
            decisions.append(Decision(check.action, reason))
            self._do(check.action, step)
        codes = [ACTIONS.index(decision.action) for decision in decisions]
        self.metrics["guard/action"] = float(max(codes, default=0))
        return decisions

    def rolled_back(self, step: int) -> None:
        """The policy is that of the best evaluation again: what was seen since is forgotten, and
        unlabelled prompts are frozen, since they would lead it the same way.
        """
        self._rewards, self._in_a_row = [], {}
        self._do("freeze", step)

    def _readings(self, row: Row) -> Iterator[tuple[str, float, Check, bool]]:
        """(name, value, check, whether it is past its limit) of all that is known this step."""
        section = self._section
        reward, accuracy = row.get("reward/unlabelled/mean"), row.get("eval/held_out/accuracy")
        if reward is not None:
            self._rewards.append(reward)
        if accuracy is not None:
            self._best = max(accuracy, self._best or 0.0)
            if self._rewards:
                gap = sum(self._rewards) / len(self._rewards) - accuracy
                self._rewards = []
                self.metrics["guard/gap"] = gap
                if section.gap is not None:
                    yield "gap", gap, section.gap, gap > section.gap.limit
            if section.drop is not None:
                drop = self._best - accuracy
                yield "drop", drop, section.drop, drop > section.drop.limit
        entropy, kl = row.get("pseudo/vote_entropy"), row.get("objective/kl")
        if entropy is not None and section.vote_entropy is not None:
            check = section.vote_entropy
            yield "vote_entropy", entropy, check, entropy < check.limit
        if kl is not None and section.kl is not None:
            yield "kl", kl, section.kl, kl > section.kl.limit

    def _do(self, action: str, step: int) -> None:
        if action == "raise_mu":
            self._factor = min(self._factor * self._section.raise_by, self._section.raise_at_most)
        if action == "freeze" and self._frozen_until >= 0:
            length = self._section.freeze_steps
            self._frozen_until = step + length if length else -1

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions and plans depend on."""
        return {
            "factor": self._factor,
            "frozen_until": self._frozen_until,
            "best": self._best,
            "rewards": self._rewards,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""
        self._factor, self._frozen_until = state["factor"], state["frozen_until"]
        self._best, self._rewards = state["best"], list(state["rewards"])
        self._in_a_row = dict(state["in_a_row"])
