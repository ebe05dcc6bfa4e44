"""A training run from config to finished folder: what `ppo-dist train` does."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ppo_dist import build, files
from ppo_dist.config import Config, InputError, RunError
from ppo_dist.config.load import dump, read_yaml
from ppo_dist.coordinator.loop import ACCURACY, Loop, Outcome
from ppo_dist.coordinator.scale import SCALE
from ppo_dist.coordinator.state import CHECKPOINTS, Checkpoints, RunState, read_state
from ppo_dist.journey import encode
from ppo_dist.learner import shards
from ppo_dist.lock import only_run
from ppo_dist.protocols import Tracker
from ppo_dist.recovery import Recovery, Start, set_aside_after
from ppo_dist.tracking.console import Losable, Several, Terminal, summary
from ppo_dist.tracking.local import JsonLines, read_rows, record_event

CONFIG, SUMMARY = "config.yaml", "summary.json"
# a run can be resumed with other values of every key but these
FIXED = (
    "model",
    "data",
    "run.seed",
    "learner.dtype",
    "learner.optimizer",
    "algorithm.advantage.kind",
    "critic.shared",
    "reference",
    "semi.gate",
    "semi.probe",
)


def train(config: Config, resume: bool | Path, console: Console) -> int:
    """Trains to the last step, or until it is interrupted. Returns the exit code: 0,
    3 (it had to stop) or 130 (it was told to).

    Raises:
        InputError: config, data, run folder or cluster do not allow it, or another run has the
            folder.
        RunError: workers or the disk failed for good.
    """
    folder = Path(config.run.dir)
    if _complete(folder, config):
        console.print(
            f"{folder} is complete: {config.train.steps} steps. "
            "Raise train.steps with --resume to go on."
        )
        return 0
    rows = build.check(config)
    build.check_servers(config)
    with _disk_faults(folder), only_run(folder):
        return _train(config, rows, resume, console)


def _train(config: Config, rows: build.Rows, resume: bool | Path, console: Console) -> int:
    folder = Path(config.run.dir)
    for parent in (folder, folder / CHECKPOINTS):
        files.tidy(parent)
    (folder / SCALE).unlink(missing_ok=True)  # an earlier process was asked for it
    start = _starting_point(config, folder, resume, console)
    given, config = config, build.located(config)
    model_path = build.model_folder(config, rows, is_new=start.checkpoint is None)
    encoded = encode(config, rows, model_path)
    files.write_text(folder / CONFIG, dump(given))
    for what, count in encoded.counts.items():
        console.print(f"{count} prompts longer than data.max_prompt_tokens were {what}")
    if start.checkpoint is not None:
        before = shards.ranks(start.checkpoint / "policy")
        learners = {"before": before, "now": config.learner.workers}
        record_event(folder, "resumed", step=start.state.step, learners=learners)

    def tracker(at: Start) -> Tracker:
        return _tracker(config, folder, at, console)

    try:
        with build.cluster(config) as settled, _interrupts() as interrupted:
            recovery = Recovery(settled, model_path, encoded, tracker)
            outcome, loop = recovery.run(start, interrupted)
    except RunError as error:
        record_event(folder, "failed", reason=str(error))
        raise
    return _ended(folder, outcome, loop, console)


@contextlib.contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """Turns whatever comes of a disk that takes nothing more into one clear error."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = files.disk_fault(error, folder)
        if reason is None:
            raise
        free = shutil.disk_usage(folder).free / 1e6
        needed = Checkpoints(folder, 1).newest_mb()
        more = "" if needed is None else f", a checkpoint takes {needed:.1f}"
        problem = RunError(
            f"{folder}: cannot be written: {reason} ({free:.1f} MB are free on its disk{more})"
        )
        with contextlib.suppress(OSError):  # there may be room for a line, or not
            record_event(folder, "failed", reason=str(problem))
        raise problem from error


def _ended(folder: Path, outcome: Outcome, loop: Loop, console: Console) -> int:
    """Records and tells how a run ended. Returns the exit code."""
    step = loop.state.step
    if outcome == "stopped":
        record_event(folder, "stopped", step=step, reason=loop.watch.verdict)
        console.print(f"stopped after step {step}: {loop.watch.verdict}")
        return 3
    if outcome == "interrupted":
        record_event(folder, "interrupted", step=step)
        console.print(f"stopped after step {step}; `--resume` goes on from there")
        return 130
    _finish(folder, loop.state, console)
    return 0


def is_started(folder: Path) -> bool:
    """Whether a folder holds a run, complete or not."""
    return (folder / CONFIG).exists()


def _complete(folder: Path, config: Config) -> bool:
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        return bool(summary["steps"] >= config.train.steps)
    except (OSError, ValueError, LookupError, TypeError):  # none, or none that is whole
        return False


def _starting_point(config: Config, folder: Path, resume: bool | Path, console: Console) -> Start:
    """Where to go on from: the checkpoint, if any, and what it says."""
    if not resume:
        if is_started(folder):
            raise InputError(
                f"{folder} holds a run that is not complete: add --resume to go on, "
                "or choose another run.dir"
            )
        return Start()
    if isinstance(resume, Path):
        chosen: Path | None = resume.resolve()
    else:
        checkpoints = Checkpoints(folder.resolve(), config.train.keep_checkpoints)
        chosen, problems = checkpoints.newest_whole()
        for problem in problems:
            console.print(f"skipped a checkpoint: {problem}")
        if chosen is None and problems:
            raise InputError(f"{folder}: no checkpoint is whole")
    if chosen is None:
        console.print("no checkpoint yet: starting at step 0")
        return Start()
    if is_started(folder):
        _compare(read_yaml(folder / CONFIG), config)
    state, parts = read_state(chosen, is_whole=not isinstance(resume, Path))
    if config.semi.guard.rolls_back and state.best_step is not None:
        Checkpoints(folder, config.train.keep_checkpoints).of_best(state)
    learners = shards.ranks(chosen / "policy")
    console.print(f"resuming from {chosen}, written by {learners} learner(s)")
    for name in set_aside_after(state.step, folder, config.train.keep_checkpoints):
        console.print(f"set aside: {name}")
    return Start(chosen, state, parts)


def _compare(before: dict[str, Any], config: Config) -> None:
    now = yaml.safe_load(dump(config))
    for key in FIXED:
        old: Any = before
        new = now
        for part in key.split("."):
            old = old.get(part, {}) if isinstance(old, dict) else {}
            new = new[part]
        if old != new:
            raise InputError(
                f"{key} differs from the run's own (config.yaml in the run folder), "
                "so it cannot be resumed with it"
            )


def _tracker(config: Config, folder: Path, start: Start, console: Console) -> Tracker:
    step, resumed = start.state.step, start.checkpoint is not None
    trackers: list[Tracker] = [JsonLines(folder, step if resumed else None)]
    if config.tracking.progress:
        trackers.append(Terminal(console, config.train.steps, step))
    if config.tracking.wandb != "off":
        from ppo_dist.tracking.wandb import Wandb, has_key

        if config.tracking.wandb == "online" and not has_key():
            raise InputError(
                "tracking.wandb online: there is no key: set WANDB_API_KEY, run `wandb login`, or "
                "choose offline"
            )

        def lost(error: Exception) -> None:
            record_event(folder, "wandb_lost", reason=repr(error))
            text = f"the run goes on without it: {error}"
            Several(trackers).alert(step, "W&B is lost", text)

        trackers.append(Losable(lambda: Wandb(config, folder, resumed), lost))
    return Several(trackers)


def _finish(folder: Path, state: RunState, console: Console) -> None:
    rows = read_rows(folder / "metrics.jsonl")
    evaluations = [
        {key: value for key, value in row.items() if key == "step" or key.startswith("eval/")}
        for row in rows
        if row.get(ACCURACY) is not None
    ]
    written = {
        "steps": state.step,
        "best_step": state.best_step,
        "best_accuracy": state.best,
        "evaluations": evaluations,
    }
    files.write_text(folder / SUMMARY, json.dumps(written, indent=1))
    console.print(summary(rows))
    console.print(f"policy: {folder}/policy", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[Any]:
    """A function that tells whether SIGINT or SIGTERM came; a second one ends the process."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def note(number: int, frame: Any) -> None:
        came.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
