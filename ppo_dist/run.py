"""A training run from config to finished folder: what `ppo-dist train` does."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ppo_dist import build
from ppo_dist.config import Config, InputError, Origin
from ppo_dist.config.algorithm import Complement
from ppo_dist.config.load import dump
from ppo_dist.coordinator.evaluate import Evaluator
from ppo_dist.coordinator.experience import Experience
from ppo_dist.coordinator.loop import Loop, Memory, Outcome, Parts
from ppo_dist.coordinator.state import Checkpoints, RunState, read_state
from ppo_dist.coordinator.stream import Stream
from ppo_dist.coordinator.unlabelled import Probe, Unlabelled
from ppo_dist.data.encode import Encoder
from ppo_dist.protocols import Tracker
from ppo_dist.semi.guard import Guard
from ppo_dist.semi.pseudo import PseudoBuffer
from ppo_dist.semi.schedule import Scheduled
from ppo_dist.tracking.console import Several, Terminal, summary
from ppo_dist.tracking.local import JsonLines, read_rows, record_event
from ppo_dist.tracking.metrics import Row
from ppo_dist.types import LabelledExample, Prompt

SUMMARY = "summary.json"
# a run can be resumed with other values of every key but these
FIXED = (
    "model",
    "data",
    "run.seed",
    "learner.workers",
    "learner.zero_stage",
    "learner.dtype",
    "learner.optimizer",
    "algorithm.advantage.kind",
)


@dataclass(frozen=True)
class Encoded:
    """The data of a run as tokens.

    `probe` has the prompts, with answers, that stand without them among the unlabelled.

    Example: Encoded(prompts={"verifiable": [Prompt(…)]}, examples=[LabelledExample(…)],
    held_out=[LabelledExample(…)], test=[], probe={}, counts={})
    """

    prompts: dict[Origin, list[Prompt]]
    examples: list[LabelledExample]
    held_out: list[LabelledExample]
    test: list[LabelledExample]
    probe: dict[str, Prompt]
    counts: dict[str, int] = field(default_factory=dict)


def train(config: Config, resume: bool | Path, console: Console) -> int:
    """Trains to the last step, or until it is interrupted. Returns the exit code: 0,
    3 (it had to stop) or 130 (it was told to).

    Raises:
        InputError: config, data, run folder or cluster do not allow it.
    """
    folder = Path(config.run.dir)
    if _complete(folder, config):
        console.print(
            f"{folder} is complete: {config.train.steps} steps. "
            "Raise train.steps with --resume to go on."
        )
        return 0
    rows = build.check(config)
    checkpoint, state, saved = _starting_point(config, folder, resume, console)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    config = build.located(config)
    model_path = build.model_folder(config, rows)
    encoded = encode(config, rows, model_path)
    for what, count in encoded.counts.items():
        console.print(f"{count} prompts longer than data.max_prompt_tokens were {what}")
    memory = remembered(config, encoded)
    if checkpoint is not None:
        memory.load_state_dict(saved)
        record_event(folder, "resumed", step=state.step)
    tracker = _tracker(config, folder, state, checkpoint is not None, console)
    try:
        with build.cluster(config), _interrupts() as interrupted:
            journey = Journey(config, model_path, encoded, memory, tracker)
            outcome, loop = journey.run(checkpoint, state, interrupted)
    finally:
        tracker.close()
    return _ended(folder, outcome, loop, console)


@dataclass(frozen=True)
class Journey:
    """A run's loop on its workers, and after a roll back on new ones."""

    config: Config
    model_path: str
    encoded: Encoded
    memory: Memory
    tracker: Tracker

    def run(
        self, checkpoint: Path | None, state: RunState, interrupted: Callable[[], bool]
    ) -> tuple[Outcome, Loop]:
        """To the last step or a stop, starting with the learners of a checkpoint."""
        pending: Row | None = None
        while True:
            outcome, loop = self._once(checkpoint, state, pending, interrupted)
            if outcome != "roll_back":
                return outcome, loop
            checkpoint, state, pending = self._back(loop.state), loop.state, loop.pending

    def _once(
        self,
        checkpoint: Path | None,
        state: RunState,
        pending: Row | None,
        interrupted: Callable[[], bool],
    ) -> tuple[Outcome, Loop]:
        config, encoded = self.config, self.encoded
        with (
            build.learners(config, self.model_path, checkpoint) as learners,
            build.rollout_pool(config, self.model_path) as pool,
        ):
            reward = build.reward_source(config)
            evaluators = [
                Evaluator(config, name, examples, pool, reward, learners) if examples else None
                for name, examples in (("held_out", encoded.held_out), ("test", encoded.test))
            ]
            parts = Parts(pool, learners, reward, self.tracker, *evaluators)
            loop = Loop(config, self.memory, parts, state, pending)
            return loop.run(interrupted), loop

    def _back(self, state: RunState) -> Path:
        """The best evaluation's checkpoint; what was learned since is forgotten, while time and
        data go on.
        """
        folder = Path(self.config.run.dir)
        checkpoint = Checkpoints(folder, 1).of_step(state.best_step)
        assert checkpoint is not None, "the loop saves it where the guard may go back"
        self.memory.load_state_dict(read_state(checkpoint)[1], ["experience", "unlabelled"])
        self.memory.guard.rolled_back(state.step)
        record_event(folder, "rolled_back", step=state.step, to_step=state.best_step)
        return checkpoint


def remembered(config: Config, encoded: Encoded) -> Memory:
    """The coordinator's memory at the beginning of a run."""
    prompts, semi, seed = encoded.prompts, config.semi, config.run.seed
    by_uid = {p.uid: p for group in prompts.values() for p in group}
    probe = Probe(encoded.probe, build.reward_source(config)) if encoded.probe else None
    buffer = PseudoBuffer(semi.pseudo, by_uid, seed) if semi.pseudo is not None else None
    return Memory(
        schedule=Scheduled(config.mix),
        stream=Stream(prompts, encoded.examples, seed),
        experience=Experience(
            config.algorithm, build.advantage_estimator(config.algorithm.advantage)
        ),
        unlabelled=Unlabelled(build.gate(semi.gate), semi.pseudo, buffer, probe),
        guard=Guard(semi.guard, is_complement=isinstance(config.mix.policy_coef, Complement)),
    )


def encode(config: Config, rows: build.Rows, model_path: str) -> Encoded:
    """Tokens of all data.

    Raises:
        InputError: nothing is left of a data set, or a prompt is too long where that is an error.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model_path, trust_remote_code=config.model.trust_remote_code
    )
    encoder = Encoder(tokenizer, config.data)
    prompts = {origin: encoder.prompts(group, origin) for origin, group in rows.prompts.items()}
    encoded = Encoded(
        prompts,
        encoder.examples(rows.prompts["labelled"]),
        encoder.examples(rows.held_out),
        encoder.examples(rows.test),
        {p.uid: p for p in encoder.prompts(rows.probe, "labelled")},
        encoder.counts,
    )
    for name, before, after in (
        *((o, rows.prompts[o], prompts[o]) for o in prompts),
        ("held_out", rows.held_out, encoded.held_out),
        ("test", rows.test, encoded.test),
    ):
        if before and not after:
            raise InputError(
                f"data.{name}: no prompt has at most {config.data.max_prompt_tokens} tokens "
                "(data.max_prompt_tokens)"
            )
    return encoded


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
    return (folder / "config.yaml").exists()


def _complete(folder: Path, config: Config) -> bool:
    summary = folder / SUMMARY
    return summary.exists() and json.loads(summary.read_text())["steps"] >= config.train.steps


def _starting_point(
    config: Config, folder: Path, resume: bool | Path, console: Console
) -> tuple[Path | None, RunState, dict[str, Any]]:
    """The checkpoint to go on from, if any, and what it says."""
    if not resume:
        if is_started(folder):
            raise InputError(
                f"{folder} holds a run that is not complete: add --resume to go on, "
                "or choose another run.dir"
            )
        return None, RunState(), {}
    if isinstance(resume, Path):
        chosen: Path | None = resume.resolve()
    else:
        checkpoints = Checkpoints(folder.resolve(), config.train.keep_checkpoints)
        chosen, problems = checkpoints.newest_whole()
        for problem in problems:
            console.print(f"skipped a checkpoint: {problem}")
        if chosen is None and problems:
            raise InputError(f"{folder}: no checkpoint is whole")
    if is_started(folder):
        _compare(yaml.safe_load((folder / "config.yaml").read_text()), config)
    if chosen is None:
        console.print("no checkpoint yet: starting at step 0")
        return None, RunState(), {}
    state, parts = read_state(chosen)
    console.print(f"resuming from {chosen}")
    return chosen, state, parts


def _compare(before: dict[str, Any], config: Config) -> None:
    now = yaml.safe_load(dump(config))
    for key in FIXED:
        old, new = before, now
        for part in key.split("."):
            old, new = old.get(part, {}), new[part]
        if old != new:
            raise InputError(
                f"{key} differs from the run's own (config.yaml in the run folder), "
                "so it cannot be resumed with it"
            )


def _tracker(
    config: Config, folder: Path, state: RunState, resumed: bool, console: Console
) -> Tracker:
    trackers: list[Tracker] = [JsonLines(folder, state.step if resumed else None)]
    if config.tracking.progress:
        trackers.append(Terminal(console, config.train.steps, state.step))
    if config.tracking.wandb != "off":
        from ppo_dist.tracking.wandb import Wandb

        trackers.append(Wandb(config, folder, resumed))
    return Several(trackers)


def _finish(folder: Path, state: RunState, console: Console) -> None:
    rows = read_rows(folder / "metrics.jsonl")
    evaluations = [
        {key: value for key, value in row.items() if key == "step" or key.startswith("eval/")}
        for row in rows
        if row.get("eval/held_out/accuracy") is not None
    ]
    written = {
        "steps": state.step,
        "best_step": state.best_step,
        "best_accuracy": state.best,
        "evaluations": evaluations,
    }
    (folder / SUMMARY).write_text(json.dumps(written, indent=1))
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
