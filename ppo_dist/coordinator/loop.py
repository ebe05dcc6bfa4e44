"""The loop: one pass is one step, one metrics row, one policy version.

    plan ─▶ prompts ─▶ rollouts ─▶ scores ─▶ annotations ─▶ sequences ─▶ updates ─▶ next version
    schedule  stream     pool       reward     learners      + labelled    learners

A version is published when somebody is about to generate with it: supervised steps move no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ppo_dist.config import Config, RunError, remote_rewards
from ppo_dist.config.algorithm import KlInLoss
from ppo_dist.coordinator.ahead import Ahead
from ppo_dist.coordinator.evaluate import Evaluator
from ppo_dist.coordinator.experience import Experience, supervised, updates
from ppo_dist.coordinator.judge import judged, sample
from ppo_dist.coordinator.scale import Scale
from ppo_dist.coordinator.state import Checkpoints, RunState
from ppo_dist.coordinator.stream import Stream
from ppo_dist.coordinator.unlabelled import Unlabelled
from ppo_dist.coordinator.watch import Watch
from ppo_dist.data.chunks import chunks
from ppo_dist.protocols import LearnerGroup, MixSchedule, Rewards, RolloutPool, Tracker
from ppo_dist.reports import Coefficients, Vitals
from ppo_dist.semi.guard import Guard
from ppo_dist.semi.schedule import value_at
from ppo_dist.tracking.metrics import WORKERS, Row, Stopwatch, keys, step_row, timings, took
from ppo_dist.types import MixPlan, Rollout, Sampling, TrainSequence

PUBLISH_ATTEMPTS = 3
BEST = "policy-best"  # in a run folder
ACCURACY, REWARD = "eval/held_out/accuracy", "eval/held_out/reward"  # in a row: what best is
Outcome = Literal["done", "interrupted", "stopped", "roll_back", "rescale"]


@dataclass(frozen=True)
class Memory:
    """What the coordinator remembers beside the run state, part by part."""

    schedule: MixSchedule
    stream: Stream
    ahead: Ahead
    experience: Experience
    unlabelled: Unlabelled
    guard: Guard

    def state_dict(self) -> dict[str, Any]:
        """Of all parts, by name."""
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any], names: Sequence[str] | None = None) -> None:
        """Goes on from a saved state, in all parts or in those named."""
        for name in names or vars(self):
            vars(self)[name].load_state_dict(state[name])


@dataclass(frozen=True)
class Parts:
    """All that the loop drives, behind the protocols."""

    pool: RolloutPool
    learners: LearnerGroup
    reward: Rewards
    tracker: Tracker
    held_out: Evaluator | None
    test: Evaluator | None


class Loop:
    """Runs the steps of a config, from a fresh state or a resumed one."""

    def __init__(
        self,
        config: Config,
        memory: Memory,
        parts: Parts,
        state: RunState = RunState(),  # noqa: B008 (frozen)
        pending: Row | None = None,
    ) -> None:
        """`pending` is the row of a step after which the run went back to an earlier policy."""
        self._config, self._memory, self._parts, self.state = config, memory, parts, state
        self._folder = Path(config.run.dir)
        self._checkpoints = Checkpoints(self._folder, config.train.keep_checkpoints)
        self._keys = dict.fromkeys(keys(config))  # in order; thousands, with many workers
        self.watch = Watch(config, parts.tracker, memory.guard)
        self._goes_back = config.semi.guard.rolls_back
        self.pending = pending
        memory.ahead.begin(parts.pool)
        self._loaded_version: int | None = None
        self._saved_step = state.step
        self._saving = Stopwatch()

    def run(self, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Runs to the last step, or until it is asked to stop, the watch has to stop it, or it must
        go on from an earlier policy. In all cases but the last a checkpoint holds the state.
        """
        if self.state == RunState() or self.pending is not None:
            self._begin()
        while self.state.step < self._config.train.steps and not should_stop():
            scale = Scale.of(self._folder)
            if scale.rollout_workers is not None:
                self._parts.pool.resize(scale.rollout_workers)
            if self._saved_step == self.state.step and scale.changes_learners(self._config):
                return "rescale"
            self._pass()
            if self.watch.rolls_back:
                return "roll_back"
            if self.watch.verdict is not None:
                break
        if self._saved_step != self.state.step:
            self.save()
        if self.watch.verdict is not None:
            return "stopped"
        if self.state.step < self._config.train.steps:
            return "interrupted"
        self._parts.learners.save(policy=self._folder / "policy")
        return "done"

    def _begin(self) -> None:
        """Evaluates the policy that the run starts with, or went back to."""
        row = self._evaluate(Stopwatch())
        if self.pending is not None:
            self._log(self.state.step, self.pending | row)
            self.save()
        elif row:
            self._memory.schedule.observe(-1, row)
            self.watch.row(0, row)
            self._log(0, row)
            if self._goes_back:
                self.save()
        self.pending = None

    def _pass(self) -> None:
        """One step, and what is due after it."""
        watch, pool = self._saving, self._parts.pool
        self._saving = Stopwatch()  # what comes after this step's row counts in the next one's
        with watch("step"):
            row, learners = self._step(watch)
            self.state = replace(
                self.state,
                step=self.state.step + 1,
                version=self.state.version + 1,
                reinforced=self.state.reinforced + bool(row["rollout/tokens"]),
            )
        vitals = {
            "rollout": pool.vitals(),
            "learner": dict(enumerate(learners)),
            "reward": self._parts.reward.vitals(),
        }
        row |= took(vitals)
        if self._is_due(self._config.eval.every):
            row |= self._evaluate(watch)
        self._memory.schedule.observe(self.state.step - 1, row)
        self.watch.row(self.state.step, row)
        row |= self._memory.guard.metrics
        is_best = self._goes_back and self.state.best_step == self.state.step
        if self.watch.rolls_back:
            if is_best:
                self.save()  # this is where it goes back to
            self.pending = row | timings(watch.seconds, row, vitals)
            return
        # before the checkpoint, which would else be gone on from without the row if this is killed
        self._log(self.state.step, row | timings(watch.seconds, row, vitals))
        if is_best or self._is_due(self._config.train.checkpoint_every):
            with self._saving("save"):
                self.save()

    def _step(self, watch: Stopwatch) -> tuple[Row, tuple[Vitals, ...]]:
        """The step's metrics, and the learners' vitals."""
        config, memory, parts, step = self._config, self._memory, self._parts, self.state.step
        plan = memory.guard.adjusted(memory.schedule.plan(step), step)
        coefficients = self._coefficients(plan)
        rollouts = self._generate(plan, watch)
        with watch("score"):
            scored, dropped = judged(parts.reward, rollouts)
            admitted = memory.unlabelled.admit(step, scored)
        kept = [s.rollout for s in admitted]
        with watch("annotate"):
            annotations = parts.learners.annotate(kept) if kept else []
        sequences = memory.experience(admitted, annotations, coefficients.policy > 0)
        work = updates(
            sequences, lambda: self._supervised(plan), config.algorithm, config.run.seed, step
        )
        with watch("update"):
            report = parts.learners.update(work, coefficients)
        parts.tracker.table(step + 1, [sample(s) for s in scored[: config.tracking.samples]])
        self.watch.faults(step + 1, scored)
        annotated = list(zip(kept, annotations, strict=True))
        row = step_row(plan, coefficients, self.state.version, scored, annotated, sequences, report)
        row["rollout/dropped"] = float(memory.ahead.dropped)
        if rollouts and remote_rewards(config):
            row["reward/dropped"] = float(len(dropped))
        self.watch.dropped(step + 1, dropped)
        skipped = self.watch.updates(step + 1, work, coefficients, report, self.state.skipped)
        self.state = replace(self.state, skipped=skipped)
        return row | memory.experience.metrics | memory.unlabelled.metrics, report.vitals

    def _supervised(self, plan: MixPlan) -> list[TrainSequence]:
        """Labelled examples and pseudo-labels of one update."""
        memory, step = self._memory, self.state.step
        sequences = [supervised(example) for example in memory.stream.examples(plan)]
        if plan.mu > 0 and not memory.guard.is_frozen(step):
            sequences += memory.unlabelled.supervised(step)
        return sequences

    def _coefficients(self, plan: MixPlan) -> Coefficients:
        learner, algorithm, step = self._config.learner, self._config.algorithm, self.state.step
        warm = not algorithm.has_critic or self.state.reinforced >= self._config.critic.warmup
        in_loss = isinstance(algorithm.kl, KlInLoss)
        return Coefficients(
            policy=plan.policy_coef if warm else 0.0,
            value=value_at(algorithm.value_coef, step),
            mu=plan.mu,
            kl=self._memory.experience.kl_coef if in_loss else 0.0,
            entropy=value_at(algorithm.entropy_coef, step),
            lr=value_at(learner.lr, step),
            critic_lr=value_at(learner.critic_lr, step),
        )

    def _generate(self, now: MixPlan, watch: Stopwatch) -> Sequence[Rollout]:
        """The step's rollouts; has those of later steps begun first, as far as the lag allows."""
        memory, rollout, state = self._memory, self._config.rollout, self.state
        sampling = Sampling(
            rollout.temperature, rollout.max_new_tokens, self._config.run.seed, "train"
        )
        has_begun = state.reinforced > 0 or any(now.prompts.values())
        for coming in memory.ahead.unasked(state.step, has_begun):
            plan = memory.guard.adjusted(memory.schedule.plan(coming), coming)
            prompts = memory.stream.prompts(plan)
            if prompts:
                self._load(watch)
            work = chunks(
                prompts, rollout.group_size, rollout.chunk, coming, state.version, sampling
            )
            memory.ahead.ask(coming, work)
        with watch("generate"):
            frozen = memory.guard.is_frozen(state.step)
            return memory.ahead.take(state.step, state.version, frozen)

    def _load(self, watch: Stopwatch) -> None:
        """Brings the current version to the rollout workers, if they do not have it."""
        if self._loaded_version != self.state.version:
            with watch("publish"):
                for _ in range(PUBLISH_ATTEMPTS):
                    if self._parts.pool.load(self._parts.learners.publish(self.state.version)):
                        break
                else:
                    raise RunError(f"no rollout worker takes version {self.state.version}")
            self._loaded_version = self.state.version

    def _evaluate(self, watch: Stopwatch) -> Row:
        """Evaluates the current version and keeps the policy if it is the best so far."""
        row: Row = {}
        if self._parts.held_out is not None:
            row |= self._evaluated(self._parts.held_out, watch)
            accuracy, reward = row[ACCURACY], row[REWARD]
            if self.state.is_beaten_by(accuracy, reward):
                self.state = self.state.with_best(accuracy, reward)
                self._parts.learners.save(policy=self._folder / BEST)
        if self._parts.test is not None and self.state.step == self._config.train.steps:
            row |= self._evaluated(self._parts.test, watch)
        return row

    def _evaluated(self, evaluator: Evaluator, watch: Stopwatch) -> Row:
        self._load(watch)
        with watch("evaluate"):
            row, greedy, dropped = evaluator(self.state.version)
        self._parts.pool.vitals()  # what an evaluation took is not the next step's
        self._parts.reward.vitals()
        self.watch.dropped(self.state.step, dropped)
        self.watch.faults(self.state.step, greedy)
        samples = [sample(s) for s in greedy[: self._config.tracking.samples]]
        self._parts.tracker.table(self.state.step, samples)
        return row

    def _is_due(self, every: int) -> bool:
        at_end = self.state.step == self._config.train.steps
        return at_end or (every > 0 and self.state.step % every == 0)

    def _log(self, step: int, row: Row) -> None:
        # a run whose workers became more tells of them all
        more = [key for key in row if key.startswith(WORKERS) and key not in self._keys]
        self._parts.tracker.log(step, {key: row.get(key) for key in (*self._keys, *more)})

    def save(self) -> Path:
        """Writes a checkpoint of everything that later steps depend on."""
        self._saved_step = self.state.step
        return self._checkpoints.write(
            self.state,
            self._memory.state_dict(),
            lambda folder: self._parts.learners.save(checkpoint=folder),
        )
