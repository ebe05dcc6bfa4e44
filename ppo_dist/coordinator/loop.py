"""The loop: one pass is one step, one metrics row, one policy version.

    plan ─▶ prompts ─▶ rollouts ─▶ scores ─▶ annotations ─▶ sequences ─▶ updates ─▶ next version
    schedule  stream     pool       reward     learners      + labelled    learners

A version is published when somebody is about to generate with it: supervised steps move no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppo_dist.config import Config
from ppo_dist.config.algorithm import KlInLoss
from ppo_dist.coordinator.evaluate import Evaluator
from ppo_dist.coordinator.experience import Experience, updates
from ppo_dist.coordinator.state import Checkpoints, RunState
from ppo_dist.coordinator.stream import Stream
from ppo_dist.coordinator.watch import Watch
from ppo_dist.data.chunks import chunks
from ppo_dist.protocols import (
    LearnerGroup,
    MixSchedule,
    RewardSource,
    RolloutPool,
    Tracker,
)
from ppo_dist.reports import Coefficients
from ppo_dist.semi.schedule import value_at
from ppo_dist.tracking.metrics import Row, Stopwatch, keys, step_row, timings
from ppo_dist.types import MixPlan, Rollout, Sampling, Scored


@dataclass(frozen=True)
class Parts:
    """All that the loop drives, behind the protocols."""

    schedule: MixSchedule
    stream: Stream
    pool: RolloutPool
    learners: LearnerGroup
    reward: RewardSource
    experience: Experience
    tracker: Tracker
    evaluator: Evaluator | None


class Loop:
    """Runs the steps of a config, from a fresh state or a resumed one."""

    def __init__(self, config: Config, parts: Parts, state: RunState = RunState()) -> None:  # noqa: B008 (frozen)
        self._config, self._parts, self.state = config, parts, state
        self._folder = Path(config.run.dir)
        self._checkpoints = Checkpoints(self._folder, config.train.keep_checkpoints)
        self._keys = keys(config)
        self.watch = Watch(config, parts.tracker)
        self._loaded_version: int | None = None
        self._saved_step = state.step

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Runs to the last step. False if it was asked to stop before, or the watch had to stop it;
        either way a checkpoint holds the state.
        """
        if self.state.step == 0 and self._parts.evaluator is not None:
            self._log(0, self._evaluate(Stopwatch()))
        while self.state.step < self._config.train.steps and not should_stop():
            self._pass()
            if self.watch.verdict is not None:
                break
        if self._saved_step != self.state.step:
            self.save()
        if self.state.step < self._config.train.steps or self.watch.verdict is not None:
            return False
        self._parts.learners.save(policy=self._folder / "policy")
        return True

    def _pass(self) -> None:
        """One step, and what is due after it."""
        watch = Stopwatch()
        with watch("step"):
            row = self._step(watch)
            self.state = replace(
                self.state,
                step=self.state.step + 1,
                version=self.state.version + 1,
                reinforced=self.state.reinforced + bool(row["rollout/tokens"]),
            )
        self._parts.schedule.observe(self.state.step - 1, row)
        if self._is_due(self._config.eval.every) and self._parts.evaluator is not None:
            row |= self._evaluate(watch)
        if self._is_due(self._config.train.checkpoint_every):
            with watch("save"):
                self.save()
        self._log(self.state.step, row | timings(watch.seconds, row))

    def _step(self, watch: Stopwatch) -> Row:
        config, parts, step = self._config, self._parts, self.state.step
        plan = parts.schedule.plan(step)
        coefficients = self._coefficients(plan)
        rollouts = self._generate(plan, watch)
        with watch("score"):
            scored = [
                Scored(r, s) for r, s in zip(rollouts, parts.reward.score(rollouts), strict=True)
            ]
        with watch("annotate"):
            annotations = parts.learners.annotate(scored) if scored else []
        sequences = parts.experience(scored, annotations, coefficients.policy > 0)
        work = updates(
            sequences, lambda: parts.stream.examples(plan), config.algorithm, config.run.seed, step
        )
        with watch("update"):
            report = parts.learners.update(work, coefficients)
        parts.tracker.table(step + 1, [sample(s) for s in scored[: config.tracking.samples]])
        row = step_row(
            plan, coefficients, self.state.version, scored, annotations, sequences, report
        )
        self.watch.updates(step + 1, work, coefficients, report)
        self.watch.row(step + 1, row)
        return row | parts.experience.metrics

    def _coefficients(self, plan: MixPlan) -> Coefficients:
        learner, algorithm, step = self._config.learner, self._config.algorithm, self.state.step
        warm = not algorithm.has_critic or self.state.reinforced >= self._config.critic.warmup
        in_loss = isinstance(algorithm.kl, KlInLoss)
        return Coefficients(
            policy=plan.policy_coef if warm else 0.0,
            value=algorithm.value_coef,
            mu=plan.mu,
            kl=self._parts.experience.kl_coef if in_loss else 0.0,
            entropy=algorithm.entropy_coef,
            lr=value_at(learner.lr, step),
            critic_lr=value_at(learner.critic_lr, step),
        )

    def _generate(self, plan: MixPlan, watch: Stopwatch) -> Sequence[Rollout]:
        if not plan.total_prompts:
            return []
        self._load(watch)
        rollout, step = self._config.rollout, self.state.step
        sampling = Sampling(
            rollout.temperature, rollout.max_new_tokens, self._config.run.seed, "train"
        )
        prompts = self._parts.stream.prompts(plan)
        with watch("generate"):
            self._parts.pool.submit(
                chunks(
                    prompts, rollout.group_size, rollout.chunk, step, self.state.version, sampling
                )
            )
            return self._parts.pool.collect()

    def _load(self, watch: Stopwatch) -> None:
        """Brings the current version to the rollout workers, if they do not have it."""
        if self._loaded_version != self.state.version:
            with watch("publish"):
                self._parts.pool.load(self._parts.learners.publish(self.state.version))
            self._loaded_version = self.state.version

    def _evaluate(self, watch: Stopwatch) -> Row:
        """Evaluates the current version and keeps the policy if it is the best so far."""
        assert self._parts.evaluator is not None, "callers check"
        self._load(watch)
        with watch("evaluate"):
            row, greedy = self._parts.evaluator(self.state.version)
        self._parts.tracker.table(
            self.state.step, [sample(s) for s in greedy[: self._config.tracking.samples]]
        )
        accuracy = row["eval/held_out/accuracy"]
        if accuracy is not None and (self.state.best is None or accuracy > self.state.best):
            self.state = replace(self.state, best=accuracy, best_step=self.state.step)
            self._parts.learners.save(policy=self._folder / "policy-best")
        return row

    def _is_due(self, every: int) -> bool:
        at_end = self.state.step == self._config.train.steps
        return at_end or (every > 0 and self.state.step % every == 0)

    def _log(self, step: int, row: Row) -> None:
        self._parts.tracker.log(step, {key: row.get(key) for key in self._keys})

    def save(self) -> Path:
        """Writes a checkpoint of everything that later steps depend on."""
        parts = {
            "schedule": self._parts.schedule.state_dict(),
            "stream": self._parts.stream.state_dict(),
            "experience": self._parts.experience.state_dict(),
        }
        self._saved_step = self.state.step
        return self._checkpoints.write(
            self.state, parts, lambda folder: self._parts.learners.save(checkpoint=folder)
        )


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
        "finish": rollout.finish,
        "version": rollout.version,
    }
