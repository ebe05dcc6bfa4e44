"""Safety: what was skipped is kept for inspection, the guard is asked, and a run that cannot go on
stops.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ppo_dist.config import Config, InputError
from ppo_dist.protocols import Tracker
from ppo_dist.reports import Coefficients, StepReport
from ppo_dist.semi.guard import Guard
from ppo_dist.tracking.metrics import Row
from ppo_dist.types import Dropped, Scored, TrainSequence

SKIPPED = "skipped"


class Watch:
    """Looks at every step. `verdict` says why the run must stop, once it must."""

    def __init__(self, config: Config, tracker: Tracker, guard: Guard) -> None:
        self._folder, self._tracker, self._guard = Path(config.run.dir), tracker, guard
        self._limit = config.train.max_skipped_updates
        self._gap_limit = config.rollout.max_logprob_gap
        self.verdict: str | None = None
        self._went_wrong = False

    @property
    def rolls_back(self) -> bool:
        """Whether the run must go on from its best policy; not one that must stop."""
        return self._went_wrong and self.verdict is None

    def updates(
        self,
        step: int,
        updates: Sequence[Sequence[TrainSequence]],
        coefficients: Coefficients,
        report: StepReport,
        in_a_row: int,
    ) -> int:
        """Writes the sequences of every skipped update; stops the run after too many in a row.
        Takes and returns how many of the last ones were skipped.
        """
        for number, (sequences, update) in enumerate(zip(updates, report.updates, strict=True)):
            if not update.skipped:
                in_a_row = 0
                continue
            in_a_row += 1
            if in_a_row >= self._limit:
                self.verdict = f"{in_a_row} updates in a row were not finite"
            path = self._folder / SKIPPED / f"step-{step:08d}-update-{number}.npz"
            write_update(path, sequences, coefficients)
            self._tracker.alert(
                step,
                f"a gradient was not finite: update {number + 1} of step {step} was skipped",
                f"look at it with: ppo-dist replay {path}",
            )
        return in_a_row

    def dropped(self, step: int, dropped: Sequence[Dropped]) -> None:
        """Tells of responses that have no score."""
        if dropped:
            title = "responses without a reward were dropped"
            self._tracker.alert(step, title, f"{len(dropped)}: {dropped[0].reason}")

    def faults(self, step: int, scored: Sequence[Scored]) -> None:
        """Tells of responses that count as 0 since whatever judges them failed."""
        failed = [s for s in scored if s.score.fault is not None]
        if failed:
            first = failed[0]
            self._tracker.alert(
                step,
                f"{len(failed)} of {len(scored)} responses could not be judged and count as 0",
                f"the first: reward {first.score.source}, {first.rollout.prompt.uid}: "
                f"{first.score.fault} (reward.on_error)",
            )

    def row(self, step: int, row: Row) -> None:
        """Compares what generated with what learns, where both are of one version, and asks the
        guard.
        """
        gap, lag = row.get("rollout/logprob_gap"), row.get("rollout/version_lag")
        if gap is not None and not lag and not gap <= self._gap_limit:
            self._tracker.alert(
                step,
                f"rollout workers and learners disagree: log-probabilities differ by {gap:.3g}",
                f"above rollout.max_logprob_gap ({self._gap_limit:g}) ratios are noise: the workers"
                " may hold other weights, or compute in another number format",
            )
        for decision in self._guard.observe(step, row):
            self._tracker.alert(step, f"guard: {decision.action}", decision.reason)
            self._went_wrong |= decision.action == "roll_back"
            if decision.action == "stop":
                self.verdict = decision.reason


def write_update(
    path: Path, sequences: Sequence[TrainSequence], coefficients: Coefficients
) -> None:
    """An update as one .npz file, without pickles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        f"{i}/{name}": np.asarray(value)
        for i, sequence in enumerate(sequences)
        for name, value in vars(sequence).items()
    }
    columns["coefficients"] = np.array(list(vars(coefficients).values()), np.float64)
    np.savez_compressed(path, **columns)  # type: ignore[arg-type]


def read_update(path: Path) -> tuple[list[TrainSequence], Coefficients]:
    """What `write_update` wrote.

    Raises:
        InputError: the file is not one of those.
    """
    try:
        with np.load(path, allow_pickle=False) as columns:
            coefficients = Coefficients(*columns["coefficients"].tolist())
            count = len({name.split("/")[0] for name in columns.files if "/" in name})
            names = [field.name for field in fields(TrainSequence)]
            every = [{name: columns[f"{i}/{name}"] for name in names} for i in range(count)]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: is not a skipped update of a run ({error})") from None
    return [_sequence(columns) for columns in every], coefficients


def _sequence(columns: dict[str, Any]) -> TrainSequence:
    texts = {name: str(columns[name]) for name in ("uid", "origin", "source")}
    return TrainSequence(**(columns | texts | {"prompt_tokens": int(columns["prompt_tokens"])}))


def not_finite(sequence: TrainSequence) -> list[str]:
    """Names of the columns of a sequence that hold something infinite or undefined."""
    return [
        name
        for name, value in vars(sequence).items()
        if isinstance(value, np.ndarray) and not math.isfinite(float(np.sum(value)))
    ]
