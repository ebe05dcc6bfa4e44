"""A run that goes on from its last checkpoint when its learners are lost or shall be more or fewer,
just as if it had been stopped and resumed there.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppo_dist import files
from ppo_dist.config import Config, InputError, RunError, WorkersLost
from ppo_dist.coordinator.loop import ACCURACY, BEST, REWARD, Loop, Memory, Outcome
from ppo_dist.coordinator.scale import Scale
from ppo_dist.coordinator.state import Checkpoints, RunState, read_state
from ppo_dist.journey import Encoded, Journey, remembered
from ppo_dist.protocols import Tracker
from ppo_dist.tracking.local import read_rows, record_event


class LostTooOften(RunError):
    """Learners were lost too often without a newer checkpoint in between, or have no room now."""


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on: the learners' checkpoint, if any, and what the coordinator
    remembers with it.

    Example: Start(checkpoint=Path("runs/mine/checkpoints/step-00000010"), state=RunState(step=10,
    …), saved={"schedule": {…}, …})
    """

    checkpoint: Path | None = None
    state: RunState = field(default_factory=RunState)
    saved: dict[str, Any] = field(default_factory=dict)

    def recall(self, memory: Memory) -> None:
        """Fills a memory with what the coordinator remembered here.

        Raises:
            InputError: that does not go with the run's config and data.
        """
        if self.checkpoint is None:
            return
        try:
            memory.load_state_dict(self.saved)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.checkpoint}: does not go with this config and this data: {error}"
            ) from None


@dataclass(frozen=True)
class Recovery:
    """A run that outlives its learners. `open_tracker` keeps rows up to a start's step alone."""

    config: Config
    model_path: str
    encoded: Encoded
    open_tracker: Callable[[Start], Tracker]

    def run(self, start: Start, interrupted: Callable[[], bool]) -> tuple[Outcome, Loop]:
        """To the last step or a stop. Where the number of learners is to change at a checkpoint,
        the run goes on from there with others, or with those of before if there is no room or the
        others come to no checkpoint.

        Raises:
            InputError: a start does not go with this config and this data, or the cluster does not.
            RunError: learners were lost too often without a newer checkpoint in between, since the
                disk is full, or cannot be started anew; or other workers failed for good.
            KeyboardInterrupt: it was interrupted while it had no workers.
        """
        config, before = self.config, None
        while True:
            try:
                outcome, loop = self._lasting(config, start, interrupted)
            except (InputError, LostTooOften) as error:
                newest = self._newest(start)
                if before is None or newest is not start:
                    raise
                self._refuse(config, str(error))
                config, before = before, None
            else:
                if outcome != "rescale":
                    return outcome, loop
                before, config = config, self._rescaled(config, loop.state.step)
            start = self._newest(start)
            self._heed(interrupted, start)

    def _lasting(
        self, config: Config, start: Start, interrupted: Callable[[], bool]
    ) -> tuple[Outcome, Loop]:
        cluster, lost, lost_at = config.cluster, 0, None
        while True:
            gc.collect()  # parts of before know each other, and with them connections to the dead
            try:
                return self._journey(config, start, lost_at, interrupted)
            except WorkersLost as error:
                if files.disk_fault(error) is not None:
                    raise  # they would fail again
                lost_at, before = time.monotonic(), start
                start = self._newest(before)
                lost = lost + 1 if start is before else 1
                if lost > cluster.restarts:
                    raise LostTooOften(
                        f"{error} ({lost} times lost without a newer checkpoint in between)"
                    ) from error
                over = lost_at + cluster.backoff_s * 2 ** (lost - 1)
                while time.monotonic() < over and not interrupted():
                    time.sleep(0.1)
                self._heed(interrupted, start)
            except InputError as error:
                if lost_at is None:
                    raise
                raise LostTooOften(f"after learners were lost: {error}") from error

    def _heed(self, interrupted: Callable[[], bool], start: Start) -> None:
        """Ends here if it is told to: models take long to load, and there is nothing to save."""
        if interrupted():
            record_event(Path(self.config.run.dir), "interrupted", step=start.state.step)
            raise KeyboardInterrupt

    def _journey(
        self, config: Config, start: Start, lost_at: float | None, interrupted: Callable[[], bool]
    ) -> tuple[Outcome, Loop]:
        memory = self._memory(start)
        with contextlib.closing(self.open_tracker(start)) as tracker:
            journey = Journey(config, self.model_path, self.encoded, memory, tracker, lost_at)
            return journey.run(start.checkpoint, start.state, interrupted)

    def _rescaled(self, config: Config, step: int) -> Config:
        """A config with as many learners as the run is asked for."""
        folder, learner = Path(config.run.dir), config.learner
        workers = Scale.of(folder).learners or learner.workers
        record_event(
            folder, "rescaled", step=step, learners={"before": learner.workers, "now": workers}
        )
        changed = learner.model_copy(update={"workers": workers})
        return config.model_copy(update={"learner": changed})

    def _refuse(self, config: Config, reason: str) -> None:
        folder = Path(config.run.dir)
        record_event(folder, "rescale_refused", learners=config.learner.workers, reason=reason)
        replace(Scale.of(folder), learners=None).ask(folder)

    def _memory(self, start: Start) -> Memory:
        memory = remembered(self.config, self.encoded)
        start.recall(memory)
        return memory

    def _newest(self, start: Start) -> Start:
        """The newest whole checkpoint since a start, or that start. What is of later steps is set
        aside.
        """
        folder, keep = Path(self.config.run.dir), self.config.train.keep_checkpoints
        newest, _ = Checkpoints(folder, keep).newest_whole()
        if newest is not None:
            state, saved = read_state(newest, is_whole=True)
            if state.step > start.state.step:
                start = Start(newest, state, saved)
        set_aside_after(start.state.step, folder, keep)
        return start


def set_aside_after(step: int, folder: Path, keep: int) -> list[str]:
    """Renames the checkpoints of later steps, and the best policy if it is of one: the metrics
    still have its evaluation. Returns the new names.
    """
    moved = Checkpoints(folder, keep).set_aside_after(step)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row.get(ACCURACY) is not None]
    best = max(rows, key=lambda row: (row[ACCURACY], row[REWARD]), default=None)
    policy = folder / BEST
    if best is not None and best["step"] > step and policy.exists():
        files.replace(policy, folder / f"abandoned-{BEST}")
        moved.append(f"abandoned-{BEST}")
    return moved
