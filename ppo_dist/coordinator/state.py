"""What the coordinator remembers between steps, and the checkpoints that hold it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ppo_dist import files
from ppo_dist.config.base import InputError

STATE = "state.json"
CHECKPOINTS = "checkpoints"  # in a run folder


@dataclass(frozen=True)
class RunState:
    """How far a run is; `reinforced` counts steps with rollouts, `skipped` the last updates in a
    row that were skipped, `best` is the best held-out accuracy so far, and `best_reward` the reward
    there, which decides where accuracies are equal.

    Example: RunState(step=12, version=12, reinforced=10, best=0.41, best_step=10)
    """

    step: int = 0
    version: int = 0
    reinforced: int = 0
    skipped: int = 0
    best: float | None = None
    best_reward: float | None = None
    best_step: int | None = None

    def is_beaten_by(self, accuracy: float | None, reward: float | None) -> bool:
        """Whether a held-out evaluation is better than the best so far; none is not."""
        if accuracy is None or reward is None:
            return False
        if self.best is None:
            return True
        before = math.inf if self.best_reward is None else self.best_reward
        return (accuracy, reward) > (self.best, before)

    def with_best(self, accuracy: float | None, reward: float | None) -> RunState:
        """With the evaluation of this step as the best."""
        return replace(self, best=accuracy, best_reward=reward, best_step=self.step)


class Checkpoints:
    """The checkpoints of a run folder: `checkpoints/step-00000010/`."""

    def __init__(self, run: Path, keep: int) -> None:
        self._folder = run / CHECKPOINTS
        self._keep = keep

    def write(self, state: RunState, parts: dict[str, Any], save: Callable[[Path], None]) -> Path:
        """Writes a checkpoint aside, seals it, then removes the oldest beyond those kept; never the
        one of the best evaluation. One that lost a part does not count as kept.
        """
        folder = self._folder / f"step-{state.step:08d}"
        with files.sealed(folder) as aside:
            save(aside)
            (aside / STATE).write_text(json.dumps({"run": asdict(state), "parts": parts}))
        kept = [f for f in self._all() if files.damage(f, is_quick=True) is None][-self._keep :]
        for old in self._all():
            if old < kept[0] and old != self.of_step(state.best_step):
                files.remove(old)
        return folder

    def set_aside_after(self, step: int) -> list[str]:
        """Renames the checkpoints of later steps, since a run that goes on from here makes others.
        Returns their new names.
        """
        later = [folder for folder in self._all() if folder.name > f"step-{step:08d}"]
        moved = []
        for folder in later:
            target = folder.with_name(f"abandoned-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            moved.append(folder.rename(target).name)
        return moved

    def of_step(self, step: int | None) -> Path | None:
        """The checkpoint that was written after a step, if there is one."""
        folder = self._folder / f"step-{step:08d}" if step is not None else None
        return folder if folder is not None and folder.exists() else None

    def of_best(self, state: RunState) -> Path:
        """The checkpoint of the best evaluation.

        Raises:
            InputError: there is none, as in a run that began without a guard that rolls back.
        """
        found = self.of_step(state.best_step)
        if found is None:
            raise InputError(
                f"{self._folder}: semi.guard would roll back to the best evaluation, that of step "
                f"{state.best_step}, which has no checkpoint (only a run that began with such a "
                "guard keeps it): choose another action, or another checkpoint to resume from"
            )
        return found

    def newest_mb(self) -> float | None:
        """Megabytes that the newest checkpoint takes, if there is one."""
        every = self._all()
        if not every:
            return None
        return sum(p.lstat().st_size for p in every[-1].rglob("*") if p.is_file()) / 1e6

    def newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, and what is wrong with those after it."""
        problems: list[str] = []
        for folder in reversed(self._all()):
            problem = files.damage(folder)
            if problem is None:
                return folder, problems
            problems.append(problem)
        return None, problems

    def _all(self) -> list[Path]:
        return sorted(p for p in self._folder.glob("step-*") if p.is_dir())


def read_state(checkpoint: Path, is_whole: bool = False) -> tuple[RunState, dict[str, Any]]:
    """The run's state and the parts' states of a checkpoint. All its files are read and compared
    with their checksums first, unless somebody has just done that: `is_whole`.

    Raises:
        InputError: the folder is not a whole checkpoint; names the part.
    """
    problem = None if is_whole else files.damage(checkpoint)
    if problem is not None:
        raise InputError(f"cannot resume from {checkpoint}: {problem}")
    try:
        content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        return _typed(RunState(**content["run"])), dict(content["parts"])
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise InputError(
            f"cannot resume from {checkpoint}: {STATE} is not of this version: {error}"
        ) from None


def _typed(state: RunState) -> RunState:
    for name, value in vars(state).items():
        if value is None and name.startswith("best"):
            continue
        kinds = (int, float) if name in ("best", "best_reward") else (int,)
        if type(value) not in kinds or (value < 0 and name != "best_reward"):
            raise TypeError(f"{name} is {value!r}")
    return state
